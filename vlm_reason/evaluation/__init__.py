"""How good is a model, and how sure is that? Everything is computed from stored samples; only drawing needs a
model."""

from .bound import BoundConfig, BoundResult, bound
from .harness import EvalConfig, EvalResult, compare, draw, evaluate, summarise
from .judging import answer_kind, make_judge
from .sampling import sample_into, stored

__all__ = [
    "BoundConfig",
    "BoundResult",
    "EvalConfig",
    "EvalResult",
    "answer_kind",
    "bound",
    "compare",
    "draw",
    "evaluate",
    "make_judge",
    "sample_into",
    "stored",
    "summarise",
]
