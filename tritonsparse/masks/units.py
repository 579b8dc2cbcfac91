"""Units: what a pattern keeps or prunes whole, and how scores and masks go between elements and units.

    unstructured, N:M   an element       [N, K]
    block r x c         a block          [N/r, K/c]
    channel             a row            [N, 1]

The score of a unit is the sum over its elements (of magnitudes: its L1 norm), its mask covers all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..kernels import _triton
from ..kernels.select.n_of_m import MAX_M, n_of_m_mask
from ..kernels.select.transposable import transposable_mask
from ..pattern import NM, Block, Channel, Pattern
from .topk import kept_count, topk_masks

__all__ = [
    "check_pattern",
    "choose_masks",
    "drop_grow",
    "from_units",
    "random_score",
    "to_units",
    "unit_count",
    "unit_size",
]


def check_pattern(function: str, shapes: Mapping[str, Sequence[int]], pattern: Pattern) -> None:
    """Refuse a pattern that does not divide a weight [N, K] into whole units.

    Raises:
        ValueError: the first layer it does not fit, with the nearest block that does.
    """
    for name, (n, k) in shapes.items():
        if isinstance(pattern, Block) and (n % pattern.rows or k % pattern.columns):
            rows, columns = _nearest_divisor(n, pattern.rows), _nearest_divisor(k, pattern.columns)
            raise ValueError(
                f"{function}: expected a weight that divides into blocks of {pattern.rows}x{pattern.columns}, got "
                f"{name} of shape [{n}, {k}]; use 'block:{rows}x{columns}' or exclude the layer"
            )
        if isinstance(pattern, NM) and (k % pattern.m or (pattern.transposable and n % pattern.m)):
            sides = "rows and columns" if pattern.transposable else "rows"
            raise ValueError(
                f"{function}: expected {sides} of a multiple of {pattern.m} for pattern '{pattern}', got {name} of "
                f"shape [{n}, {k}]; exclude the layer"
            )


def _nearest_divisor(size: int, wanted: int) -> int:
    divisors = [each for each in range(1, size + 1) if size % each == 0]
    return min(divisors, key=lambda each: (abs(each - wanted), each))


def unit_count(shape: Sequence[int], pattern: Pattern) -> int:
    """How many units a weight [N, K] has."""
    n, k = shape
    if isinstance(pattern, Block):
        return (n // pattern.rows) * (k // pattern.columns)
    return n if isinstance(pattern, Channel) else n * k


def unit_size(shape: Sequence[int], pattern: Pattern) -> int:
    """Elements of a unit of a weight [N, K]."""
    return shape[0] * shape[1] // unit_count(shape, pattern)


def to_units(score: Tensor, pattern: Pattern) -> Tensor:
    """Scores [N, K] -> summed over each unit."""
    n, k = score.shape
    if isinstance(pattern, Block):
        r, c = pattern.rows, pattern.columns
        return score.reshape(n // r, r, k // c, c).sum(dim=(1, 3))
    return score.sum(dim=1, keepdim=True) if isinstance(pattern, Channel) else score


def from_units(units: Tensor, pattern: Pattern, shape: Sequence[int]) -> Tensor:
    """A mask of units -> [N, K], newly allocated and contiguous."""
    if isinstance(pattern, Block):
        return units.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.columns, 1)
    return units.expand(*shape).clone(memory_format=torch.contiguous_format)


def choose_masks(
    scores: Mapping[str, Tensor],
    sparsity: Mapping[str, float] | float,
    pattern: Pattern,
    scope: str = "layer",
) -> dict[str, Tensor]:
    """Masks of the units with the largest scores: exact counts, ties to the lowest index.

    Args:
        scores: name -> [N, K], no NaN.
        sparsity: of every layer, or one by name; one number where `scope` is "global". With an N:M pattern the
            pattern decides, and it is not read.
        pattern: whole units are kept.
        scope: "layer", or "global": all layers' units compete in one top-k (all units being of one size; rows of
            a channel pattern differ in length, so their mean counts).

    Returns:
        name -> bool [N, K].
    """
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    if isinstance(pattern, NM):
        return {name: _n_of_m(score, pattern) for name, score in scores.items()}
    units = {name: to_units(score, pattern) for name, score in scores.items()}
    if scope == "global":
        assert isinstance(sparsity, float | int)
        if isinstance(pattern, Channel):
            units = {name: unit / shapes[name][1] for name, unit in units.items()}
        kept = kept_count(sum(unit.numel() for unit in units.values()), sparsity)
        chosen = dict(zip(units, topk_masks(list(units.values()), kept), strict=True))
    else:
        chosen = {}
        for name, unit in units.items():
            wanted = sparsity[name] if isinstance(sparsity, Mapping) else sparsity
            chosen[name] = topk_masks([unit], kept_count(unit.numel(), wanted))[0]
    return {name: from_units(chosen[name], pattern, shapes[name]) for name in scores}


def _n_of_m(score: Tensor, pattern: NM) -> Tensor:
    if pattern.n == pattern.m:
        # Where a ramp begins.
        return torch.ones_like(score, dtype=torch.bool)
    if pattern.transposable:
        return transposable_mask(score, pattern.n, pattern.m, function="choose_masks")
    on_gpu = _triton.AVAILABLE and score.is_cuda and score.dtype != torch.float64 and pattern.m <= MAX_M
    backend = "triton" if on_gpu else "torch"
    return n_of_m_mask(score, pattern.n, pattern.m, function="choose_masks", backend=backend)


def drop_grow(
    mask: Tensor, drop_score: Tensor, grow_score: Tensor, count: int, pattern: Pattern, *, allow_regrow: bool
) -> Tensor:
    """Drop the `count` kept units of smallest score and grow as many of largest score among those not kept.

    Args:
        mask: bool [N, K], obeying `pattern`.
        drop_score, grow_score: [N, K], no NaN.
        count: units to drop and to grow; no more than there are, of those that may grow either.
        allow_regrow: what was just dropped may grow again (RigL).

    Returns:
        bool [N, K] with as many units as `mask`.
    """
    kept = to_units(mask.float(), pattern) > 0
    total = int(kept.sum())
    count = min(count, total) if allow_regrow else min(count, total, kept.numel() - total)
    lowest = torch.finfo(torch.float32).min
    dropping = torch.where(kept, to_units(drop_score.float(), pattern), lowest)
    stays = topk_masks([dropping], total - count)[0]
    barred = stays if allow_regrow else kept
    growing = torch.where(barred, lowest, to_units(grow_score.float(), pattern))
    grows = topk_masks([growing], min(count, int((~barred).sum())))[0]
    return from_units(stays | grows, pattern, mask.shape)


def random_score(shape: Sequence[int], seed: int, *key: str | int) -> Tensor:
    """Uniform scores [N, K], float32 on the CPU: a function of the seed and the key alone, so that every rank and
    device draws the same."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float32)
