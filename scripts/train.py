"""What `accelerate launch` starts: `vlm-reason train`, with the config behind an option.

    accelerate launch --config_file configs/accelerate/cpu.yaml scripts/train.py --config RECIPE.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 8 scripts/train.py --config RECIPE.yaml
    accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 8 \\
        scripts/train.py --config RECIPE.yaml
    accelerate launch --use_deepspeed --deepspeed_config_file configs/deepspeed/zero3.json --num_processes 8 \\
        scripts/train.py --config RECIPE.yaml trainer.learning_rate=5e-5
    python scripts/train.py --config RECIPE.yaml          the same as vlm-reason train RECIPE.yaml

Same output, same one-line errors and same exit status as the command; of several processes rank 0 tells. accelerate
itself turns every failure into status 1 and adds a traceback of its own; for one process `accelerate launch --quiet`
leaves that out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlm_reason.cli import train
from vlm_reason.cli.main import add_common_arguments, add_overrides, execute, parse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="CONFIG", help="YAML file that describes the run")
    add_overrides(parser)
    add_common_arguments(parser)
    parser.set_defaults(command=train.COMMAND)
    if os.environ.get("RANK", "0") != "0":
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # results are rank 0's to print
    return execute(parse(parser, arguments))


if __name__ == "__main__":
    status = main()
    if status == 2 and os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # the launcher ends everybody when one process ends: rank 0 has to have told first
    sys.exit(status)
