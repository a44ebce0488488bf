"""The report without a browser: what it computes, what it says, and that no text of a model gets out of its place."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report_parts import HOSTILE, hostile, record, store_of, three_kinds, votes
from vlm_reason.cli.main import main
from vlm_reason.errors import UserError
from vlm_reason.evaluation import metrics
from vlm_reason.evaluation.report import Report, ReportConfig, build, differences, html, write
from vlm_reason.evaluation.report.curves import tie_band
from vlm_reason.evaluation.report.passages import passages
from vlm_reason.evaluation.report.svg import Plot, Scale, nice_ticks, nice_top
from vlm_reason.evaluation.report.system import problems_of, read_systems
from vlm_reason.evaluation.report.table import interval_text, value_text
from vlm_reason.evaluation.report.text import embedded_json, visible
from vlm_reason.evaluation.report.tokens import pieces
from vlm_reason.store import SampleStore


def spell(ids: Any) -> str:
    return "".join(map(chr, ids))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return store_of(tmp_path / "mine", three_kinds())


def estimates(report: Report, system: int = 0) -> dict[str, float]:
    return {row.key: row.estimate.value for row in report.tasks[0].rows if row.system == system}


# ------------------------------------------------------------------------------------------------------ text


def test_every_control_character_is_shown() -> None:
    assert visible("a\x00b\x1bc\x7fd\x85e") == "a⟨NUL⟩b⟨ESC⟩c⟨DEL⟩d⟨U+0085⟩e"
    assert visible("\u202eabc\u202c\u200b\u2028") == "⟨RLO⟩abc⟨PDF⟩⟨ZWSP⟩⟨LS⟩"
    assert visible("\ud83d|\U0001f600|é\t\n") == "\ufffd|\U0001f600|é\t\n"


def test_embedded_json_reads_back_and_holds_no_markup() -> None:
    value = {"a": [*HOSTILE[:4], "&<>"], "b": 1.5, "c": None}
    text = embedded_json(value)
    assert json.loads(text) == value
    assert not set("<>&") & set(text)
    assert json.loads(embedded_json({"x": "half \ud83d"})) == {"x": "half \ufffd"}
    with pytest.raises(ValueError):
        embedded_json({"x": math.nan})


# ----------------------------------------------------------------------------------------------------- plots


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(0.03, 0.11) == [0.04, 0.06, 0.08, 0.1]
    assert nice_ticks(-3, 17, 4) == [0, 5, 10, 15]
    assert nice_ticks(2, 2) == [2]
    assert [nice_top(v) for v in (0.07, 0.1, 17, 93, 0.0, math.nan)] == [0.08, 0.1, 20, 100, 1.0, 1.0]


def test_scales_map_the_ends_and_the_middle() -> None:
    assert [Scale(2, 4).share(v) for v in (2, 3, 4)] == [0, 0.5, 1]
    assert [Scale(1, 16, log=True).share(v) for v in (1, 4, 16)] == [0, 0.5, 1]
    plot = Plot(Scale(0, 1), Scale(0, 10), area=(50, 30, 250, 130))
    assert (plot.px(0.5), plot.py(0), plot.py(10), plot.py(99)) == (150, 130, 30, 30)


def test_a_line_breaks_where_a_value_is_missing() -> None:
    plot = Plot(Scale(0, 4), Scale(0, 1))
    plot.line([0, 1, 2, 3, 4], [0, 1, math.nan, 1, 0], "s0")
    plot.point(2, math.nan, "s0")
    plot.whisker(2, math.nan, 1, "s0")
    assert [mark.count("L") for mark in plot.marks] == [1, 1]


def test_words_in_a_picture_are_escaped() -> None:
    plot = Plot(Scale(0, 1), Scale(0, 1), x_title="<b>&\x00")
    drawn = plot.svg("p", "<t>", '"d"')
    assert "&lt;b&gt;&amp;⟨NUL⟩" in drawn and "<t>" not in drawn and '"d"' not in drawn
    assert 'role="img" aria-labelledby="p-t p-d"' in drawn


def test_numbers_are_written_without_surprises() -> None:
    assert [value_text(v, 3) for v in (0.5, -0.25, -1e-9, math.nan, math.inf)] == [
        "0.500",
        "−0.250",
        "0.000",
        "–",
        "∞",
    ]
    assert value_text(0.25, 2, sign=True) == "+0.25"
    assert interval_text((-1, 2), 1) == "[−1.0, 2.0]" and interval_text((0, math.nan), 1) == "–"


# -------------------------------------------------------------------------------------------------- passages


def test_pieces_join_the_tokens_of_one_character() -> None:
    table = {(1,): "a", (2,): "\ufffd", (3,): "\ufffd", (2, 3): "é", (4,): "b"}

    def decode(ids: Any) -> str:
        return table[tuple(ids)]

    assert pieces("aéb", (1, 2, 3, 4), (-1, -2, -3, -4), decode) == [("a", -1), ("é", -5), ("b", -4)]
    assert pieces("other", (1, 4), (-1, -4), decode) is None


def test_the_answer_is_marked_and_improbable_tokens_are_shaded() -> None:
    r = record("p", 0, "42", True, trace="ab.")
    shown, cut = passages(r, spell)
    assert cut == 0
    assert shown == [
        ["ab", 0, 0, None],
        [".", 3, 0, 0.0067],
        [" ", 0, 0, None],
        ["42", 0, 1, None],
    ]


def test_text_without_tokens_has_its_answer_marked_inside() -> None:
    import dataclasses

    r = record("p", 0, "42", True)
    r = dataclasses.replace(
        r, text_only=True, trace_ids=(), trace_logps=(), answer_ids=(), answer_logps=(),
        trace_text="42 or 41? It is 42.", answer_text="42",
    )  # fmt: skip
    shown, _ = passages(r, None)
    assert shown == [["42 or 41? It is ", 0, 0, None], ["42", 0, 1, None], [".", 0, 0, None]]


def test_a_long_text_keeps_its_head_and_its_answer() -> None:
    r = record("p", 0, "42", True, trace="x" * 30_000 + "the end")
    shown, cut = passages(r, None)
    text = "".join(part[0] for part in shown)
    assert text.startswith("xxx") and text.endswith("the end 42") and f"…{cut} characters" in text
    assert len(text) == pytest.approx(20_000, abs=40) and cut == 30_000 + 7 + 3 - 20_000


# --------------------------------------------------------------------------------------------------- systems


def test_a_store_is_split_into_systems_and_tasks(tmp_path: Path) -> None:
    records = [
        *votes("sum/1/0", ["1", "2"]), *votes("sum/1/1", ["1", "1"]), *votes("chain-7", ["1", "1"]),
        *votes("sum/1/0", ["2", "2"], weights="other"), *votes("sum/1/0", ["1"], temperature=0.5),
        *votes("sum/1/0", ["1", "1", "1"], saw_answer=True),
    ]  # fmt: skip
    systems = read_systems([store_of(tmp_path / "s", records)])
    assert [(s.name, {t: len(p) for t, p in s.tasks.items()}) for s in systems] == [
        ("s (w base/prior, temperature 1)", {"sum": 2, "chain": 1}),
        ("s (other base/prior, temperature 1)", {"sum": 1}),
        ("s (w base/prior, temperature 0.5)", {"sum": 1}),
    ]
    assert [s.left_out for s in systems] == [3, 0, 0]


def test_members_are_one_system(tmp_path: Path) -> None:
    records = [r for m in range(3) for r in votes("a", ["1", "2"], member=m, weights=f"w{m}")]
    [system] = read_systems([store_of(tmp_path / "s", records)])
    problems = system.tasks["a"]
    assert problems.members == (0, 1, 2)
    codes = problems.columns.answers.index("1"), problems.columns.answers.index("2")
    assert problems.by_member() == [[list(codes)] * 3]


def test_the_folders_of_a_suite_are_its_tasks(tmp_path: Path) -> None:
    store_of(tmp_path / "run" / "easy" / "samples", votes("a", ["1", "1"]))
    store_of(tmp_path / "run" / "hard", votes("b", ["2", "1"]))
    [system] = read_systems([tmp_path / "run"])
    assert {t: p.ids for t, p in system.tasks.items()} == {"easy": ("a",), "hard": ("b",)}


def test_laws_that_differ_in_top_p_alone_stay_two_systems(tmp_path: Path) -> None:
    for task, right in (("easy", "1"), ("hard", "2")):
        records = [*votes("a", ["1", "1"]), *votes("a", [right, "2", "2"], top_p=0.9)]
        store_of(tmp_path / "run" / task, records)
    systems = read_systems([tmp_path / "run"])
    assert [(s.name, {t: p.most for t, p in s.tasks.items()}) for s in systems] == [
        ("run (w base/prior, temperature 1)", {"easy": 2, "hard": 2}),
        ("run (w base/prior, temperature 1, top-p 0.9)", {"easy": 3, "hard": 3}),
    ]
    assert [p.columns.correct.sum() for s in systems for p in s.tasks.values()] == [2, 2, 1, 0]


def test_systems_of_one_name_and_one_task_are_not_joined(tmp_path: Path) -> None:
    """Temperatures that are printed alike: nothing may be left out of the report for it."""
    records = [*votes("a", ["1"]), *votes("a", ["2", "2"], temperature=1 + 1e-9)]
    systems = read_systems([store_of(tmp_path / "s", records)])
    assert [(s.name, s.tasks["a"].most) for s in systems] == [
        ("s (w base/prior, temperature 1)", 1),
        ("s (w base/prior, temperature 1) #2", 2),
    ]


def test_header_and_cautions_are_of_every_task_of_a_suite(tmp_path: Path) -> None:
    """The hard task has the cut samples; its problems have the ids of the easy one's, and stay others."""
    store_of(tmp_path / "run" / "easy", [r for i in range(5) for r in votes(f"{i}", ["1", "1"])])
    store_of(tmp_path / "run" / "hard", [r for i in range(5) for r in votes(f"{i}", ["7", None], "7")])
    built = build([tmp_path / "run"], ood=[tmp_path / "run"])
    [header], [system] = built.report.headers, built.systems
    facts = dict(header.facts)
    assert facts["unfinished"] == "25.0% (5 of 20)" and facts["samples"] == "20 (2 a problem)"
    assert facts["unreadable"] == "0.0% (0 of 15)"
    assert any(
        n.text == "25.0% of the rationales hit the length limit; they count as wrong."
        for n in built.report.warnings
    )
    outside = problems_of(system.columns)
    assert len(outside) == 10 and outside.items.n.tolist() == [2] * 10
    assert outside.chosen == ["1"] * 5 + ["7"] * 5
    assert [system.columns.record(row).reference for row in (0, 9, 10, 19)] == ["1", "1", "7", "7"]


