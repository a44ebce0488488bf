"""Where a step stands and what it trains on: pure functions of counters."""

from __future__ import annotations

import pytest

from vlm_reason.errors import UserError
from vlm_reason.traces import Component, Evidence, Phase, Recipe
from vlm_reason.traces.config import TraceConfig
from vlm_reason.traces.order import place_of, step_members, window_problems
from vlm_reason.traces.recipe import deal
from vlm_reason.types import Coefficients


def two_phases() -> Recipe:
    def weigh(scores, state):
        return Coefficients(), state

    return Recipe("two", (Phase("a", weigh, windows=2), Phase("b", weigh, evidence=Evidence("one"))))


def config(tmp_path, **values) -> TraceConfig:
    return TraceConfig(output_dir=str(tmp_path), use_cpu=True, **values)


def test_every_step_has_one_place_and_phases_take_turns(tmp_path):
    args = config(tmp_path, rounds=2, prompts_per_window=10, prompts_per_step=4, window_epochs=2)
    recipe = two_phases()
    assert args.steps_per_window() == 6  # ceil(10 / 4) steps, twice
    places = [place_of(step, args, recipe) for step in range(args.total_steps(recipe))]
    assert len(places) == 2 * 3 * 6
    assert [p.window for p in places] == [w for w in range(6) for _ in range(6)]
    assert [p.phase for p in places[::6]] == [0, 0, 1, 0, 0, 1]
    assert [p.round for p in places[::6]] == [0, 0, 0, 1, 1, 1]
    assert [p.position for p in places[:6]] == list(range(6))


def test_windows_walk_every_problem_once_a_pass_in_a_fresh_order():
    seen = [window_problems(w, 4, 10, run_seed=3) for w in range(5)]  # 20 problems: two passes over 10
    flat = [item for window in seen for item in window]
    for visit in (0, 1):
        assert sorted(i for i, v in flat if v == visit) == list(range(10))
    first, second = [i for i, v in flat if v == 0], [i for i, v in flat if v == 1]
    assert first != second
    assert seen == [window_problems(w, 4, 10, run_seed=3) for w in range(5)]
    assert [i for i, _ in window_problems(0, 10, 10, 3)] != [i for i, _ in window_problems(0, 10, 10, 4)]


def test_an_epoch_deals_every_group_once_and_later_epochs_in_another_order():
    steps, epochs, groups = 6, 2, 10
    first = [g for p in range(3) for g in step_members(p, groups, steps, epochs, window=1, run_seed=0)]
    second = [g for p in range(3, 6) for g in step_members(p, groups, steps, epochs, window=1, run_seed=0)]
    assert first == list(range(groups))
    assert sorted(second) == first and second != first
    sizes = [len(step_members(p, groups, steps, epochs, 1, 0)) for p in range(3)]
    assert max(sizes) - min(sizes) <= 1


def test_traces_are_dealt_by_share_with_the_largest_remainder():
    prior, hinted = Component("reasoner", "prior", 0.5), Component("posterior", "hinted", 0.5)
    assert deal([prior, hinted], 4) == [prior, prior, hinted, hinted]
    third, rest = Component("reasoner", "prior", 1.0), Component("posterior", "hinted", 2.0)
    assert [c.adapter for c in deal([third, rest], 4)] == ["reasoner", "posterior", "posterior", "posterior"]
    with pytest.raises(UserError, match="leave none for the proposal component 'reasoner/prior'"):
        deal([Component("reasoner", "prior", 0.05), hinted], 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"traces_per_prompt": 0}, r"traces_per_prompt \(K\) must be >= 1, got 0"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"prompts_per_step": 65}, r"prompts_per_step \(65\) exceeds prompts_per_window \(64\)"),
        ({"gradient_accumulation_steps": 4}, "must stay 1"),
        ({"loss_scale": 0.0}, "loss_scale must be > 0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **values)
