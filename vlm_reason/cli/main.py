"""vlm-reason train|sample|rank|eval|plan|serve CONFIG [key=value ...]

Exit status: 0 done; 1 the machine failed (a full disk, no permission); 2 something to mend in the input; 3 a
requirement or an audit was not passed (the result is written all the same); 130 Ctrl-C. Each failure is one
line on stderr. With --json stdout holds one JSON object and nothing else, whatever a library prints.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence

from ..compat.deepspeed_log import keep_stdout_clean
from ..errors import UserError
from . import bayes, compare, evaluate, import_, lm_eval, plan, rank, report, sample, select, serve, train
from .command import Command
from .output import dump_json, json_stdout

COMMANDS: tuple[Command, ...] = (
    train.COMMAND, sample.COMMAND, rank.COMMAND, evaluate.COMMAND, plan.COMMAND, serve.COMMAND,
    compare.COMMAND, select.COMMAND, import_.COMMAND, lm_eval.COMMAND, report.COMMAND, bayes.COMMAND,
)  # fmt: skip

_DESCRIPTION = """\
Post-train language models whose chain of thought is a latent variable, sample and rank rationales,
and evaluate with intervals."""

_EPILOG = """\
examples:
  vlm-reason train recipe.yaml                       train as the file says; repeat it to resume
  vlm-reason train recipe.yaml preset=rws seed=1     change any key of the file
  vlm-reason sample recipe.yaml                      draw rationales into OUTPUT_DIR/samples
  vlm-reason rank recipe.yaml --method mixture       order answers and rationales of each problem
  vlm-reason eval recipe.yaml --json > result.json   accuracy with intervals, base against trained
  vlm-reason eval suite.yaml --require "accuracy>=0.6"   a suite of tasks, with budgets and members
  vlm-reason compare runs/a runs/b                   paired, problem by problem
  vlm-reason select STORE --by bald                  what to label next; when to answer and when not
  vlm-reason report STORE... -o report.html          all that stored samples say, as one HTML file
  vlm-reason plan recipe.yaml --device h100          time, tokens and memory before it starts
  vlm-reason serve recipe.yaml                       a vLLM server for engine.mode server
  vlm-reason import samples.jsonl -o STORE           samples of another program, for metrics and reports
  vlm-reason lm-eval arc_easy -o OUT model=runs/m    tasks of lm-eval
  vlm-reason bayes fit recipe.yaml                   a posterior over the weights of an adapter

vlm-reason COMMAND --help says more of each."""


def main(arguments: Sequence[str] | None = None) -> int:
    return execute(parse(build_parser(), arguments))


def execute(options: argparse.Namespace) -> int:
    """Run the command in `options` and print its result; the exit status. Each failure that is not ours is one line."""
    # OpenMP reads this when torch is imported. Its spinning barriers cost several times the work on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_stdout_clean()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show, as an escape
            stream.reconfigure(errors="backslashreplace")
    command: Command = options.command
    if options.quiet:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which no command has done yet
    try:
        if options.json:
            with json_stdout() as stdout:
                result = command.run(options)
                dump_json(result, stdout)
        else:
            result = command.run(options)
            command.show(result)
            sys.stdout.flush()
        return command.status(result)
    except UserError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {command.after_interrupt}", 130)
    except BrokenPipeError:  # the reader of our output went away: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = _machine_failure(error)
        if message is None:
            raise
        return _fail(message, 1)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes `key=value` only where the first of them stands; we take them behind options too."""
    options, rest = parser.parse_known_args(arguments)
    into = options.command.overrides
    for argument in rest:
        if into is None or argument.startswith("-") or "=" not in argument:
            parser.error(f"unrecognized argument {argument!r} (see vlm-reason {options.command.name} --help)")
    if into is not None:
        setattr(options, into, [*getattr(options, into), *rest])
    return options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm-reason",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_commands(parser, COMMANDS)
    return parser


def _add_commands(parser: argparse.ArgumentParser, commands: Sequence[Command]) -> None:
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands:
        sub = subparsers.add_parser(
            command.name.split()[-1],
            help=command.help,
            description=command.description,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command.commands:
            _add_commands(sub, command.commands)
            continue
        if command.takes_config:
            sub.add_argument("config", metavar="CONFIG", help="YAML file that describes the run")
            add_overrides(sub)
        add_common_arguments(sub)
        command.add_arguments(sub)
        sub.set_defaults(command=command)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """What every command that takes a config takes behind it."""
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="change a key of the file; dots enter sections (trainer.learning_rate=1e-4); values are YAML",
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command takes."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout and nothing else there"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _fail(message: str, status: int) -> int:
    if status == 2 and os.environ.get("RANK", "0") != "0":
        return status  # bad input is the same in every process of a launcher: the first one tells
    print(f"vlm-reason: {' '.join(message.split())}", file=sys.stderr)
    return status


def _machine_failure(error: BaseException) -> str | None:
    """One line for a failure that is neither a mistake of the user's nor ours; None for the rest (a
    traceback)."""
    chain: BaseException | None = error
    while chain is not None:
        failure = _write_failure(chain)
        if failure is not None:
            problem, remedy = failure
            place = getattr(chain, "filename", None)
            return f"{problem}{f' ({place})' if place else ''}; {remedy} and run the same command again"
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return None


def _write_failure(error: BaseException) -> tuple[str, str] | None:
    """What kept a file from being written whole, and the remedy. Some writers re-raise without the number, and
    torch's says only that its bytes did not add up."""
    number, text = getattr(error, "errno", None), str(error)
    short = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos")
    if number in (errno.ENOSPC, errno.EDQUOT) or any(sign in text for sign in short):
        return "the disk is full", "free some space"
    if number == errno.EFBIG or "File too large" in text:
        return "a file is larger than the file system or the limit (ulimit -f) allows", "raise it"
    return None


if __name__ == "__main__":
    sys.exit(main())
