#!/usr/bin/env bash
# Sets everything up, then runs the main job on the built-in model; arguments go to scripts/quickstart.py.
#
#   bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
export TOKENIZERS_PARALLELISM=false
exec .venv/bin/python scripts/quickstart.py "$@"