# --------------------------------------------------------------------------------------------------- figures


def test_the_statistics_are_the_values_of_the_metrics() -> None:
    generator = np.random.default_rng(0)
    for n in (12, 60):
        confidence = generator.integers(0, 9, n) / 8
        right = (generator.random(n) < 0.2 + 0.6 * confidence).astype(float)
        for name, own in (
            ("ece", metrics.ece(confidence, right)),
            ("auroc", metrics.auroc(confidence, right)),
            ("aurc", metrics.aurc(-confidence, 1 - right)),
            ("prr", metrics.prr(-confidence, 1 - right)),
        ):
            assert getattr(differences, name)(confidence, right) == pytest.approx(own.value, abs=1e-12), name


def test_answers_that_could_not_be_read_agree_with_nothing_in_differences_too(tmp_path: Path) -> None:
    """Four unread answers are four classes; a problem whose rationales were all cut has no share of unread ones."""
    mute = {"canonical": None, "parsed": None, "correct": False}
    a = [
        dataclasses.replace(r, **mute) if r.canonical == "3" else r
        for r in [*votes("x0", "3333"), *votes("x1", "1233")]
    ]
    b = [*votes("x0", ["1"] * 4, weights="b"), *votes("x1", ["1"] * 4, weights="b")]
    c = [*votes("x0", ["1", "1", "1", None], weights="c"), *votes("x1", [None] * 4, weights="c")]
    c[3] = dataclasses.replace(record("x0", 3, "?", False, weights="c"), **mute)
    built = build([store_of(tmp_path / name, r) for name, r in (("a", a), ("b", b), ("c", c))])
    rows = {(r.key, r.system): r for r in built.report.tasks[0].rows}
    for key in ("semantic_entropy", "unparsed"):
        for system in (1, 2):
            expected = rows[key, system].estimate.value - rows[key, 0].estimate.value
            assert rows[key, system].difference.value == pytest.approx(expected)  # type: ignore[union-attr]
    assert rows["semantic_entropy", 0].estimate.value == pytest.approx(np.log(4))
    assert rows["unparsed", 0].estimate.value == 0.75 and rows["unparsed", 2].estimate.value == 0.25


