#!/usr/bin/env bash
# Sets everything up, then runs the main job on the built-in model; arguments go to scripts/quickstart.py.
#
#   bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
export TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # spinning barriers cost several times the work on a busy machine
exec .venv/bin/python scripts/quickstart.py "$@"
