"""Distributions: how one global sparsity is divided over layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal

__all__ = ["DISTRIBUTIONS", "divide", "erk", "uniform"]

DISTRIBUTIONS = ("uniform", "erk")

Shapes = Mapping[str, tuple[int, ...]]


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


def divide(distribution: str, shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Sparsity per layer name under `distribution`.

    Raises:
        ValueError: the distribution is not one of `DISTRIBUTIONS`.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}; choose one of them"
        )
    return (erk if distribution == "erk" else uniform)(shapes, sparsity)
