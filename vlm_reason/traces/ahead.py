"""One window ahead: the next window is drawn while this one is trained on.

    window w   drawn with the weights of the step at which window w - 1 began to be trained (w = 0: the first weights)

The staleness is one window's steps. It enters the objective in the open: the traces' density r(z) is the sampler's, of
the weights that drew them; log pi(z|x) is scored with the weights of the step that begins the window; their ratio is in
the weights (`logq`), or in the clipped ratio of the tokens. A recipe that has neither is refused.

With vLLM, which has weights of its own, drawing overlaps with training. The `hf` engine samples with the weights in
training, so it draws the same traces before the first step, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ..engines.base import Closable, Engine
from ..errors import UserError
from ..types import Problem, TraceGroup
from .config import TraceConfig
from .distributed import Ranks
from .recipe import Phase, Recipe
from .replay import trace_from_json, trace_to_json


@dataclass(frozen=True)
class Drawn:
    """Groups of the window's problems `indices`, sampled by policy `version`; `discarded` tokens were thrown away."""

    window: int
    version: int
    indices: tuple[int, ...]
    groups: tuple[TraceGroup, ...]
    discarded: int = 0
    seconds: float = 0.0


class Ahead:
    """The window that is being drawn, or has been: at most one."""

    def __init__(self) -> None:
        self._window: int | None = None
        self._future: Future[Drawn] | None = None
        self._pool: ThreadPoolExecutor | None = None

    @property
    def window(self) -> int | None:
        """The window in hand, None for none."""
        return self._window

    def begin(self, window: int, draw: Callable[[], Drawn], overlap: bool) -> None:
        """Draw now, or (`overlap`) in a thread beside what this one does."""
        self._window = window
        if overlap:
            self._pool = self._pool or ThreadPoolExecutor(1, "rollout-ahead")
            self._future = self._pool.submit(draw)
            return
        self._future = Future()
        self._future.set_result(draw())

    def take(self, window: int) -> Drawn:
        """What was drawn of `window`, once it is there. Whatever failed in drawing it is raised here."""
        assert self._window == window and self._future is not None
        future, self._window, self._future = self._future, None, None
        return future.result()

    def held(self) -> Drawn | None:
        """What is in hand, once it is there, for a checkpoint; None for nothing, or for what failed: `take` says so."""
        if self._future is None or self._future.exception() is not None:
            return None
        return self._future.result()

    def drop(self, engine: Engine) -> None:
        """Nobody will take it: an engine that is drawing it in another thread is closed."""
        if self._future is not None and not self._future.done() and isinstance(engine, Closable):
            engine.close()

    def put(self, drawn: Drawn) -> None:
        """What a checkpoint held."""
        self.begin(drawn.window, lambda: drawn, overlap=False)


def gathered(drawn: Drawn | None, ranks: Ranks) -> Drawn | None:
    """The shares of all processes as one, in the window's order; None where one process has none (its draw failed): a
    part of a window would pass for all of it, so it is drawn again. Collective."""
    found = ranks.together(lambda: drawn)
    shares = [share for share in found if share is not None]
    if len(shares) < len(found):
        return None
    pairs = sorted(
        (pair for share in shares for pair in zip(share.indices, share.groups, strict=True)),
        key=lambda pair: pair[0],
    )
    return replace(
        shares[0],
        indices=tuple(i for i, _ in pairs),
        groups=tuple(group for _, group in pairs),
        discarded=sum(share.discarded for share in shares),
    )


def is_whole(drawn: Drawn, problems: int) -> bool:
    """Whether it has each of a window's `problems`, once."""
    return sorted(drawn.indices) == list(range(problems)) and len(drawn.groups) == problems


def own_share(drawn: Drawn, ranks: Ranks) -> Drawn:
    """Of a whole window, what this process measures; what was thrown away is counted once."""
    mine = set(ranks.share(len(drawn.indices)))
    kept = [(i, g) for i, g in zip(drawn.indices, drawn.groups, strict=True) if i in mine]
    return replace(
        drawn,
        indices=tuple(i for i, _ in kept),
        groups=tuple(g for _, g in kept),
        discarded=drawn.discarded if ranks.main else 0,
    )


def drawn_to_json(drawn: Drawn) -> dict[str, Any]:
    return {**vars(drawn), "groups": [[trace_to_json(t) for t in group.traces] for group in drawn.groups]}


def drawn_from_json(body: dict[str, Any], problems: Sequence[Problem]) -> Drawn:
    """`problems`: those of the run, by whose ids the groups find theirs."""
    by_id = {problem.id: problem for problem in problems}
    groups = []
    for rows in body["groups"]:
        traces = tuple(trace_from_json(row) for row in rows)
        groups.append(TraceGroup(by_id[traces[0].problem_id], traces))
    return Drawn(**{**body, "indices": tuple(body["indices"]), "groups": tuple(groups)})


def check_ahead(recipe: Recipe, args: TraceConfig) -> None:
    """UserError for a recipe whose objective has no place for the staleness."""
    if not args.rollout_ahead:
        return
    what = f"trainer.rollout_ahead is {args.rollout_ahead}, but"
    if recipe.reset == "base":
        raise UserError(f"{what} recipe {recipe.name!r} starts rounds anew from the base: set it to 0")
    if not args.reuse_logps:
        raise UserError(
            f"{what} trainer.reuse_logps is false: the density that drew a trace is then not known"
        )
    for phase in recipe.phases:
        if why := _no_place(phase, args):
            raise UserError(f"{what} phase {phase.name!r} of recipe {recipe.name!r} {why}: set it to 0")


def _no_place(phase: Phase, args: TraceConfig) -> str | None:
    components = phase.proposal.components
    if not components:
        return None  # nothing is drawn ahead
    if phase.clip is not None and (why := _clip_has_no_place(phase, args)):
        return why
    if phase.proposal.dataset or phase.proposal.empty or all(c.adapter == "base" for c in components):
        return None  # nothing that training changes is sampled
    if len(components) > 1:
        return "draws from a mixture, whose density would have to be scored with weights that are gone"
    if phase.proposal.chain or phase.null_group == "hint_retry":
        return "draws in a way that leaves the ratio open (a stored chain, a second draw behind the hint)"
    if phase.clip is None and not phase.off_policy:
        return "takes its traces for those of the current weights: it has neither their ratio nor a clip"
    return None


def _clip_has_no_place(phase: Phase, args: TraceConfig) -> str | None:
    """The clipped ratio is that of the trained tokens to the sampler's own numbers: the sampler must have drawn every
    one of them, behind the prompt that is trained, from pi itself."""
    proposal = phase.proposal
    temperatures = (0.0 if proposal.greedy else args.temperature, args.top_p, args.answer_temperature)
    if temperatures != (1.0, 1.0, 1.0):
        return "clips the ratio to the sampler's law, which must be that of temperature 1 and top-p 1"
    if (
        [c.name for c in proposal.components] != ["reasoner/prior"]
        or proposal.dataset
        or proposal.empty
        or phase.targets == "gold"
        or "posterior" in phase.trains
        or phase.null_group == "dataset"
    ):
        return "clips the ratio of tokens that the sampler did not draw"
    if args.proposal_shot_rounds and args.proposal_shots != args.shots:
        return (
            f"clips the ratio behind the trained prompt, and trainer.proposal_shot_rounds draws behind another one "
            f"(proposal_shots {args.proposal_shots}, shots {args.shots})"
        )
    return None
