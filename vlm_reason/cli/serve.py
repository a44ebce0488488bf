"""vlm-reason serve: a vLLM server for the model of a config."""

from __future__ import annotations

import argparse
import os
import sys

from ..errors import UserError
from .command import Command, Result
from .wiring import read_config

_DESCRIPTION = """\
Start an OpenAI-compatible vLLM server for the model of CONFIG, set up as the `vllm` engine needs it: token ids in
and out, log-probabilities of the law that sampled, adapters and weights that can be replaced while it runs. It
runs until it is stopped. Host and port are those of the engine.urls entry; on another machine give them."""

_EPILOG = """\
examples:
  vlm-reason serve recipe.yaml                      the first of engine.urls, or port 8000
  vlm-reason serve recipe.yaml --index 1            the second
  vlm-reason serve recipe.yaml --host 0.0.0.0 --port 8001 engine.tensor_parallel_size=2"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--index", type=int, default=0, help="which of engine.urls this server is (default: 0)"
    )
    parser.add_argument("--host", help="address to listen on (default: that of the url, or 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: that of the url, or 8000)")


def _run(options: argparse.Namespace) -> Result:
    from ..engines.launch import server_environment
    from ..engines.make import VLLMConfig, engine_config, serve_command
    from ..traces.run import adapter_config

    config = read_config(options)
    engine = engine_config({"kind": "vllm", **config.engine})
    if not isinstance(engine, VLLMConfig):
        raise UserError("serve starts vLLM, and the config's engine.kind is 'hf': set engine.kind=vllm")
    host, port = _address(engine.urls, options)
    command = serve_command(config.model, config.dtype, engine, adapter_config(config), host, port)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *command], server_environment())


def _address(urls: tuple[str, ...], options: argparse.Namespace) -> tuple[str, int]:
    from ..engines.make import server_address

    host, port = "127.0.0.1", None
    if urls or options.index:
        if not 0 <= options.index < len(urls):
            raise UserError(f"--index {options.index}: engine.urls has {len(urls)} entries, numbered from 0")
        host, port = server_address(urls[options.index])
    if options.port is not None and not 1 <= options.port <= 65535:
        raise UserError(f"--port must be from 1 to 65535, got {options.port}")
    return options.host or host, options.port or port or 8000


def _show(result: Result) -> None:
    pass  # the server has taken this process's place


COMMAND = Command(
    name="serve",
    help="start a vLLM server for engine mode server",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=_add_arguments,
    run=_run,
    show=_show,
    after_interrupt="no server was started",
)