def test_members_without_a_readable_answer_do_not_agree_on_it(tmp_path: Path) -> None:
    records = [
        *votes("x0", [None, None], member=0, weights="w0"), *votes("x0", ["1", "1"], member=1, weights="w1"),
        *votes("x1", ["1", "2"], member=0, weights="w0"), *votes("x1", ["2", None], member=1, weights="w1"),
    ]  # fmt: skip
    [system] = read_systems([store_of(tmp_path / "s", records)])
    problems = system.tasks["x"]
    one, two = problems.columns.answers.index("1"), problems.columns.answers.index("2")
    assert problems.by_member() == [[[None, None], [one, one]], [[one, two], [two, None]]]


def test_the_tie_band_holds_every_order_and_no_more() -> None:
    u, loss = np.array([0, 1, 1, 1, 2, 2]), np.array([0.0, 1, 0, 0, 1, 0])
    low, high = tie_band(u, loss)
    orders = [[0, *a, *b] for a in itertools.permutations([1, 2, 3]) for b in itertools.permutations([4, 5])]
    risks = np.array([np.cumsum(loss[o]) / np.arange(1, 7) for o in orders])
    assert np.allclose(low, risks.min(0)) and np.allclose(high, risks.max(0))


def test_a_difference_of_equal_systems_is_nothing() -> None:
    c, r = np.linspace(0, 1, 40), (np.arange(40) % 3 > 0).astype(float)
    d = differences.by_resampling(differences.aurc, (c, r), (c, r))
    assert (d.value, d.ci, d.p, d.clear) == (0.0, (0.0, 0.0), 1.0, False)


