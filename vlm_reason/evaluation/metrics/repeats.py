"""Several draws an item: is any right, are all right, is the best-scored one right?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from numpy.typing import ArrayLike

from ...stats import OnInvalid, mean_interval
from ...types import Estimate


def pass_at_k_of_item(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k draws is right) from n draws of which `correct` are (Chen et
    al. 2021, arXiv 2107.03374):

        1 - C(n - c, k) / C(n, k) = 1 - prod_{j = n-c+1}^{n} (1 - k / j)

    1 if n - c < k; NaN if k > n, because n draws say nothing of more than n."""
    _check_counts(n, correct, k)
    if k > n:
        return math.nan
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / j for j in range(n - correct + 1, n + 1))


def pass_hat_k_of_item(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(all of k draws are right): C(c, k) / C(n, k). NaN if k > n."""
    _check_counts(n, correct, k)
    return math.nan if k > n else math.comb(correct, k) / math.comb(n, k)


def pass_at_k(correct: Sequence[int], total: Sequence[int], k: int) -> Estimate:
    """Mean over items of `pass_at_k_of_item`, t interval over items. Items with fewer than k draws are
    dropped and counted in `n_dropped`."""
    values = [pass_at_k_of_item(a, c, k) for c, a in zip(correct, total, strict=True)]
    return mean_interval(values, on_invalid="drop")


def pass_hat_k(correct: Sequence[int], total: Sequence[int], k: int) -> Estimate:
    """Mean over items of `pass_hat_k_of_item`, as `pass_at_k`."""
    values = [pass_hat_k_of_item(a, c, k) for c, a in zip(correct, total, strict=True)]
    return mean_interval(values, on_invalid="drop")


def best_of_k(
    scores: Sequence[ArrayLike], correct: Sequence[ArrayLike], k: int, *, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """Expected correctness of the best-scored of k draws. scores[i], correct[i]: the n_i draws of item i."""
    raise NotImplementedError


def _check_counts(n: int, correct: int, k: int) -> None:
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} right of {n} samples")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
