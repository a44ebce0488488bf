"""Every method by name. A preset is a file with `recipe(**its options) -> Recipe`; PRESETS holds the defaults.

PRESETS["vr"]                                        a Recipe
build("vr", proposal="mixture", ratio="none")        the same method with its axes set
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ...config import convert
from ...errors import UserError, nearest
from ..recipe import Recipe
from . import (
    chi2,
    grpo,
    iwae,
    jepo,
    latro,
    maxrl,
    nover,
    reinforce,
    rft,
    rloo,
    rlpr,
    rws,
    sft,
    star,
    trice,
    verifree,
    vr,
    vr_released,
)

_BUILDERS: Mapping[str, Callable[..., Recipe]] = MappingProxyType(
    {
        "sft": sft.recipe,
        "star": star.recipe,
        "rft": rft.recipe,
        "reinforce": reinforce.recipe,
        "rloo": rloo.recipe,
        "grpo": grpo.recipe,
        "maxrl": maxrl.recipe,
        "rws": rws.recipe,
        "iwae": iwae.recipe,
        "trice": trice.recipe,
        "latro": latro.recipe,
        "jepo": jepo.recipe,
        "verifree": verifree.recipe,
        "rlpr": rlpr.recipe,
        "nover": nover.recipe,
        "chi2": chi2.recipe,
        "vr": vr.recipe,
        "vr_released": vr_released.recipe,
    }
)

PRESETS: Mapping[str, Recipe] = MappingProxyType({name: builder() for name, builder in _BUILDERS.items()})


def build(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe called `name` with `options` set. UserError names the nearest preset, option or value."""
    if name not in _BUILDERS:
        raise UserError(f"unknown preset {name!r}{nearest(name, _BUILDERS)}")
    builder = _BUILDERS[name]
    known = inspect.signature(builder).parameters
    hints = get_type_hints(builder)
    chosen: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key not in known:
            raise UserError(f"preset {name!r} has no option {key!r}{nearest(str(key), known)}")
        choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
        if choices and value not in choices:
            raise UserError(
                f"option {key!r} of preset {name!r} is {value!r}{nearest(str(value), map(str, choices))}"
            )
        chosen[key] = convert(hints[key], value, f"option {key!r} of preset {name!r}")
    return builder(**chosen)
