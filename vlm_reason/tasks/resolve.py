"""From the `template` key of a config to a Template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import from_dict
from .templates import Template, template_named


def resolve_template(template: str | dict[str, Any]) -> Template:
    """A built-in name, or a section with the fields of Template; `base` names the built-in it starts from."""
    if isinstance(template, str):
        return template_named(template)
    section = dict(template)
    base = template_named(section.pop("base", "steps"))
    own = from_dict(Template, {"name": base.name, "prior": base.prior, "posterior": base.posterior, "cue": base.cue,
                               **section}, "template")  # fmt: skip
    return replace(base, **{key: getattr(own, key) for key in section})
