"""What a command is: its words for --help, and two functions. `run` computes and writes, `show` prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """run(options) gives what --json prints; show(result) prints the same for people. `after_interrupt` tells
    what Ctrl-C left behind. `takes_config`: its first argument is CONFIG, with key=value behind it.
    `settings`: another argument that takes key=value. `status(result)`: the exit status of a run that ended well.
    `commands`: of a group, which does nothing itself; theirs are the names "group name"."""

    name: str
    help: str
    description: str
    epilog: str
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    run: Callable[[argparse.Namespace], Result] = lambda options: {}
    show: Callable[[Result], None] = lambda result: None
    after_interrupt: str = "nothing was written"
    takes_config: bool = True
    settings: str | None = None
    status: Callable[[Result], int] = lambda result: 0
    commands: tuple[Command, ...] = ()

    @property
    def overrides(self) -> str | None:
        """Name of the argument that takes key=value, None if the command takes none."""
        return "overrides" if self.takes_config else self.settings
