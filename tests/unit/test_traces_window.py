"""A window from sampling to rows: dealing, given traces, chains, and what happens to a group without signal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.traces_parts import TEMPLATE, adapted, group, problem
from vlm_reason.engines.base import EngineLost, Law, SampleRequest, ScoreRequest
from vlm_reason.engines.hf import HFEngine
from vlm_reason.errors import UserError
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.tasks.verifiers import make_verifier
from vlm_reason.traces import Component, Evidence, Phase, Proposal, TraceConfig, build
from vlm_reason.traces.recipe import EMPTY, HINTED, PRIOR, deal
from vlm_reason.traces.replay import ChainMemory
from vlm_reason.traces.window import WindowMaker
from vlm_reason.types import Coefficients, Completion

EASY, HARD = problem(1, rationale="1 and 2"), problem(4, rationale="4 and 5")


class ScriptedEngine:
    """Reasons "z<k>" with k counted per prompt; answers 3 (right for EASY), or whatever hint its trace was shown."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.sampled: list[str] = []

    def sample(self, requests: Sequence[SampleRequest], progress: str | None = None) -> list[Completion]:
        return [self._one(request) for request in requests]

    def _one(self, request: SampleRequest) -> Completion:
        prompt = self.tokenizer.decode(list(request.prompt_ids))
        self.sampled.append(prompt)
        if prompt.endswith("a:"):
            trace = prompt.splitlines()[-2]
            text = f" {trace.rpartition('#')[2]}\n" if "#" in trace else " 3\n"
        else:
            _, *hint = prompt.rstrip("=").split("=")
            text = f" h{len(self.sampled)}#{hint[0]}\n" if hint else f" z{len(self.sampled)}\n"
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return Completion(ids, (-1.0,) * len(ids), text, "stop", request.seed)

    def score(self, requests: Sequence[ScoreRequest], progress: str | None = None) -> list[tuple[float, ...]]:
        return [(-1.0,) * len(r.target_ids) for r in requests]


@pytest.fixture
def prompts(tiny_tokenizer) -> PromptBuilder:
    return PromptBuilder(tiny_tokenizer, TEMPLATE)


@pytest.fixture
def scripted(tiny_tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tiny_tokenizer)


def maker(engine, folder, verifier="number", **values) -> WindowMaker:
    config = TraceConfig(output_dir=str(folder), use_cpu=True, **values)
    return WindowMaker(engine, config, make_verifier(verifier) if verifier else None, 0, None, False)


def make(m: WindowMaker, phase: Phase, prompts, problems=(EASY, HARD), traces=2, memory=None, visits=None):
    memory = ChainMemory() if memory is None else memory
    return m.make(
        0, 0, phase, list(problems), visits or [0] * len(problems), traces, 5, {}, memory, prompts, prompts
    )


# ---- groups without signal -------------------------------------------------------------------------------------


def test_skip_counts_the_group_and_trains_nothing_on_it(scripted, prompts, tmp_path):
    window, _ = make(maker(scripted, tmp_path), build("rft").phases[0], prompts)
    assert [len(rows) for rows in window.rows] == [2, 0]
    assert window.counts == (1, 1)
    assert window.metrics["null_rate"] == 0.5
    assert window.metrics["accuracy"] == 0.5
    x = prompts.prior_ids(EASY)
    assert all(row.context == x and row.weight[0] == 0.5 for row in window.rows[0])


def test_renormalise_leaves_the_group_out_of_the_mean(scripted, prompts, tmp_path):
    phase = build("rft", {"null_group": "renormalise"}).phases[0]
    window, _ = make(maker(scripted, tmp_path), phase, prompts)
    assert [len(rows) for rows in window.rows] == [2, 0]
    assert window.counts == (1, 0)
    assert window.metrics["null_rate"] == 0.5


def test_dataset_trains_on_the_problems_own_rationale(scripted, prompts, tmp_path):
    phase = build("rft", {"null_group": "dataset"}).phases[0]
    window, _ = make(maker(scripted, tmp_path), phase, prompts)
    assert [len(rows) for rows in window.rows] == [2, 1]
    assert window.counts == (1, 1)
    (row,) = window.rows[1]
    z, y = prompts.trace_ids("4 and 5"), prompts.answer_ids("9")
    assert row.context == prompts.prior_ids(HARD)
    assert row.target == (*z, *prompts.cue_ids, *y)
    assert set(row.weight) == {0.0, 1.0} and row.useful == len(z) + len(y)
    with pytest.raises(UserError, match="'p4' has no rationale"):
        make(maker(scripted, tmp_path), phase, prompts, [EASY, problem(4)])