def test_a_clear_difference_is_found_and_paired_by_id(tmp_path: Path) -> None:
    """B is right where A is wrong on a quarter of 40 problems, and its problems come in another order."""
    a = [r for i in range(40) for r in votes(f"p{i}", ["1" if i % 4 else "2"] * 2)]
    b = [r for i in reversed(range(40)) for r in votes(f"p{i}", ["1"] * 2, weights="b")]
    built = build([store_of(tmp_path / "a", a), store_of(tmp_path / "b", b)])
    rows = {r.key: r for r in built.report.tasks[0].rows if r.system == 1}
    assert rows["accuracy"].difference is not None
    assert rows["accuracy"].difference.value == pytest.approx(0.25) and rows["accuracy"].difference.clear
    assert rows["maj@2"].difference.p == pytest.approx(2 * 0.5**10)  # type: ignore[union-attr]
    page = html(built.report)
    assert '<td class="num better">+0.250 ▲</td>' in page


def test_other_problems_are_not_compared_and_that_is_said(tmp_path: Path) -> None:
    a = [r for i in range(6) for r in votes(f"p{i}", ["1", "2"])]
    b = [r for i in range(1, 7) for r in votes(f"p{i}", ["1", "2"], weights="b")]
    built = build([store_of(tmp_path / "a", a), store_of(tmp_path / "b", b)])
    assert all(row.difference is None for row in built.report.tasks[0].rows)
    said = [n.text for n in built.report.warnings if n.level == "caution"]
    assert (
        "p: b has other problems than a (1 only in the first, 1 only in the second), so they are not compared."
        in said
    )


