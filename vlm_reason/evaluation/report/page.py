"""The report as one HTML file: style, script, plots and data inline, nothing fetched. The page's own policy
forbids it to fetch or to run anything but the one script in it, whatever a model wrote."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from .figures import Figure, Header, Notice, Report, Task, plain
from .plots import DRAW
from .rationales import columns_shown, shaded
from .svg import esc
from .table import metric_table, value_text
from .text import embedded_json

FILTERS = (
    ("all", "All"),
    ("wrong_confident", "Wrong but confident"),
    ("not_chosen", "Gold sampled but not chosen"),
    ("never_sampled", "Never sampled"),
)
SORTS = (
    ("listed", "worst first"),
    ("sure_down", "most confident first"),
    ("sure_up", "least confident first"),
    ("name", "by id"),
)


def html(report: Report, rest: str | None = None) -> str:
    """The page. rest: name of the JSONL file beside it that holds what the page leaves out."""
    style, script = asset("page.css"), asset("page.js")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    systems = [header.name for header in report.headers]
    tasks = "".join(_task(i, task, systems) for i, task in enumerate(report.tasks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(report.title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#rationales">Skip to the rationales</a>\n'
        f"{_top(report)}\n{_navigation(report)}\n<main>\n{_warnings(report.warnings)}\n{tasks}\n"
        f"{_rationales(report, systems, rest)}\n</main>\n{_footer(report)}\n"
        f'<script type="application/json" id="report-data">{embedded_json(report.to_json())}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


@cache
def asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


# ------------------------------------------------------------------------------------------------- header


def _top(report: Report) -> str:
    cards = "".join(_card(i, header, len(report.headers) > 1) for i, header in enumerate(report.headers))
    return (
        f'<header class="top"><h1>{esc(report.title)}</h1><p class="soft small">{esc(report.made)}</p>'
        f'<div class="systems">{cards}</div></header>'
    )


def _card(i: int, header: Header, several: bool) -> str:
    facts = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in header.facts)
    first = ' <span class="soft small">baseline</span>' if several and i == 0 else ""
    low, high = header.accuracy.ci
    return (
        f'<section class="system s{i}"><h3>{esc(header.name)}{first}</h3>'
        f'<div class="figure">{value_text(header.accuracy.value, 3)}'
        f"<small>accuracy of a sample [{value_text(low, 3)}, {value_text(high, 3)}]</small></div>"
        f'<dl class="facts">{facts}</dl></section>'
    )


def _navigation(report: Report) -> str:
    links = [("#warnings", "Warnings")]
    links += [(f"#task-{i}", task.name) for i, task in enumerate(report.tasks)]
    links += [("#rationales", "Rationales")]
    items = "".join(f'<li><a href="{esc(link)}">{esc(name)}</a></li>' for link, name in links)
    return f'<nav aria-label="Sections"><ul>{items}</ul></nav>'


def _warnings(warnings: Sequence[Notice]) -> str:
    words = {"caution": "Caution", "note": "Note"}
    items = "".join(
        f'<li class="{w.level}"><b>{words[w.level]}</b>{esc(w.text)}</li>'
        for w in sorted(warnings, key=lambda w: w.level != "caution")
    )
    body = f'<ul class="warnings">{items}</ul>' if items else '<p class="soft">Nothing to warn of.</p>'
    return f'<section id="warnings"><h2>Before you read the figures</h2>{body}</section>'


# -------------------------------------------------------------------------------------------------- tasks


def _task(i: int, task: Task, systems: Sequence[str]) -> str:
    figures = "".join(_figure(f"plot-{i}-{n}", figure, systems) for n, figure in enumerate(task.figures))
    return (
        f'<section id="task-{i}"><h2>{esc(task.name)}</h2>{metric_table(task.rows, systems)}{_more(task, systems)}'
        f'<div class="figures">{figures}</div></section>'
    )


def _more(task: Task, systems: Sequence[str]) -> str:
    if not task.more and not task.skipped:
        return ""
    why: dict[str, list[str]] = {}
    for name, reason in task.skipped.items():
        why.setdefault(reason, []).append(name)
    left = "".join(f"<li>{esc(', '.join(names))}: {esc(reason)}</li>" for reason, names in why.items())
    not_there = f'<p class="small soft">Not computed:</p><ul class="small soft">{left}</ul>' if left else ""
    table = metric_table(task.more, systems) if task.more else ""
    return f'<details class="more"><summary>All other metrics</summary>{table}{not_there}</details>'


def _figure(name: str, figure: Figure, systems: Sequence[str]) -> str:
    several = figure.system is not None and len(systems) > 1
    of = f' <span class="soft">· {esc(systems[figure.system or 0])}</span>' if several else ""
    title = f"<h3>{esc(figure.title)}{of}</h3>"
    if figure.missing is not None:
        return f'<figure class="missing">{title}<p class="finding">{esc(figure.missing)}</p></figure>'
    data = plain(figure.data)
    return (
        f'<figure>{title}<p class="finding">{esc(figure.finding)}</p>{DRAW[figure.kind](name, data, systems)}'
        f'<div class="bottom"><button class="plain" type="button" data-download="{name}-data" '
        f'aria-label="Download the data of {esc(figure.title)} as JSON">data (JSON)</button></div>'
        f'<script type="application/json" id="{name}-data">{embedded_json(data)}</script></figure>'
    )


# --------------------------------------------------------------------------------------------- rationales


def _rationales(report: Report, systems: Sequence[str], rest: str | None) -> str:
    if not report.items:
        return '<section id="rationales"><h2>Rationales</h2><p>No problems to show.</p></section>'
    tasks = [task.name for task in report.tasks]
    data = {"items": report.items, "systems": systems, "tasks": tasks, "has": columns_shown(report.items)}
    buttons = "".join(
        f'<button type="button" data-filter="{key}" aria-pressed="{"true" if key == "all" else "false"}">{label} '
        "<span></span></button>"
        for key, label in FILTERS
    )
    left = f" The rest is in <code>{esc(rest)}</code>." if rest else ""
    return (
        '<section id="rationales"><h2>Problems and their rationales</h2>'
        f'<p class="soft">{_explain(report.method)}{left}</p>'
        "<noscript><p><strong>This list needs JavaScript; the figures above do not.</strong></p></noscript>"
        f'<div class="controls" role="group" aria-label="Which problems">{buttons}</div>'
        f'<div class="controls">{_controls(systems, tasks)}</div>{_legend(report.items)}'
        '<p id="shown" class="soft small" aria-live="polite"></p><div id="items" class="items"></div>'
        f'<script type="application/json" id="items-data">{embedded_json(plain(data))}</script></section>'
    )


def _explain(method: str) -> str:
    return (
        f"Rationales are ranked by <code>{esc(method)}</code>. A problem is <b>not chosen</b> where a right answer "
        "was sampled and another was put first (the choice failed), and <b>never sampled</b> where no sample was right "
        "(sampling failed)."
    )


def _controls(systems: Sequence[str], tasks: Sequence[str]) -> str:
    options = "".join(f'<option value="{key}">{label}</option>' for key, label in SORTS)
    return (
        '<label>Search <input type="search" id="search" placeholder="text, answer or id"></label>'
        f'<label>Order <select id="sort">{options}</select></label>'
        '<label>Confident from <input type="number" id="sure" min="0" max="100" step="5" value="50"> %</label>'
        f"{_choice('pick-system', 'System', systems)}{_choice('pick-task', 'Task', tasks)}"
        '<button type="button" id="open-all" aria-pressed="false">Open all shown</button>'
    )


def _choice(name: str, label: str, values: Sequence[str]) -> str:
    if len(values) < 2:
        return ""
    options = "".join(f'<option value="{i}">{esc(value)}</option>' for i, value in enumerate(values))
    return f'<label>{label} <select id="{name}"><option value="">all</option>{options}</select></label>'


def _legend(items: Sequence[Mapping[str, Any]]) -> str:
    parts = ["<span><mark>answer</mark> what was read as the answer</span>"]
    if shaded(items):
        parts.append(
            '<span>token of probability below <i class="p1">0.3</i> <i class="p2">0.1</i> <i class="p3">0.02</i></span>'
        )
    else:
        parts.append(
            "<span>tokens are not shaded: no token log-probabilities, or no tokenizer to tell the tokens</span>"
        )
    return f'<div class="legend words-legend">{"".join(parts)}</div>'


def _footer(report: Report) -> str:
    return (
        "<footer><p>Intervals are 95%. A difference is grey where its interval holds 0. Unreadable and cut answers "
        "count as wrong. Every figure is computed from stored samples; nothing on this page comes from elsewhere.</p>"
        '<p><button class="plain" type="button" data-download="report-data">all figures (JSON)</button></p></footer>'
    )