def test_hint_retry_draws_the_hard_problems_again_behind_the_hint(scripted, prompts, tmp_path):
    phase = build("rft", {"null_group": "hint_retry"}).phases[0]
    window, _ = make(maker(scripted, tmp_path), phase, prompts)
    assert [len(rows) for rows in window.rows] == [2, 2]
    assert window.counts == (1, 1)
    assert window.metrics["null_rate"] == 0.0
    assert [c["proposal"] for c in window.completions] == ["base/prior"] * 2 + ["reasoner/hinted"] * 2
    assert [c["correct"] for c in window.completions[2:]] == [[True], [True]]
    for row, sample in zip(window.rows[1], window.completions[2:], strict=True):
        assert row.context == prompts.prior_ids(HARD)  # drawn behind the hint, trained without it
        assert list(row.target[: len(sample["ids"])]) == sample["ids"]
    # 4 traces and answers at first, 2 more behind the hint: what was thrown away has been paid for as well
    written = sum(len(c["ids"]) for c in window.completions) + 2 * len(prompts.trace_ids("z3"))
    assert window.metrics["tokens/generated"] == written + 6 * len(prompts.answer_ids("3"))
    assert scripted.sampled.count("4+5=9=") == 2 and scripted.sampled.count("1+2=3=") == 0


def test_hint_retry_needs_a_verifier(scripted, prompts, tmp_path):
    phase = build("rft", {"null_group": "hint_retry"}).phases[0]
    with pytest.raises(UserError, match="null_group hint_retry needs a verifier"):
        make(maker(scripted, tmp_path, verifier=None), phase, prompts)


# ---- who draws -------------------------------------------------------------------------------------------------


@given(
    shares=st.lists(st.floats(0.05, 5.0), min_size=1, max_size=4),
    traces=st.integers(1, 40),
)
def test_a_deal_is_within_one_trace_of_the_shares(shares, traces):
    components = [Component("reasoner", "prior", share) for share in shares]
    exact = [share / sum(shares) * traces for share in shares]
    try:
        dealt = deal(components, traces)
    except UserError as error:
        assert min(exact) < 1 and "raise traces_per_prompt or its share" in str(error)
        return
    counts = [sum(c is own for c in dealt) for own in components]
    assert sum(counts) == len(dealt) == traces
    assert all(abs(n - e) < 1 + 1e-9 for n, e in zip(counts, exact, strict=True))
    assert [id(c) for c in dealt] == [
        id(c) for c, n in zip(components, counts, strict=True) for _ in range(n)
    ]


def test_a_mixture_shows_the_hint_to_the_hinted_traces_only(scripted, prompts, tmp_path):
    phase = replace(
        build("maxrl").phases[0],
        proposal=Proposal((Component("reasoner", "prior", 1), Component("posterior", "hinted", 2))),
    )
    window, _ = make(maker(scripted, tmp_path), phase, prompts, [HARD], traces=3)
    assert [c["proposal"] for c in window.completions] == ["reasoner/prior"] + ["posterior/hinted"] * 2
    assert [c["correct"] for c in window.completions] == [[False], [True], [True]]
    assert window.metrics["unhinted_accuracy"] == 0.0 and window.metrics["accuracy"] == pytest.approx(2 / 3)
    assert window.metrics["answer_copied"] == 1.0


def test_given_traces_are_at_most_k_of_the_list_or_the_one_rationale(scripted, prompts, tmp_path):
    many = problem(1, traces=["a", "b", "c"])
    phase = build("sft").phases[0]
    window, _ = make(maker(scripted, tmp_path), phase, prompts, [many, HARD])
    assert scripted.sampled == []
    z = [row.target[: len(prompts.trace_ids("a"))] for row in window.rows[0]]
    assert z == [prompts.trace_ids("a"), prompts.trace_ids("b")]
    assert len(window.rows[1]) == 1 and window.rows[1][0].weight[0] == 1.0
    assert window.metrics["tokens/generated"] == 0


def test_without_a_trace_the_answer_alone_is_trained(scripted, prompts, tmp_path):
    phase = build("sft", {"trace": False}).phases[0]
    assert phase.proposal == EMPTY
    window, _ = make(maker(scripted, tmp_path), phase, prompts, [HARD])
    (row,) = window.rows[0]
    y = prompts.answer_ids("9")
    assert (*row.context, *row.target) == (*prompts.direct_ids(HARD), *y)
    assert row.useful == len(y)


# ---- numbers that ride along -----------------------------------------------------------------------------------


