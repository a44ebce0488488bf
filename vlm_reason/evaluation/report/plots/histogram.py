"""One uncertainty of every problem, as shares of the right, of the wrong and of the out-of-distribution
problems: three histograms below one another on common bins, so that groups of different size compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..svg import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Plot, Scale, nice_ticks, nice_top, picture

GROUPS = {"right": ("right", "s0"), "wrong": ("wrong", "s1"), "ood": ("out of distribution", "s3")}
GAP, START = 22.0, 20.0


def draw_entropy(name: str, data: Mapping[str, Any], systems: Sequence[str]) -> str:
    return _draw(name, data, "semantic entropy (nats)", "Semantic entropy of the answers")


def draw_mutual_information(name: str, data: Mapping[str, Any], systems: Sequence[str]) -> str:
    return _draw(name, data, "mutual information (nats)", "Mutual information between members")


def draw_variance(name: str, data: Mapping[str, Any], systems: Sequence[str]) -> str:
    return _draw(name, data, "variance of log p(chosen answer)", "Variance over members")


def _draw(name: str, data: Mapping[str, Any], x_title: str, title: str) -> str:
    edges = data["edges"]
    groups = [(key, *GROUPS[key]) for key in GROUPS if sum(data["counts"].get(key, ()))]
    height = (HEIGHT - BOTTOM - START - GAP * (len(groups) - 1)) / len(groups)
    shares = {key: _shares(data["counts"][key]) for key, _, _ in groups}
    top = nice_top(max((max(s, default=0) for s in shares.values()), default=1))
    plots, said = [], []
    for i, (key, label, style) in enumerate(groups):
        last = i == len(groups) - 1
        start = START + i * (height + GAP)
        plot = Plot(
            Scale(edges[0], edges[-1]), Scale(0, top), x_title if last else "", "share" if i == 0 else "",
            nice_ticks(edges[0], edges[-1]) if last else (), [top], (LEFT, start, WIDTH - RIGHT, start + height),
        )  # fmt: skip
        counts, mean = data["counts"][key], data["means"][key]
        for left, right, share, n in zip(edges, edges[1:], shares[key], counts, strict=False):
            plot.bar(
                left, right, 0, share, style, f"{label}, {left:.2f} to {right:.2f}: {n} problems, {share:.0%}"
            )
        if mean is not None:
            plot.line([mean, mean], [0, top], f"{style} dash", f"mean {mean:.3f}")
        text = f"{label}: {sum(counts)} problems" + ("" if mean is None else f", mean {mean:.2f}")
        plot.text(LEFT, start - 6, text, "key")
        plots.append(plot)
        said.append(text)
    if "null_mean" in data and data["null_mean"] is not None and math.isfinite(data["null_mean"]):
        plots[0].upright(data["null_mean"], "neutral thin dots", "by chance")
    return picture(name, title, f"Share of the problems in each bin. {'; '.join(said)}.", plots)


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [n / total if total else 0.0 for n in counts]