def test_the_same_id_with_another_question_is_not_compared(tmp_path: Path) -> None:
    a = [r for i in range(6) for r in votes(f"p{i}", ["1", "2"])]
    b = [r for i in range(6) for r in votes(f"p{i}", ["1", "2"], weights="b", question=f"Another {i}?")]
    built = build([store_of(tmp_path / "a", a), store_of(tmp_path / "b", b)])
    assert all(row.difference is None for row in built.report.tasks[0].rows)
    assert any("asks another question" in n.text for n in built.report.warnings)


def test_recorded_samples_give_the_known_figures(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "recorded_math_rm8" / "test.jsonl"
    assert main(["import", str(source), "-o", str(tmp_path / "math"), "--quiet"]) == 0
    report = build([tmp_path / "math"]).report
    found = estimates(report)
    known = {
        "accuracy": 0.91, "pass@8": 0.96, "maj@8": 0.925, "best_of@8": 0.94, "ece": 0.05, "mce": 0.625,
        "brier": 0.0419, "auroc": 0.8356, "aurc": 0.02481, "prr": 0.6731,
    }  # fmt: skip
    for name, value in known.items():
        assert round(found[name], len(str(value).split(".")[1])) == value, name
    kinds = [item["kind"] for item in report.items]
    assert (kinds.count("right"), kinds.count("not_chosen"), kinds.count("never_sampled")) == (93, 3, 4)
    repeats = next(f for f in report.tasks[0].figures if f.kind == "repeats").data
    assert [round(e.value, 4) for e in repeats["curves"]["best-of-k"]] == [0.91, 0.9279, 0.9361, 0.94]
    marked = [p for item in report.items for r in item["rationales"] for p in r["parts"] if p[2]]
    assert len(marked) > 780  # of 800: a few predictions are not spelt in their text as they were read


def test_every_figure_is_drawn_or_says_why_not(store: Path, tmp_path: Path) -> None:
    single = store_of(
        tmp_path / "one", [r for i in range(30) for r in votes(f"q{i}", ["1" if i % 2 else "2"])]
    )
    for folder, drawn in (
        (store, {"reliability", "risk_coverage", "repeats", "entropy", "conformal"}),
        (single, {"reliability", "risk_coverage"}),
    ):
        figures = build([folder]).report.tasks[0].figures
        assert {f.kind for f in figures if f.missing is None} == drawn
        assert len({f.kind for f in figures}) == 8
        assert all(f.missing and f.missing.endswith(".") for f in figures if f.kind not in drawn)


def test_members_and_ood_have_their_figures(tmp_path: Path) -> None:
    def samples(prefix: str, agree: bool) -> list[Any]:
        return [
            r
            for i in range(24)
            for m in range(2)
            for r in votes(
                f"{prefix}{i}",
                ["1"] * 3 if agree else [str(m + 1), str(m + 1), "5"],
                member=m,
                weights=f"w{m}",
            )
        ]

    inside, outside = (
        store_of(tmp_path / "in", samples("i", True)),
        store_of(tmp_path / "out", samples("o", False)),
    )
    report = build([inside], [outside]).report
    by_kind = {f.kind: f for f in report.tasks[0].figures}
    assert by_kind["roc"].data["systems"][0]["auroc"].value == 1.0
    assert by_kind["mutual_information"].data["counts"].keys() == {"right", "wrong", "ood"}
    assert by_kind["member_variance"].missing is None
    assert report.items[0]["members"] == {"answers": ["1"], "rows": [[0, [1.0]], [1, [1.0]]]}


# ------------------------------------------------------------------------------------------------ rationales


def test_problems_end_in_one_of_three_ways_worst_first(store: Path) -> None:
    items = build([store]).report.items
    ends = [(i["kind"], i["confidence"]) for i in items]
    assert ends[:8] == [
        ("never_sampled", 1.0), ("never_sampled", 1.0),
        ("not_chosen", 0.75), ("not_chosen", 0.75), ("not_chosen", 0.75),
        ("not_chosen", 0.25), ("never_sampled", 0.25), ("never_sampled", 0.25),
    ]  # fmt: skip
    assert all(kind == "right" for kind, _ in ends[8:]) and ends[8][1] == 0.75 and ends[-1][1] == 1.0
    ranked = items[2]["rationales"]
    assert [(r["rank"], r["answer"], r["posterior"], r["correct"]) for r in ranked] == [
        (1, "2", 0.3, False), (2, "2", 0.3, False), (3, "2", 0.3, False), (4, "1", 0.1, True),
    ]  # fmt: skip


def test_another_ranker_chooses_otherwise(tmp_path: Path) -> None:
    records = [record("a", k, "1" if k == 2 else "2", k == 2, reward=float(k)) for k in range(3)]
    folder = store_of(tmp_path / "s", records)
    assert build([folder]).report.items[0]["kind"] == "not_chosen"
    assert build([folder], config=ReportConfig(method="best_of_n_reward")).report.items[0]["kind"] == "right"


def test_what_the_page_leaves_out_is_whole_in_the_file_beside_it(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "r.html"
    written = write(build([store], config=ReportConfig(items=5)), path)
    assert written.rest == str(tmp_path / "out" / "r.problems.jsonl") and written.rest_problems == 19
    lines = [json.loads(line) for line in Path(written.rest).read_text().splitlines()]
    everything = {r.problem_id for r in SampleStore(store).records()}
    assert len(lines) == 19 and {line["id"] for line in lines} < everything
    assert (
        lines[-1]["rationales"][0]["trace"] == "So it is."
        and lines[-1]["rationales"][0]["answer_text"] == " 1"
    )
    assert "r.problems.jsonl" in path.read_text()
    assert write(build([store]), path).rest is None
    assert sorted(p.name for p in path.parent.iterdir()) == ["r.html"]


def test_the_page_has_a_limit_in_bytes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_reason.evaluation.report.building.ITEM_BYTES", 4000)
    built = build([store])
    assert 1 <= len(built.report.items) < 8
    assert len(built.report.items) + len(built.left_out) == 24


# ------------------------------------------------------------------------------------------------------ page


class Reader(HTMLParser):
    """Tags in order, text of the scripts by id, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._script = dict(attrs).get("id") or "code" if tag == "script" else None
        if self._script:
            self.scripts[self._script] = ""

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] += data


def test_hostile_text_stays_text(tmp_path: Path, store: Path) -> None:
    title = f"T {HOSTILE[0]} {HOSTILE[1]}"
    evil = store_of(tmp_path / "</title><script>", hostile())
    page = html(build([evil, store], config=ReportConfig(title=title)).report)
    page.encode()  # no half of a pair is left
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\u200f\u2028\u2029\ufeff]", page)
    reader = Reader(page)
    plain = Reader(
        html(build([store, store_of(tmp_path / "b", votes("sum/0", ["1"] * 4, weights="b"))]).report)
    )
    assert set(reader.tags) == set(plain.tags) and "img" not in reader.tags
    assert not [a for a in reader.attributes if a[1].startswith("on") or a[1] in ("src", "srcset", "style")]
    items = json.loads(reader.scripts["items-data"])["items"]
    assert any(i["question"] == HOSTILE[0] for i in items)  # nothing is lost either
    assert any(visible(HOSTILE[2]) == i["question"] for i in items)


def test_the_page_fetches_nothing_and_runs_one_script(store: Path) -> None:
    page = html(build([store]).report)
    reader = Reader(page)
    links = [
        value
        for _, name, value in reader.attributes
        if name in ("href", "src", "action", "data", "xlink:href")
    ]
    assert all(link and link.startswith("#") for link in links)
    assert "url(" not in page and "@import" not in page and "http" not in re.sub("http-equiv", "", page)
    policy = next(v for _, n, v in reader.attributes if n == "content" and v and "script-src" in v)
    digest = base64.b64encode(hashlib.sha256(reader.scripts["code"].encode()).digest()).decode()
    assert (
        f"script-src 'sha256-{digest}'" in policy
        and "default-src 'none'" in policy
        and "unsafe" not in policy
    )


def test_ids_are_unique_and_pictures_have_names(store: Path) -> None:
    reader = Reader(html(build([store]).report))
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for _, name, value in reader.attributes:
        if name == "aria-labelledby":
            assert set((value or "").split()) <= set(ids)


def test_the_figures_of_the_page_are_in_it_as_json(store: Path) -> None:
    built = build([store])
    reader = Reader(html(built.report))
    data = json.loads(reader.scripts["plot-0-0-data"])
    assert sum(data["n"]) == 24 and len(data["edges"]) == 16
    assert json.loads(reader.scripts["report-data"])["tasks"][0]["rows"][0]["estimate"]["n"] == 96


# ------------------------------------------------------------------------------------------------- writing


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm_reason.atomic.os.replace", fails)
    with pytest.raises(OSError):
        write(build([store]), path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir() if p.is_file()] == ["r.html"]


def test_the_command_prints_one_json_object(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.html"
    assert main(["report", str(store), "-o", str(path), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["path"] == str(path) and result["bytes"] == path.stat().st_size
    rows = {row["key"]: row["estimate"]["value"] for row in result["tasks"][0]["rows"]}
    assert rows["pass@4"] == pytest.approx(20 / 24) and rows["truncated"] == pytest.approx(3 / 96)
    assert "parts" not in json.dumps(result)


def test_the_command_prints_a_table(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(store), "-o", str(tmp_path / "r.html"), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "accuracy of a sample" in out and f"written {tmp_path / 'r.html'}" in out
    assert "caution: Only 24 problems" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NOWHERE"], "no samples in 'NOWHERE'; draw some first (vlm-reason sample), or import some"),
        (["EMPTY"], "empty'; draw some first (vlm-reason sample), or import some"),
        (["STORE", "--method", "majorty"], "unknown ranking method 'majorty'; did you mean 'majority'?"),
        (["STORE", "--method", "mixture"], "mixture needs logp_answer"),
        (["STORE", "--target-risk", "2"], "target risk must be between 0 and 1, got 2"),
        (["STORE", "--items", "-1"], "items must be >= 0, got -1"),
        (["STORE", "-o", "."], "'.' is a folder; give a file such as 'report.html'"),
        (["STORE", "--ood", "OTHER"], "were drawn by other weights (b) than those in"),
        (["STORE", "--tokenizer", "no/such"], "no/such"),
    ],
)
def test_bad_input_is_one_line(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    other = store_of(tmp_path / "other", votes("x", ["1", "2"], weights="b"))
    empty = tmp_path / "empty"  # what a writer that was stopped before its first sample leaves
    empty.mkdir()
    (empty / "segment-0-0-0.jsonl").touch()
    known = {"STORE": str(store), "OTHER": str(other), "EMPTY": str(empty)}
    extra = [] if "-o" in arguments else ["-o", str(tmp_path / "r.html")]
    assert main(["report", *(known.get(a, a) for a in arguments), *extra, "--quiet"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_too_many_systems_are_refused(tmp_path: Path) -> None:
    records = [r for i in range(7) for r in votes("a", ["1", "2"], weights=f"w{i}")]
    with pytest.raises(UserError, match="7 systems in these stores .*; a report takes at most 6"):
        build([store_of(tmp_path / "s", records)])


def test_options_with_probabilities_are_confidence_and_disagreement(tmp_path: Path) -> None:
    """Two members: both (0.8, 0.2) on even problems; (0.9, 0.1) and (0.1, 0.9) on odd ones."""
    import dataclasses

    records = []
    for i in range(20):
        for m in range(2):
            p = (0.8, 0.2) if i % 2 == 0 else ((0.9, 0.1), (0.1, 0.9))[m]
            r = record(f"c{i}", 0, "AB"[p[1] > p[0]], p[0] > p[1], reference="A", member=m, weights=f"w{m}")
            extra = {"choice_logps": [math.log(x) for x in p], "choice_gold": 0}
            records.append(dataclasses.replace(r, extra=extra))
    figures = {f.kind: f for f in build([store_of(tmp_path / "s", records)]).report.tasks[0].figures}
    assert figures["reliability"].data["of"] == "choices"
    counts = figures["mutual_information"].data["counts"]
    assert sum(counts["right"]) + sum(counts["wrong"]) == 20
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert figures["mutual_information"].data["edges"][-1] == pytest.approx(math.log(2) - entropy)
    assert counts["right"][0] >= 10
