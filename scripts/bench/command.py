"""What every benchmark's command line begins with."""

from __future__ import annotations

import argparse

from vlm_reason.compat.deepspeed_log import keep_stdout_clean


def bench_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the script's docstring as its help. From here on standard output holds the JSON lines alone."""
    keep_stdout_clean()
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
