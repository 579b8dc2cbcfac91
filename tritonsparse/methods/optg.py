"""OptG: scores, trained by the gradients that reach every weight, say which weights are kept.

Zhang et al., "Optimizing Gradient-driven Criteria in Network Sparsity: Gradient is All You Need",
arXiv:2201.12826.

    W_hat = W on the mask, g = dL/dW_hat                       straight-through
    dW    = g on the mask, 0 elsewhere
    dM    = g W, everywhere                                   M starts at 0
    M    <- M - lr_M v,  v <- 0.9 v + dM,  lr_M = lr sigma(beta(e))     momentum SGD, no decay
    at the start of epoch e:
        rate  = p sigma(beta(e)),   beta(e) = beta 100 (e / N - 1/2)
        mask  = the (1 - rate) n largest M over all layers

Minus dM is how much the loss would fall if the weight's gate opened: scores of weights that help rise. One threshold
for all layers gives each layer its own rate; the mask holds for the epoch. Forward and dX see the mask, dW is dense
(it is what dM is made of) and masked before the step: gradient clipping before that sees it dense. Weights outside the
mask are kept and move by the optimizer's decay and what is left of their momentum alone.

Differs from the paper in:
- beta counts hundredths of the run, which is the paper's at N = 100 epochs, so that shorter runs reach p as well; the
  last epoch has p exactly.
- exact counts, ties to the lowest index; the scores all tie, at 0, until lr_M is above 0, and so do masks by index.
- the published code fixes per-layer rates and picks per-layer index sets, which is the same set but for ties. That
  makes its distribution global; AutoSparse's paper calls it uniform.
- blocks and rows: the score of a unit is the sum of its elements', as for one gate a unit (rows: their mean).
- N:M keeps round((1 - rate) M) of every M on the way, N at the end; there is no threshold over layers then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..clock import Clock
from ..layers import SparseLayer
from ..masks.topk import kept_count
from ..masks.units import choose_masks
from ..optimizer_state import learning_rate
from ..pattern import NM
from .base import Densities, Layers, MethodState
from .masked import MaskMethod

__all__ = ["OptG"]


@dataclass(kw_only=True)
class OptG(MaskMethod):
    """Masks from scores that follow g W.

    sparsity: over the sparsified layers in the last epoch (p), in [0, 1); 0 leaves every layer dense.
    beta: steepness of the rise, around the middle of the run.
    score_momentum: of the scores' own SGD, in [0, 1).
    """

    name: ClassVar[str] = "optg"
    # Scores are made of gradients.
    takes_frozen: ClassVar[bool] = False
    beta: float = 1.0
    score_momentum: float = 0.9
    _scores: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _velocities: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.beta < math.inf:
            raise ValueError(f"optg: expected beta above 0, got {self.beta}; 1 is the paper's")
        if not 0.0 <= self.score_momentum < 1.0:
            raise ValueError(f"optg: expected score_momentum in [0, 1), got {self.score_momentum}; 0.9 is the paper's")

    @torch.no_grad()
    def first_masks(self, layers: Layers, clock: Clock) -> None:
        clock.require(self.name, "total_steps", "steps_per_epoch")
        for name, layer in layers.items():
            # float16 weights get float32 scores: a hundred epochs of small steps would round away.
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            self._scores[name] = torch.zeros_like(layer.weight, dtype=dtype)
            self._velocities[name] = torch.zeros_like(layer.weight, dtype=dtype)
            layer.alpha = layer.number(1.0)
        self._choose(layers, clock)

    def rise(self, clock: Clock) -> float:
        """sigma(beta(e)) in the present epoch; 1 in the last one and after."""
        epoch, epochs = clock.epoch, clock.total_epochs
        if epoch >= epochs - 1:
            return 1.0
        return 1.0 / (1.0 + math.exp(-self.beta * 100.0 * (epoch / epochs - 0.5)))

    def _choose(self, layers: Layers, clock: Clock) -> None:
        rate = self.sparsity * self.rise(clock)
        scores = {name: layer.oriented(self._scores[name]) for name, layer in layers.items()}
        if isinstance(self._pattern, NM):
            n = max(self._pattern.n, kept_count(self._pattern.m, rate))
            self.write(layers, choose_masks(scores, 0.0, dataclasses.replace(self._pattern, n=n)))
        else:
            self.write(layers, choose_masks(scores, rate, self._pattern, "global"))
            self.say_empty(layers, clock.step)

    @torch.no_grad()
    def before_step(self, layers: Layers, clock: Clock, optimizer: Optimizer, scale: Tensor | None) -> bool:
        rise = self.rise(clock)
        for name, layer in layers.items():
            weight, mask = layer.weight, layer.mask
            assert mask is not None  # written in setup
            if weight.grad is None:
                continue
            score, velocity = self._beside(name, weight)
            step = weight.grad.to(score.dtype) * weight
            velocity.mul_(self.score_momentum).add_(step if scale is None else step / scale)
            score.sub_(velocity * (learning_rate(optimizer, weight) * rise))
            weight.grad.masked_fill_(~mask, 0.0)
        return False

    def _beside(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Score and velocity on the weight's device, which may have changed since setup."""
        for tensors in (self._scores, self._velocities):
            if tensors[name].device != weight.device:
                tensors[name] = tensors[name].to(weight.device)
        return self._scores[name], self._velocities[name]

    @torch.no_grad()
    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        if clock.at_epoch_start and clock.epoch < clock.total_epochs:
            self._choose(layers, clock)

    def densities(self, layer: SparseLayer, kept: float) -> Densities:
        return Densities(kept, kept, 1.0)

    def state_dict(self) -> MethodState:
        scores = {f"scores/{name}": tensor for name, tensor in self._scores.items()}
        return {**scores, **{f"velocities/{name}": tensor for name, tensor in self._velocities.items()}}

    def load_state_dict(self, state: Mapping[str, float | int | Tensor]) -> None:
        for kind, tensors in (("scores", self._scores), ("velocities", self._velocities)):
            for name in tensors:
                saved = state[f"{kind}/{name}"]
                assert isinstance(saved, Tensor)
                tensors[name] = saved.to(tensors[name].device, tensors[name].dtype).clone()
