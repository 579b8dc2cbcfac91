"""Exact top-k masks: one convention for counts and ties, used by every method that chooses a mask.

    kept = max(1, round-half-up((1 - p) n))     in exact decimal arithmetic
    mask = the `kept` largest scores, ties to the lowest flat index (to the earlier tensor first)

The published codes differ from one another in both (see "Differs" of each method).
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal

import torch
from torch import Tensor

from ..kernels import _triton
from ..kernels.select.masks import cutoff_masks
from ..kernels.select.topk import topk_cutoff

__all__ = ["check_sparsity", "kept_count", "topk_mask", "topk_masks"]


def check_sparsity(function: str, sparsity: float) -> float:
    """`sparsity` as a float in [0, 1).

    Raises:
        ValueError: it is outside [0, 1) or not a number.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"{function}: expected a sparsity in [0, 1), the fraction of zeros, got {sparsity!r}; write 0.8 for 80 %"
        )
    return float(sparsity)


def kept_count(n: int, sparsity: float) -> int:
    """max(1, round-half-up((1 - sparsity) n)); `Decimal(str(.))`, so that 0.9 of 10 leaves exactly 1."""
    kept = ((1 - Decimal(str(sparsity))) * n).quantize(Decimal(1), rounding=ROUND_HALF_UP)
    return min(n, max(1, int(kept)))


def topk_mask(score: Tensor, kept: int) -> Tensor:
    """Mask of the `kept` largest entries of `score`, ties to the lowest flat index.

    Args:
        score: any shape, floating point, no NaN.
        kept: how many to keep, 0 <= kept <= score.numel().

    Returns:
        bool, shape of `score`, exactly `kept` entries True.
    """
    return topk_masks([score], kept)[0]


def topk_masks(scores: Sequence[Tensor], kept: int) -> list[Tensor]:
    """Masks of the `kept` largest entries over all `scores` together (a global top-k), by `kernels/select/topk.py`.

    Raises:
        ValueError: `kept` is out of range, or a score is NaN.
    """
    scores = [score.detach() for score in scores]
    backend = "triton" if _triton.AVAILABLE and all(score.is_cuda for score in scores) else "torch"
    dtypes = {score.dtype for score in scores}
    if torch.float64 in dtypes:
        backend = "torch"
    elif len(dtypes) > 1:
        scores = [score.float() for score in scores]
    cutoff = topk_cutoff(scores, kept, magnitude=False, backend=backend)
    return cutoff_masks(scores, cutoff, magnitude=False, backend=backend)
