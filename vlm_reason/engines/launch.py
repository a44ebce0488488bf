"""The environment that vLLM must find when its process starts, and getting into it.

On a CPU two OpenMP runtimes meet: torch carries its own libgomp, and vLLM's kernels pull in the system's. Their threads
then wait for one another by spinning; measured, that costs a factor of up to 14. Torch's runtime preloaded serves both,
and threads that wait sleep. A dynamic linker reads LD_PRELOAD at the start of a process and OpenMP its settings at its
own: a running process cannot be put right, it has to be started again. This file imports nothing heavy for that reason.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..compat.vllm_lora import MARK


def vllm_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """`base` (default: this process's) with what vLLM needs; what the user has set stays."""
    env = dict(os.environ if base is None else base)
    env.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    env[MARK] = "1"  # not to be started a third time
    if shutil.which("nvidia-smi"):
        return env
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    env.setdefault("GOMP_SPINCOUNT", "0")
    env.setdefault("VLLM_CPU_CI_ENV", "1")  # no minute of compiling at every start
    preloaded = env.get("LD_PRELOAD", "")
    runtime = _torch_openmp()
    if runtime is not None and not any(name in preloaded for name in ("libgomp", "libiomp", "libomp")):
        env["LD_PRELOAD"] = f"{preloaded}:{runtime}" if preloaded else str(runtime)
    return env


def server_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """`vllm_environment` for a server: adapters may be loaded while it runs, and weights replaced."""
    env = vllm_environment(base)
    env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    env["VLLM_SERVER_DEV_MODE"] = "1"
    if not shutil.which("nvidia-smi"):
        # The model in the engine's process. vLLM would start one more for it, only to set OpenMP's environment there.
        env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return env


def prepared() -> bool:
    """Whether this process was started in vLLM's environment (always true with a GPU, where there is little to set)."""
    return MARK in os.environ or shutil.which("nvidia-smi") is not None


def enter_environment(engine: Mapping[str, Any]) -> None:
    """Start this process again in vLLM's environment when a config's `engine` section puts vLLM into it and it is not
    there yet. Call it first thing, before torch is imported; it does not return then."""
    in_process = engine.get("kind") == "vllm" and engine.get("mode", "colocate") == "colocate"
    if not in_process or prepared():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], vllm_environment())


def _torch_openmp() -> Path | None:
    """Torch's own OpenMP library, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or not sys.platform.startswith("linux"):
        return None
    package = Path(spec.origin).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        found = sorted(folder.glob("libgomp*.so*"))
        if found:
            return found[0]
    return None
