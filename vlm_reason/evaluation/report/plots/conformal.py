"""Mean size of the answer sets against alpha. Where it is shaded no set can keep its promise: the right answer is
sampled too seldom, or the problems to calibrate on are too few."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..svg import Plot, Scale, nice_top


def draw(name: str, data: Mapping[str, Any], systems: Sequence[str]) -> str:
    alphas, never = data["alpha"], data["never_sampled"]
    sizes = [math.nan if s is None or not b else s for s, b in zip(data["size"], data["bound"], strict=True)]
    known = [s for s in sizes if math.isfinite(s)]
    top = nice_top(max(known, default=1.0))
    right = alphas[-1]
    plot = Plot(
        Scale(0, right), Scale(0, top), "alpha (promised share of misses)", "mean answers in a set",
        [round(0.1 * i, 1) for i in range(int(right * 10) + 1)],
    )  # fmt: skip
    out = max([never, *(a for a, b in zip(alphas, data["bound"], strict=True) if not b)])
    if out > 0:
        plot.bar(
            0,
            min(out, right),
            0,
            top,
            "neutral band",
            "out of reach: the right answer is sampled too seldom, or the problems are too few",
        )
        plot.name("out of reach", "neutral", "band")
    plot.line(alphas, sizes, "s0")
    for alpha, size, coverage in zip(alphas, sizes, data["coverage"], strict=True):
        covered = "" if coverage is None else f", coverage {coverage:.1%} measured"
        plot.point(alpha, size, "s0", tip=f"alpha {alpha:g}: {size:.2f} answers{covered}")
    plot.name("mean set size", "s0", "circle")
    said = "; ".join(f"{a:g}: {s:.2f}" for a, s in zip(alphas, sizes, strict=True) if math.isfinite(s))
    return plot.svg(
        name, "Size of conformal answer sets", f"Mean size at each alpha. {said or 'none within reach'}."
    )
