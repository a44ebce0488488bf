"""Problems from reasoning-gym generators (Stojanovski et al. 2025, arXiv:2505.24760), and which of them not to trust.

A generator is a function of (name, options, seed, index). Twelve of the 106 in release 0.1.25 break what training needs
and are refused unless the caller allows them; the reasons below were measured by scoring every gold answer, by scoring
nonsense, and by generating the same seeds in two processes with different hash salts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import UserError, nearest
from ..types import Problem

_NO_GOLD = (
    "its own reference answer scores 0 (there is no unique solution), so no sampled answer can be compared"
)
_REWARDS_GARBAGE = "its scorer gives 1.0 to any text"
_NOT_REPRODUCIBLE = (
    "the same seed gives other problems or references in another process, so a run cannot be resumed"
)

QUARANTINED: Mapping[str, str] = {
    "boxnet": _NO_GOLD,
    "graph_color": _NO_GOLD,
    "propositional_logic": _NO_GOLD,
    "rubiks_cube": _NO_GOLD,
    "rush_hour": _NO_GOLD,
    "game_of_life_halting": _REWARDS_GARBAGE,
    "isomorphic_strings": _NOT_REPRODUCIBLE,
    "knight_swap": _NOT_REPRODUCIBLE,
    "list_functions": _NOT_REPRODUCIBLE,
    "polynomial_multiplication": _NOT_REPRODUCIBLE,
    "ransom_note": _NOT_REPRODUCIBLE,
    "word_ladder": _NOT_REPRODUCIBLE,
}


def load_gym(
    name: str, size: int, seed: int, options: Mapping[str, Any], allow_quarantined: bool = False
) -> list[Problem]:
    """`size` problems with ids `name/seed/index`. Problem i does not depend on `size`.

    metadata: source, name, options, entry (the generator's whole record: the scorer needs it).
    Raises UserError: unknown generator or option (nearest name), option value refused, quarantined generator.
    """
    dataset = make_dataset(name, size, seed, options, allow_quarantined)
    problems = []
    for index in range(size):
        entry = dataset[index]
        if entry["answer"] is None:
            raise UserError(f"reasoning-gym {name!r} has no reference answer at seed {seed}, index {index}")
        problems.append(
            Problem(
                id=f"{name}/{seed}/{index}",
                question=entry["question"],
                answer=str(entry["answer"]),
                metadata={
                    "source": "reasoning_gym",
                    "name": name,
                    "options": dict(options),
                    "entry": entry,
                },
            )
        )
    return problems


def make_dataset(
    name: str, size: int, seed: int, options: Mapping[str, Any], allow_quarantined: bool = False
) -> Any:
    """The generator itself, after every check that can be made without generating."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError("reasoning-gym is not installed; run: pip install reasoning-gym==0.1.25") from error
    if name not in DATASETS:
        raise UserError(f"unknown reasoning-gym generator {name!r}{_suggest(name, DATASETS)}")
    if name in QUARANTINED and not allow_quarantined:
        raise UserError(
            f"reasoning-gym generator {name!r} is quarantined: {QUARANTINED[name]}; "
            "choose another, or set allow_quarantined: true in the task's options"
        )
    known = {f.name for f in dataclasses.fields(DATASETS[name][1])} - {"size", "seed"}
    for option in options:
        if option in ("size", "seed"):
            raise UserError(f"set {option} on the task itself, not in options")
        if option not in known:
            raise UserError(f"reasoning-gym {name!r} has no option {option!r}{nearest(option, known)}")
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"reasoning-gym {name!r} refuses options {dict(options)}: {error}") from error


def _suggest(name: str, known: Mapping[str, Any]) -> str:
    hint = nearest(name, known)
    return hint if hint.startswith("; did you mean") else "; see reasoning_gym.factory.DATASETS for all names"
