"""MEST: prune a little too much, grow back at random, ever less of it ("elastic mutation").

Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge", arXiv:2110.14032,
Algorithm 1.

    every Delta T steps, in stage i:
        importance  |W| + lambda |dL/dW|
        prune       the least important until sparsity = p + mutation_i
        grow        at random, value 0, until sparsity = p - softness_i
    last stage: mutation = softness = 0, the mask is frozen

"EM" has softness 0; "EM&S" lets the memory grow beyond p by the softness, and prunes to p only. Forward, dX and dW
see the mask.

Differs from the paper in:
- the importance is computed before the optimizer's step, where gradients exist; the published code computes it
  after `zero_grad`, so that lambda does nothing.
- exact counts; the published code keeps what lies above an interpolated percentile.
- growth is seeded by layer and step, so that ranks agree; what was just pruned may grow again.
- stages are fractions of the run (the paper: epochs 90 and 120 of 160).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..clock import Clock
from ..masks.distribution import Distribution, divide
from ..masks.topk import kept_count, topk_mask
from ..masks.units import choose_masks, from_units, random_score, to_units
from ..optimizer_state import clear_state
from ..pattern import Block, Channel, Unstructured
from .base import Layers
from .masked import MaskMethod

__all__ = ["MEST"]


@dataclass(kw_only=True)
class MEST(MaskMethod):
    """Elastic mutation of a sparse mask.

    sparsity: p, in [0, 1); 0 leaves every layer dense.
    mutation: per stage, how much sparser than p an update prunes; the last is 0.
    softness: per stage, how much denser than p an update leaves the mask; the last is 0.
    stages: fractions of the run at which the next stage begins, one less than there are stages.
    update_every: steps between updates (the paper: 5 epochs); None = a hundredth of the run, at most 100.
    gradient_weight: lambda, the weight of |dL/dW| in the importance.
    distribution: "uniform", "erk", or sparsities by layer (masks/distribution.py).
    """

    name: ClassVar[str] = "mest"
    starts_from_mask: ClassVar[bool] = True
    intervals: ClassVar[dict[str, int]] = {"update_every": 100}
    patterns: ClassVar[tuple[type, ...]] = (Unstructured, Block, Channel)
    mutation: Sequence[float] = (0.02, 0.01, 0.0)
    softness: Sequence[float] = (0.0, 0.0, 0.0)
    stages: Sequence[float] = (0.5625, 0.75)
    update_every: int | None = None
    gradient_weight: float = 0.0
    distribution: Distribution = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mutation, self.softness, self.stages = tuple(self.mutation), tuple(self.softness), tuple(self.stages)
        if not len(self.mutation) == len(self.softness) == len(self.stages) + 1:
            raise ValueError(
                f"mest: expected as many values of mutation as of softness, and one less of stages, got "
                f"{len(self.mutation)}, {len(self.softness)} and {len(self.stages)}; correct them"
            )
        if self.mutation[-1] != 0.0 or self.softness[-1] != 0.0:
            raise ValueError("mest: expected mutation and softness to end with 0, which freezes the mask; append it")
        if self.sparsity and not all(
            self.sparsity - soft >= 0.0 and self.sparsity + more < 1.0
            for more, soft in zip(self.mutation, self.softness, strict=True)
        ):
            raise ValueError(
                f"mest: expected sparsity = {self.sparsity} with mutation {self.mutation} and softness {self.softness} "
                f"to stay in [0, 1), got more; lower them"
            )
        if list(self.stages) != sorted(self.stages) or not all(0.0 <= stage <= 1.0 for stage in self.stages):
            raise ValueError(f"mest: expected stages as rising fractions of the run, got {self.stages}; correct them")
        if self.gradient_weight < 0.0:
            raise ValueError(f"mest: expected gradient_weight of at least 0, got {self.gradient_weight}; correct it")
        self.check_intervals()
        divide(self.distribution, {}, self.sparsity)  # refuses an unknown name

    @torch.no_grad()
    def first_masks(self, layers: Layers, clock: Clock) -> None:
        clock.require(self.name, "total_steps")
        sparsity = divide(self.distribution, self.dims(layers), self.sparsity)
        self.write(layers, self.choose_first(layers, self.name, sparsity))
        self.hold(layers, None)

    def stage(self, step: int, clock: Clock) -> int:
        """Which of the stages step `step` belongs to."""
        assert clock.total_steps is not None  # required in setup
        return sum(step >= share * clock.total_steps for share in self.stages)

    def _due(self, step: int, clock: Clock) -> bool:
        last = len(self.stages)
        if step == 0:
            return False
        # The first step of the last stage brings a soft mask down to p.
        enters = self.stage(step, clock) == last and self.stage(step - 1, clock) < last
        return enters or (self.stage(step, clock) < last and step % self.every("update_every") == 0)

    def frozen_topology(self, clock: Clock) -> bool | None:
        return not self._due(clock.step, clock)

    @torch.no_grad()
    def before_step(self, layers: Layers, clock: Clock, optimizer: Optimizer, scale: Tensor | None) -> bool:
        if not self._due(clock.step, clock):
            return False
        stage = self.stage(clock.step, clock)
        importance, layers = {}, self.moving(layers)
        for name, layer in layers.items():
            value = layer.weight.detach().abs()
            if self.gradient_weight and layer.weight.grad is not None:
                gradient = layer.weight.grad.abs()
                value = value + self.gradient_weight * (gradient if scale is None else gradient / scale)
            assert layer.mask is not None  # written in setup
            importance[name] = layer.oriented(torch.where(layer.mask, value, -1.0))
        shapes, dims = self.shapes(layers), self.dims(layers)
        least = divide(self.distribution, dims, self.sparsity + self.mutation[stage])
        most = divide(self.distribution, dims, self.sparsity - self.softness[stage])
        masks = {}
        for name, kept in choose_masks(importance, least, self._pattern).items():
            layer = layers[name]
            pruned = layer.stored(~kept)
            # Before growth: what grows starts at 0, without the gradient and the past that it had.
            layer.weight.masked_fill_(pruned, 0.0)
            clear_state(optimizer, layer.weight, pruned)
            if layer.weight.grad is not None:
                layer.weight.grad.masked_fill_(pruned, 0.0)
            units = to_units(kept.float(), self._pattern) > 0
            score = to_units(random_score(shapes[name], self._seed, self.name, name, clock.step), self._pattern)
            # What is kept stands before anything that grows.
            ranked = torch.where(units.cpu(), torch.inf, score)
            grown = topk_mask(ranked, kept_count(units.numel(), most[name]))
            masks[name] = from_units(grown, self._pattern, shapes[name])
        self.write(layers, masks)
        return False

    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        self.hold(layers, optimizer)
