"""RigL and SET: masks whose smallest weights are dropped and as many others grown, again and again.

RigL: Evci et al., "Rigging the Lottery: Making All Tickets Winners", arXiv:1911.11134, Algorithm 1.
SET: Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by
Network Science", arXiv:1707.04780.

    every Delta T steps, until T_end:
        n     = f(t) |m|,   f(t) = zeta/2 (1 + cos(pi t / T_end))      RigL, section 3 (3); SET: f = zeta
        drop  the n smallest |W| among the kept
        grow  n of the others: RigL the largest |dL/dW|, SET at random
    grown weights start at 0, their optimizer state too

Forward, dX and dW see the mask. RigL's update takes the place of the optimizer's step; the gradient it reads is the
dense one, after accumulation and the mean over ranks, and only these steps compute it.

Differs from the paper in:
- RigL may grow what it has just dropped, which then keeps its value, as in the published code; the paper's text
  excludes nothing either.
- ties go to the lowest index; the published code adds noise of 1e-5 to the scores instead.
- DDP: the mean gradient over ranks is scored; the published PyTorch port averages the ranks' absolute values.
- SET drops by |W|; its original prunes the smallest positive and the largest negative weights separately, which
  two public ports got wrong (they keep the most negative weights only).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..clock import Clock
from ..layers import SparseLayer
from ..masks.distribution import Distribution, divide
from ..masks.units import drop_grow, random_score, to_units
from ..optimizer_state import clear_state
from ..pattern import Block, Channel, Unstructured
from ..schedules import cosine
from .base import Densities, Layers
from .masked import MaskMethod

__all__ = ["SET", "RigL"]


@dataclass(kw_only=True)
class SET(MaskMethod):
    """Drop by magnitude, grow at random.

    sparsity: fraction of zeros, in [0, 1); 0 leaves every layer dense.
    drop_fraction: share of the kept units replaced at an update (zeta in SET, alpha in RigL).
    update_every: steps between updates (Delta T); None = a hundredth of the run, at most 100.
    stop_at: updates end at this fraction of total_steps (T_end).
    distribution: "uniform", "erk", or sparsities by layer (masks/distribution.py).
    """

    name: ClassVar[str] = "set"
    starts_from_mask: ClassVar[bool] = True
    intervals: ClassVar[dict[str, int]] = {"update_every": 100}
    patterns: ClassVar[tuple[type, ...]] = (Unstructured, Block, Channel)
    drop_fraction: float = 0.3
    update_every: int | None = None
    stop_at: float = 1.0
    distribution: Distribution = "erk"
    _updating: bool = field(default=True, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.drop_fraction <= 1.0:
            raise ValueError(f"{self.name}: expected drop_fraction in [0, 1], got {self.drop_fraction}; correct it")
        self.check_intervals()
        if not 0.0 <= self.stop_at <= 1.0:
            raise ValueError(
                f"{self.name}: expected stop_at in [0, 1], a fraction of the run, got {self.stop_at}; correct it"
            )
        divide(self.distribution, {}, self.sparsity)  # refuses an unknown name

    @torch.no_grad()
    def first_masks(self, layers: Layers, clock: Clock) -> None:
        clock.require(self.name, "total_steps")
        sparsity = divide(self.distribution, self.dims(layers), self.sparsity)
        self.write(layers, self.choose_first(layers, self.name, sparsity))
        self.hold(layers, None)

    def _due(self, step: int, clock: Clock) -> bool:
        """Whether an update falls on step `step`, counted from 0."""
        assert clock.total_steps is not None  # required in setup
        self._updating = step < self.stop_at * clock.total_steps
        return self._updating and step > 0 and step % self.every("update_every") == 0

    def frozen_topology(self, clock: Clock) -> bool | None:
        # SET updates after the step that was taken, RigL instead of the one that comes: both are step clock.step.
        return not self._due(clock.step, clock)

    def fraction(self, step: int, clock: Clock) -> float:
        """f(t): SET replaces the same share at every update."""
        return self.drop_fraction

    def _update(
        self, layers: Layers, clock: Clock, step: int, optimizer: Optimizer, grow: dict[str, Tensor], allow_regrow: bool
    ) -> None:
        masks = {}
        for name, layer in layers.items():
            assert layer.mask is not None  # written in setup
            mask = layer.oriented(layer.mask)
            kept = int((to_units(mask.float(), self._pattern) > 0).sum())
            count = int(self.fraction(step, clock) * kept)
            magnitude = layer.oriented(layer.weight.detach().abs())
            masks[name] = drop_grow(
                mask, magnitude, grow[name].to(mask.device), count, self._pattern, allow_regrow=allow_regrow
            )
            # A weight that was not kept is 0 and forgotten by the optimizer already; see hold.
            clear_state(optimizer, layer.weight, layer.stored(masks[name] & ~mask))
        self.write(layers, masks)

    @torch.no_grad()
    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        if self._due(clock.step, clock):
            scores = {
                name: random_score(shape, self._seed, self.name, name, clock.step)
                for name, shape in self.shapes(layers).items()
            }
            self._update(self.moving(layers), clock, clock.step, optimizer, scores, allow_regrow=False)
        self.hold(layers, optimizer)


@dataclass(kw_only=True)
class RigL(SET):
    """Drop by magnitude, grow by gradient; fields as SET's, the drop fraction falling along a cosine."""

    name: ClassVar[str] = "rigl"
    stop_at: float = 0.75

    @torch.no_grad()
    def first_masks(self, layers: Layers, clock: Clock) -> None:
        super().first_masks(layers, clock)
        for layer in layers.values():
            layer.alpha = layer.number(0.0)
        self._announce(layers, clock)

    def fraction(self, step: int, clock: Clock) -> float:
        assert clock.total_steps is not None  # required in setup
        return self.drop_fraction * cosine(step, self.stop_at * clock.total_steps)

    def _announce(self, layers: Layers, clock: Clock) -> None:
        """alpha = 1 makes dW dense for the step that comes; 0 leaves it masked."""
        for layer in layers.values():
            assert layer.alpha is not None  # given in setup
            layer.alpha.fill_(float(self._due(clock.step, clock)))

    @torch.no_grad()
    def before_step(self, layers: Layers, clock: Clock, optimizer: Optimizer, scale: Tensor | None) -> bool:
        if not self._due(clock.step, clock):
            return False
        gradients, moving = {}, self.moving(layers)
        for name, layer in moving.items():
            grad = layer.weight.grad
            # A layer that took no part in this step (LayerDrop) has a gradient of 0.
            gradients[name] = layer.oriented(torch.zeros_like(layer.weight) if grad is None else grad.abs())
        self._update(moving, clock, clock.step, optimizer, gradients, allow_regrow=True)
        self.hold(layers, optimizer)
        return True

    @torch.no_grad()
    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        self.hold(layers, optimizer)
        self._announce(layers, clock)

    def cost_state(self) -> Any:
        return self._updating

    def densities(self, layer: SparseLayer, kept: float) -> Densities:
        if not self._updating:
            return Densities(kept, kept, kept)
        # One dense gradient every Delta T + 1 steps (RigL, appendix H).
        period = self.every("update_every")
        return Densities(kept, kept, (kept * period + 1.0) / (period + 1.0))
