"""The exact engine: samples have the table's frequencies, do not depend on the batch, and score as the world says."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import scipy.stats
import torch

from vlm_reason.engines.base import Engine, Law, SampleRequest, ScoreRequest, StopRule
from vlm_reason.engines.exact import ExactEngine, ExactPrompts
from vlm_reason.engines.rollout import Draw, roll_out
from vlm_reason.engines.seeds import counter_seed
from vlm_reason.errors import UserError
from vlm_reason.exact import EnumerableWorld

WORLD = EnumerableWorld.random(vocab=2, max_tokens=3, answers=3, seed=2)
ENGINE = ExactEngine(WORLD)


def requests(
    prompt: tuple[int, ...], count: int, law: Law | None = None, cap: int = 4
) -> list[SampleRequest]:
    seeds = [counter_seed(0, "prior", 0, "p", k=k) for k in range(count)]
    return [SampleRequest(prompt, seed, cap, law or Law()) for seed in seeds]


def p_value(counts: Counter, expected: dict, total: int) -> float:
    assert set(counts) <= {key for key, p in expected.items() if p > 0}
    keys = [k for k, p in expected.items() if p * total >= 5]
    rest_seen = total - sum(counts[k] for k in keys)
    rest = total * (1 - sum(expected[k] for k in keys))
    seen, mean = [counts[k] for k in keys], [expected[k] * total for k in keys]
    if rest > 1e-6:
        seen, mean = [*seen, rest_seen], [*mean, rest]
    return scipy.stats.chisquare(seen, mean).pvalue


@pytest.mark.parametrize("prompt", ["prior", "hinted"])
def test_trace_frequencies(prompt: str) -> None:
    ids = WORLD.prior_prompt if prompt == "prior" else WORLD.hinted_prompt(2)
    law = WORLD.logp_prior() if prompt == "prior" else WORLD.logq(2)
    drawn = ENGINE.sample(requests(ids, 4000))
    expected = {(*z, 2): p for z, p in zip(WORLD.strings.symbols, law.exp().tolist(), strict=True)}
    assert p_value(Counter(c.ids for c in drawn), expected, 4000) > 0.001
    table = dict(zip(expected, law.tolist(), strict=True))
    for c in drawn[:50]:
        assert c.finish == "stop" and c.complete
        assert sum(c.logps) == pytest.approx(table[c.ids], abs=1e-12)
        assert c.text == WORLD.decode(c.ids)


def test_answer_frequencies_behind_a_trace() -> None:
    context = (*WORLD.prior_prompt, 1, 0, WORLD.strings.end)
    drawn = ENGINE.sample(requests(context, 3000))
    row = WORLD.logp_answers()[WORLD.strings.index[(1, 0)]].exp().tolist()
    expected = {(WORLD.answer_id(a),): p for a, p in enumerate(row)}
    assert p_value(Counter(c.ids for c in drawn), expected, 3000) > 0.001


def test_batch_order_and_size_do_not_matter() -> None:
    asked = requests(WORLD.prior_prompt, 40) + requests(
        WORLD.hinted_prompt(0), 20, Law(temperature=0.7, top_p=0.8)
    )
    together = ENGINE.sample(asked)
    order = torch.randperm(len(asked)).tolist()
    shuffled = ENGINE.sample([asked[i] for i in order])
    assert [shuffled[order.index(i)] for i in range(len(asked))] == together
    assert [ENGINE.sample([r])[0] for r in asked] == together
    assert [c.seed for c in together] == [r.seed for r in asked]


def test_temperature_and_top_p() -> None:
    row = WORLD.laws.prior()[0].detach()
    hot = (row / 2.0).softmax(0)
    drawn = ENGINE.sample(requests(WORLD.prior_prompt, 3000, Law(temperature=2.0), cap=1))
    assert p_value(Counter(c.ids[0] for c in drawn), dict(enumerate(hot.tolist())), 3000) > 0.001
    # The two likeliest tokens suffice for their own mass, and one for a little less than its own.
    ordered = row.softmax(0).sort(descending=True)
    p, tokens = ordered.values.tolist(), ordered.indices.tolist()
    for top_p, kept in ((p[0] - 1e-9, 1), (p[0] + 1e-9, 2), (p[0] + p[1] - 1e-9, 2), (0.9999999, 3)):
        scores = [
            ENGINE.score([ScoreRequest(WORLD.prior_prompt, (t,), Law(top_p=top_p))])[0][0] for t in tokens
        ]
        mass = sum(p[:kept])
        expected = [math.log(x / mass) if i < kept else -math.inf for i, x in enumerate(p)]
        assert scores == pytest.approx(expected, abs=1e-9)


def test_top_p_keeps_ties_at_the_boundary() -> None:
    strings = WORLD.strings
    flat = EnumerableWorld.from_tables(
        strings,
        torch.zeros(strings.open_prefixes, 3),
        torch.zeros(3, strings.open_prefixes, 3),
        torch.zeros(15, 3),
    )
    scores = ExactEngine(flat).score(
        [ScoreRequest(flat.prior_prompt, (t,), Law(top_p=0.4)) for t in range(3)]
    )
    assert [s[0] for s in scores] == pytest.approx([-math.log(3)] * 3)


def test_greedy_keeps_the_untempered_log_probabilities() -> None:
    first, second = ENGINE.sample(requests(WORLD.prior_prompt, 2, Law(temperature=0.0)))
    assert first.ids == second.ids
    table = WORLD.laws.prior()
    assert first.ids[0] == int(table[0].argmax())
    assert first.logps[0] == pytest.approx(table[0].max().item())


def test_scores_are_the_worlds() -> None:
    full = (1, 1, 0, 2, WORLD.answer_id(1))
    logps = ENGINE.score([ScoreRequest(WORLD.prior_prompt, full)])[0]
    z = WORLD.strings.index[(1, 1, 0)]
    assert logps[:4] == pytest.approx(WORLD.token_logps_prior()[z].tolist())
    assert logps[3] == 0.0  # the end is forced
    assert logps[4] == pytest.approx(WORLD.logp_answers()[z, 1].item())
    behind = ENGINE.score([ScoreRequest((*WORLD.prior_prompt, 1, 1), (0, 2, WORLD.answer_id(1)))])[0]
    assert behind == logps[2:]


def test_caps_stop_strings_and_eos() -> None:
    seeds = range(200)
    cut = ENGINE.sample([SampleRequest(WORLD.prior_prompt, s, 1) for s in seeds])
    assert {(c.finish, c.ids[-1] == 2) for c in cut} == {("stop", True), ("length", False)}
    until_a = ENGINE.sample([SampleRequest(WORLD.prior_prompt, s, 9, stop=StopRule(("a",))) for s in seeds])
    assert all(c.finish == "stop" and (c.text.endswith("a") or c.text.endswith(".")) for c in until_a)
    assert all("a" not in c.text[:-1] for c in until_a)
    as_eos = ENGINE.sample([SampleRequest(WORLD.prior_prompt, s, 9, stop=StopRule(eos=(2,))) for s in seeds])
    assert {c.finish for c in as_eos} == {"eos"}
    closing = StopRule(eos=(2,), eos_is_stop=True)
    assert {c.finish for c in ENGINE.sample([SampleRequest(WORLD.prior_prompt, 1, 9, stop=closing)])} == {
        "stop"
    }


def test_adapters_have_their_own_worlds_and_moves_are_seen() -> None:
    other = EnumerableWorld.random(vocab=2, max_tokens=3, answers=3, seed=5)
    engine = ExactEngine(WORLD, {"posterior": other})
    target = (0, 2)
    z = WORLD.strings.index[(0,)]
    ask = [ScoreRequest(WORLD.hinted_prompt(1), target, Law(a)) for a in ("posterior", "reasoner", None)]
    sums = [sum(s) for s in engine.score(ask)]
    assert sums == pytest.approx([other.logq(1)[z].item(), *[WORLD.logq(1)[z].item()] * 2])
    with torch.no_grad():
        other.laws.posterior_logits[1, 0, 0] += 1.0  # type: ignore[attr-defined]
    assert sum(engine.score(ask[:1])[0]) == pytest.approx(other.logq(1)[z].item())
    assert other.logq(1)[z].item() != pytest.approx(sums[0])
    with pytest.raises(UserError, match="'posterior' has another vocabulary"):
        ExactEngine(WORLD, {"posterior": EnumerableWorld.random(vocab=3, max_tokens=3, answers=3)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ENGINE.sample([SampleRequest((), 0, 4)]), "neither the prior prompt"),
        (lambda: ENGINE.sample([SampleRequest((0, 1), 0, 4)]), "neither the prior prompt"),
        (lambda: ENGINE.sample([SampleRequest(WORLD.prior_prompt, 0, 0)]), "max_tokens must be >= 1"),
        (lambda: ENGINE.sample([SampleRequest((*WORLD.prior_prompt, 2, 3), 0, 4)]), "ends with an answer"),
        (lambda: ENGINE.score([ScoreRequest(WORLD.prior_prompt, (0, 0, 0, 0))]), "cannot follow trace"),
        (lambda: ENGINE.score([ScoreRequest(WORLD.prior_prompt, (2, 0))]), "only an answer can"),
        (lambda: ENGINE.score([ScoreRequest(WORLD.prior_prompt, (2, 3, 3))]), "behind the answer"),
    ],
)
def test_impossible_requests_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_roll_out_draws_traces_and_answers() -> None:
    assert isinstance(ENGINE, Engine)
    problems = [WORLD.problem(1, f"p{i}") for i in range(400)]
    plan = [Draw(), Draw("posterior/hinted", "posterior", hinted=True)]
    groups = roll_out(
        ENGINE,
        ExactPrompts(WORLD),
        problems,
        plan,
        run_seed=3,
        stream="prior",
        max_trace_tokens=8,
        max_answer_tokens=1,
        answers_per_trace=2,
    )
    right = [a.text == "B" for g in groups for a in g.traces[0].answers]
    P = WORLD.log_marginal(1).exp().item()
    assert len(right) == 800
    assert sum(right) / 800 == pytest.approx(P, abs=4 * math.sqrt(P * (1 - P) / 400))
    assert all(g.traces[1].prompt_ids == WORLD.hinted_prompt(1) and g.traces[1].saw_answer for g in groups)
    assert all(t.complete for g in groups for t in g.traces)
