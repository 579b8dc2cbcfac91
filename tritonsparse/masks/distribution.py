"""Distributions: how one global sparsity is divided over layers.

"uniform"   the same for every layer
"erk"       by layers' shapes
a mapping   fnmatch pattern on layer names -> sparsity; the first that matches counts
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fnmatch import fnmatchcase

__all__ = ["DISTRIBUTIONS", "Distribution", "apportion", "divide", "erk", "given", "overall", "uniform"]

DISTRIBUTIONS = ("uniform", "erk")

Shapes = Mapping[str, tuple[int, ...]]
Distribution = str | Mapping[str, float]


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The same sparsity for every layer."""
    return dict.fromkeys(shapes, sparsity)


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel sparsities (RigL, section 3, arXiv:1911.11134).

    Density of layer l: eps * raw_l with raw_l = sum(dims_l) / prod(dims_l), eps such that
    sum_{l not in D} eps raw_l n_l = sum_{l not in D} (n_l - z_l) - sum_{l in D} z_l, z_l = floor(p n_l).
    Layers whose density would pass 1 join D (dense) and eps is found again, so the budget is kept.

    Differs from the paper in: nothing; sparseml clips instead of redistributing and overshoots.
    """
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    zeros = {name: int(Decimal(str(sparsity)) * n) for name, n in numel.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        free = [name for name in shapes if name not in dense]
        budget = sum(numel[name] - zeros[name] for name in free) - sum(zeros[name] for name in dense)
        eps = budget / sum(raw[name] * numel[name] for name in free)
        largest = max(raw[name] for name in free)
        if eps * largest <= 1.0:
            return {name: 0.0 if name in dense else 1.0 - eps * raw[name] for name in shapes}
        dense |= {name for name in free if raw[name] == largest}
    return dict.fromkeys(shapes, 0.0)


def given(patterns: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The sparsity of every layer that a pattern matches."""
    found: dict[str, float] = {}
    for name in names:
        matching = [sparsity for pattern, sparsity in patterns.items() if fnmatchcase(name, pattern)]
        if matching:
            found[name] = matching[0]
    return found


def overall(shapes: Shapes, sparsities: Mapping[str, float]) -> float:
    """The share of zeros over all layers together."""
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(sparsities[name] * n for name, n in numel.items()) / sum(numel.values())


def divide(distribution: Distribution, shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Sparsity per layer name under `distribution`, of `sparsity` over all.

    Of a mapping, whose values have a mean of their own, every layer's in proportion: a ramp's beginning, or a larger
    set. More than its own is at most half of what it keeps.

    Raises:
        ValueError: the distribution is not one of `DISTRIBUTIONS`, or a value of a mapping is not in [0, 1).
    """
    if isinstance(distribution, Mapping):
        for pattern, value in distribution.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
                raise ValueError(f"sparsity: expected numbers in [0, 1), got {value!r} for {pattern!r}; correct it")
        own = given(distribution, shapes)
        mean = overall(shapes, own) if own else 0.0
        factor = sparsity / mean if mean else 0.0
        return {name: min(value * factor, max(value, (1.0 + value) / 2)) for name, value in own.items()}
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}; choose one of them"
        )
    return (erk if distribution == "erk" else uniform)(shapes, sparsity)


def apportion(
    total: int, shares: Mapping[str, float], room: Mapping[str, int], size: Mapping[str, int]
) -> dict[str, int]:
    """Whole units for every layer, in proportion to `shares`, within `room`, `total` elements together.

    A layer that would get more than it has room for gets its room, and what is left goes to the others by their
    shares. Fractions of units are rounded by largest remainder, ties to the earlier layer.

    Args:
        total: elements to give; what is below 0 counts as 0.
        shares: by layer, at least 0, any sum; all 0 counts as all equal.
        room: units that a layer can take.
        size: elements of a unit, by layer.

    Returns:
        Units by layer: `total` elements exactly where all sizes are equal and divide it, else less by under one unit
        of the smallest size that still has room.

    Raises:
        ValueError: `total` is more than there is room for.
    """
    left = max(0, total)
    if left > (places := sum(room[name] * size[name] for name in shares)):
        raise ValueError(f"apportion: expected a total of at most {places}, the room there is, got {total}; lower it")
    quota: dict[str, float] = {}
    free = list(shares)
    while free:
        together = sum(shares[name] for name in free)
        weight = {name: shares[name] / together if together > 0.0 else 1.0 / len(free) for name in free}
        part = {name: left * weight[name] / size[name] for name in free}
        full = {name: float(room[name]) for name in free if part[name] >= room[name]}
        quota |= full or part
        if not full:
            break
        left -= sum(room[name] * size[name] for name in full)
        free = [name for name in free if name not in full]
    given = {name: int(quota[name]) for name in shares}
    left = max(0, total) - sum(given[name] * size[name] for name in shares)
    order = sorted(shares, key=lambda name: given[name] - quota[name])
    while fitting := [name for name in order if given[name] < room[name] and size[name] <= left]:
        for name in fitting:
            if size[name] <= left:
                given[name] += 1
                left -= size[name]
    return given
