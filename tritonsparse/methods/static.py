"""Static: a mask chosen before training and never changed; the baseline that dynamic methods must beat.

Compared with in RigL (Evci et al., arXiv:1911.11134, table 2, "Static": a random mask; and "SNIP", a chosen one).
Forward, dX and dW see the mask.

Differs from the paper in:
- "magnitude" keeps the largest initial weights instead of SNIP's |w g|, which needs data.
- exact counts by score; the published random masks of ITOP are Bernoulli draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.optim import Optimizer

from ..clock import Clock
from ..masks.distribution import Distribution, divide
from .base import Layers
from .masked import MaskMethod

__all__ = ["Static"]


@dataclass(kw_only=True)
class Static(MaskMethod):
    """One mask for the whole run.

    sparsity: fraction of zeros over the sparsified layers, in [0, 1).
    distribution: "uniform", "erk", or sparsities by layer (masks/distribution.py).
    criterion: "random" (seeded) or "magnitude".
    """

    name: ClassVar[str] = "static"
    starts_from_mask: ClassVar[bool] = True
    one_shot: ClassVar[bool] = True
    distribution: Distribution = "uniform"
    criterion: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        divide(self.distribution, {}, self.sparsity)  # refuses an unknown name
        if self.criterion not in ("random", "magnitude"):
            raise ValueError(f"static: expected criterion 'random' or 'magnitude', got {self.criterion!r}; choose one")

    @torch.no_grad()
    def first_masks(self, layers: Layers, clock: Clock) -> None:
        sparsity = divide(self.distribution, self.dims(layers), self.sparsity)
        self.write(layers, self.choose_first(layers, "static", sparsity, paper=self.criterion))
        self.hold(layers, None)

    def frozen_topology(self, clock: Clock) -> bool | None:
        return True

    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        self.hold(layers, optimizer)