def test_rows_of_a_clipped_and_regularised_phase_carry_both_references(
    tiny_llama, tiny_tokenizer, prompts, tmp_path
):
    engine = HFEngine(adapted(tiny_llama), tiny_tokenizer)
    recipe = build("grpo", {"kl": 0.1})
    phase = replace(
        recipe.phases[0], evidence=Evidence("logp"), targets="gold",
        weigh=lambda s, state: (Coefficients(c_z=torch.ones_like(s.logq), c_y=torch.ones_like(s.logp_answer)), state),
    )  # fmt: skip
    window, _ = make(maker(engine, tmp_path, max_trace_tokens=6), phase, prompts)
    rows = [row for group in window.rows for row in group]
    assert len(rows) == 4
    for row in rows:
        own, base = (
            engine.score([ScoreRequest(row.context, row.target, Law(name))])[0] for name in ("reasoner", None)
        )
        assert row.old == pytest.approx(own, abs=1e-3) and row.ref == pytest.approx(base, abs=1e-3)
        assert max(abs(a - b) for a, b in zip(own, base, strict=True)) > 1e-2


def test_coefficients_that_are_not_finite_stop_the_run(scripted, prompts, tmp_path):
    phase = Phase("odd", lambda s, state: (Coefficients(c_z=s.logq / 0), state), proposal=PRIOR)
    with pytest.raises(ValueError, match="phase 'odd': weigh returned a non-finite c_z"):
        make(maker(scripted, tmp_path), phase, prompts)


def test_weigh_sees_one_stable_key_a_problem_and_its_state_comes_back(scripted, prompts, tmp_path):
    seen = []

    def weigh(scores, state):
        seen.append(scores.problem.tolist())
        return Coefficients(c_z=scores.mask.float()), {"calls": state.get("calls", 0) + 1}

    phase = Phase("keys", weigh, proposal=HINTED)
    m = maker(scripted, tmp_path)
    _, state = make(m, phase, prompts)
    make(m, phase, prompts, [HARD, EASY])
    assert state == {"calls": 1}
    assert seen[0] == seen[1][::-1] and len(set(seen[0])) == 2


# ---- chains ----------------------------------------------------------------------------------------------------


def test_a_chain_survives_json_and_stands_in_front_of_fresh_traces(prompts):
    memory = ChainMemory()
    old = group(prompts, EASY, [" old"], answers=[["3"]])
    memory.store(replace(old.traces[0], policy_version=7))
    again = ChainMemory.from_json(json.loads(json.dumps(memory.to_json())))
    fresh = group(prompts, EASY, [" new", " newer"])
    for m in (memory, again):
        extended = m.extend(fresh)
        assert [(t.k, t.proposal) for t in extended.traces] == [
            (0, "chain"), (1, "reasoner/prior"), (2, "reasoner/prior"),
        ]  # fmt: skip
        assert extended.traces[0] == replace(old.traces[0], policy_version=7, proposal="chain")
        assert [t.completion for t in extended.traces[1:]] == [t.completion for t in fresh.traces]
        other = group(prompts, HARD, [" x"])
        assert m.extend(other) is other
    assert len(again) == 1


def test_a_right_draw_becomes_the_chain_and_comes_back_at_the_next_visit(scripted, prompts, tmp_path):
    m, phase, memory = maker(scripted, tmp_path), build("trice").phases[0], ChainMemory()
    make(m, phase, prompts, traces=1, memory=memory)
    assert [row["problem_id"] for row in memory.to_json()] == ["p1"]  # the hard one was never answered
    window, _ = make(m, phase, prompts, traces=1, memory=memory, visits=[1, 1])
    assert [(c["problem"], c["proposal"]) for c in window.completions] == [
        ("p1", "chain"), ("p1", "reasoner/prior"), ("p4", "reasoner/prior"),
    ]  # fmt: skip
    fresh = [c for c in window.completions if c["proposal"] != "chain"]
    answers = 2 * len(prompts.answer_ids("3"))
    assert window.metrics["tokens/generated"] == sum(len(c["ids"]) for c in fresh) + answers
    assert (
        window.metrics["unhinted_accuracy"] == 0.5
    )  # of the two fresh traces; the chain is right by selection
    assert window.metrics["accuracy"] == pytest.approx(2 / 3)


def test_a_window_that_fails_leaves_no_chain_behind(scripted, prompts, tmp_path):
    """The checkpoint of the step before it would hold chains of a visit that is drawn again."""
    phase, memory = replace(build("trice").phases[0], kl=0.1), ChainMemory()

    class Lost(ScriptedEngine):
        def score(self, requests, progress=None):
            if any(request.law.adapter is None for request in requests):
                raise EngineLost("gone")
            return super().score(requests, progress)

    with pytest.raises(EngineLost):
        make(maker(Lost(scripted.tokenizer), tmp_path), phase, prompts, traces=1, memory=memory)
    assert memory.to_json() == []
    make(maker(scripted, tmp_path), phase, prompts, traces=1, memory=memory)
    assert [row["problem_id"] for row in memory.to_json()] == ["p1"]
