"""Top-KAST: forward with the largest weights, gradients for a larger set; with annealed gradients on request.

Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", arXiv:2106.03517, Algorithm 1. With `alpha` below 1 it
is AutoSparse's "Top-KAST + GA" (arXiv:2304.06941, section 5.2).

    A = TopK(|W|, 1 - sparsity)                forward and dX use W on A
    B = TopK(|W|, 1 - backward_sparsity) >= A  dW: 1 on A, alpha on B \\ A, 0 elsewhere
    loss += penalty/2 (sum_A W^2 + sum_{B \\ A} W^2 / D),   D = 1 - sparsity     section 2.3

Weights outside A are kept, and those of B trained, so that they may come back. Outside B nothing moves, whatever
momentum and decay the optimizer has. `backward_sparsity` 0 makes B everything.

Differs from the paper in:
- the penalty is the squared norm's, added as a gradient; the paper's text has it squared and unsquared.
- A and B are chosen by layer; the paper leaves the first and last layer dense: use `exclude`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..clock import Clock
from ..layers import SparseLayer
from ..masks.distribution import Distribution, divide
from ..masks.topk import check_sparsity
from ..masks.units import choose_masks
from ..pattern import NM
from .base import Densities, Layers
from .masked import MaskMethod

__all__ = ["TopKAST"]


@dataclass(kw_only=True)
class TopKAST(MaskMethod):
    """Sparse forward, less sparse backward, dense memory.

    sparsity: of the forward set A, in [0, 1); 0 leaves every layer dense.
    backward_sparsity: of the gradient set B, at most `sparsity`.
    alpha: multiplier on the gradient of B outside A, in [0, 1]; 1 is Top-KAST.
    penalty: coefficient of the exploration regulariser.
    refresh_every: steps between choices of A and B (the paper: 1, and 100 as good).
    distribution: "uniform", "erk", or sparsities by layer (masks/distribution.py).
    """

    name: ClassVar[str] = "topkast"
    backward_sparsity: float = 0.0
    alpha: float = 1.0
    penalty: float = 1e-4
    refresh_every: int = 1
    distribution: Distribution = "uniform"
    # Weights outside B as they were before the step under way.
    _still: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.backward_sparsity = check_sparsity(self.name, self.backward_sparsity)
        if self.backward_sparsity > self.sparsity:
            raise ValueError(
                f"{self.name}: expected backward_sparsity of at most sparsity = {self.sparsity}, got "
                f"{self.backward_sparsity}; B holds A"
            )
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"{self.name}: expected alpha in [0, 1], got {self.alpha}; 1 is Top-KAST")
        if self.penalty < 0.0:
            raise ValueError(f"{self.name}: expected a penalty of at least 0, got {self.penalty}; correct it")
        if self.refresh_every < 1:
            raise ValueError(f"{self.name}: expected refresh_every of at least 1, got {self.refresh_every}; correct it")
        divide(self.distribution, {}, self.sparsity)  # refuses an unknown name

    @torch.no_grad()
    def first_masks(self, layers: Layers, clock: Clock) -> None:
        pattern = self._pattern
        if isinstance(pattern, NM) and self.backward_sparsity:
            raise ValueError(
                f"{self.name}: expected backward_sparsity 0 with pattern '{pattern}', got {self.backward_sparsity}; a "
                f"group of {pattern.m} has no set between A and everything"
            )
        for layer in layers.values():
            layer.alpha = layer.number(self.alpha)
        if masks := self.restored(layers):
            self.write(layers, masks)
        else:
            self._refresh(layers)

    def _refresh(self, layers: Layers) -> None:
        scores, dims = self.magnitudes(layers), self.dims(layers)
        self.write(layers, choose_masks(scores, divide(self.distribution, dims, self.sparsity), self._pattern))
        if self.backward_sparsity:
            supersets = choose_masks(scores, divide(self.distribution, dims, self.backward_sparsity), self._pattern)
            for name, layer in layers.items():
                layer.grad_mask = torch.empty_like(layer.weight, dtype=torch.bool).copy_(layer.stored(supersets[name]))

    @torch.no_grad()
    def before_step(self, layers: Layers, clock: Clock, optimizer: Optimizer, scale: Tensor | None) -> bool:
        if self.penalty == 0.0:
            return False
        for layer in layers.values():
            weight, mask = layer.weight, layer.mask
            assert mask is not None  # written in setup
            if weight.grad is None:
                continue
            # 1 on A, 1/D on B \ A: weights that are not used pay more to stay in the running.
            coefficient = mask + (1.0 / (1.0 - self.sparsity)) * ~mask
            if layer.grad_mask is not None:
                coefficient *= mask | layer.grad_mask
            pull = self.penalty * coefficient * weight
            weight.grad += (pull if scale is None else pull * scale).to(weight.grad.dtype)
        return False

    def guard(self, layers: Layers, optimizer: Optimizer) -> None:
        super().guard(layers, optimizer)
        supersets = {name: layer for name, layer in layers.items() if layer.grad_mask is not None}
        self._still = {name: layer.weight.detach().clone() for name, layer in supersets.items()}

    @torch.no_grad()
    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        for name, before in self._still.items():
            mask, superset = layers[name].mask, layers[name].grad_mask
            assert mask is not None and superset is not None  # written in setup
            layers[name].weight.copy_(torch.where(mask | superset, layers[name].weight, before))
        self._still = {}
        if clock.step % self.refresh_every == 0:
            self._refresh(layers)

    def densities(self, layer: SparseLayer, kept: float) -> Densities:
        backward = 1.0 if layer.grad_mask is None else float(layer.grad_mask.float().mean())
        return Densities(kept, kept, kept if self.alpha == 0.0 else max(kept, backward))
