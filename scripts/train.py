"""What `accelerate launch` starts: `vlm-reason train`, with the config behind an option.

    accelerate launch scripts/train.py --config configs/recipes/vr_gsm8k.yaml trainer.learning_rate=5e-5
    accelerate launch --config_file configs/accelerate/cpu.yaml scripts/train.py --config RECIPE.yaml
    python scripts/train.py --config RECIPE.yaml          the same as vlm-reason train RECIPE.yaml

Same output, same one-line errors and same exit status as the command. accelerate itself turns every failure into status
1 and adds a traceback of its own; `accelerate launch --quiet` leaves that out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlm_reason.cli import train
from vlm_reason.cli.main import add_common_arguments, execute, parse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="CONFIG", help="YAML file that describes the run")
    add_common_arguments(parser)
    parser.set_defaults(command=train.COMMAND)
    return execute(parse(parser, arguments))


if __name__ == "__main__":
    sys.exit(main())
