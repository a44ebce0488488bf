"""One window ahead, without a model: shares put together, and the recipes that have no place for the staleness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.unit.traces_parts import TEMPLATE, group, problem
from vlm_reason.errors import UserError
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.traces import Phase, Recipe, TraceConfig, build
from vlm_reason.traces.ahead import Drawn, check_ahead, gathered, is_whole, own_share
from vlm_reason.traces.distributed import Ranks
from vlm_reason.traces.recipe import DATASET, FROZEN, Proposal


@dataclass(frozen=True)
class Gathered(Ranks):
    """As if the processes had returned `shares`."""

    shares: tuple[Any, ...] = ()

    def together(self, work: Callable[[], Any]) -> list[Any]:
        return list(self.shares)


@pytest.fixture
def window(tiny_tokenizer) -> Drawn:
    prompts = PromptBuilder(tiny_tokenizer, TEMPLATE)
    groups = tuple(group(prompts, problem(i), [f" {i}"]) for i in range(5))
    return Drawn(3, 8, tuple(range(5)), groups, discarded=7)


def test_shares_come_together_as_the_window(window):
    shares = tuple(own_share(window, Ranks(rank, 2)) for rank in range(2))
    assert [share.indices for share in shares] == [(0, 2, 4), (1, 3)]
    assert gathered(shares[0], Gathered(0, 2, shares)) == window
    assert is_whole(window, 5)


def test_where_one_process_has_nothing_there_is_no_window(window):
    """The others' problems would be saved as all of it, and the rest never trained."""
    share = own_share(window, Ranks(0, 2))
    for shares in ((share, None), (None, share), (None, None)):
        assert gathered(share, Gathered(0, 2, shares)) is None
    assert not is_whole(share, 5) and not is_whole(window, 6)
    assert not is_whole(replace(window, indices=(0, 1, 2, 3, 3)), 5)


def refusal(phase: Phase, folder, **args) -> str | None:
    config = TraceConfig(output_dir=str(folder), use_cpu=True, rollout_ahead=1, **args)
    try:
        check_ahead(Recipe("own", (phase,)), config)
    except UserError as error:
        return str(error)
    return None


GRPO = build("grpo").phases[0]


@pytest.mark.parametrize(
    ("changes", "args", "says"),
    [
        ({}, {}, None),
        ({"off_policy": True}, {}, None),
        ({"off_policy": True, "targets": "gold"}, {}, "tokens that the sampler did not draw"),
        ({"off_policy": True}, {"top_p": 0.9}, "temperature 1 and top-p 1"),
        ({"proposal": FROZEN}, {}, "tokens that the sampler did not draw"),
        ({"proposal": Proposal(dataset=True)}, {}, "tokens that the sampler did not draw"),
        ({"proposal": Proposal(greedy=True)}, {}, "temperature 1 and top-p 1"),
        ({"proposal": DATASET}, {}, None),  # nothing is drawn, ahead or not
        ({}, {"proposal_shots": 2, "proposal_shot_rounds": 1}, "(proposal_shots 2, shots 0): set it to 0"),
        ({}, {"proposal_shots": 2, "proposal_shot_rounds": 0}, None),
        ({}, {"proposal_shots": 2, "proposal_shot_rounds": 1, "shots": 2}, None),
        (
            {"clip": None, "off_policy": True},
            {"proposal_shots": 2, "proposal_shot_rounds": 1, "temperature": 0.7},
            None,
        ),
        ({"clip": None}, {}, "neither their ratio nor a clip"),
    ],
)
def test_a_clip_must_be_around_what_the_sampler_drew(tmp_path, changes, args, says):
    found = refusal(replace(GRPO, **changes), tmp_path, **args)
    assert found is None if says is None else found is not None and says in found and "\n" not in found
