"""DST: a cut-off for every neuron or filter, trained by a long-tailed estimate of the step's derivative.

Liu et al., "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked Layers",
arXiv:2005.06870.

    What_ij = W_ij where |W_ij| > t_i, 0 elsewhere     t starts at 0: all but exact zeros are kept
    dW_ij   = g_ij (1[kept] + |W_ij| H(|W_ij| - t_i))     eq. 4, 6
    dt_i    = -sum_j g_ij W_ij H(|W_ij| - t_i)
    H(q)    = 2 - 4 |q| up to |q| = 0.4, then 0.4 up to |q| = 1, then 0
    loss   += penalty sum over all i of exp(-t_i)          pushes the cut-offs up
    a layer that keeps at most `min_density` of its weights gets t = 0

H is on an absolute scale, made for weights of the order of 1: where weights are around 0.02, as in most transformers,
it is 2 all over, and a cut-off follows -2 sum(g W) whether or not a weight is near it.

Differs from the paper in:
- the penalty is a gradient, added before the step, in the scale of the gradients.
- a layer is reset after the step in which it fell; the published code mutates the cut-offs inside the forward, in
  evaluation too.
- the cut-offs take no weight decay beside their penalty unless the optimizer's group is given one; in the code they
  share the weights' 1e-4, which pulls |t| to 0.
- nothing is done to the weights of a layer that is reset, as in the code; the text can be read otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..clock import Clock
from ..layers import SparseLayer
from ..pattern import Pattern
from .base import Densities, Layers, Method

__all__ = ["DST"]


@dataclass(kw_only=True)
class DST(Method):
    """Trainable cut-offs a row.

    sparsity: None = as sparse as the penalty makes it; 0 = every layer dense; nothing else can be asked for.
    penalty: coefficient of sum exp(-t) (the paper: 1e-6 to 5e-4; more is sparser); 0 prunes by the loss alone.
    min_density: a layer that keeps no more starts again at t = 0, in [0, 1).
    """

    name: ClassVar[str] = "dst"
    # The penalty is the cut-offs' regulariser: decay would pull them back to 0.
    threshold_weight_decay: ClassVar[float] = 0.0
    sparsity: float | None = None
    penalty: float = 5e-6
    min_density: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity not in (None, 0.0):
            raise ValueError(
                f"dst: expected no sparsity, or 0 for a dense model, got {self.sparsity}; set penalty, which decides "
                f"how sparse a model gets"
            )
        if not self.penalty >= 0.0:
            raise ValueError(f"dst: expected a penalty of at least 0, got {self.penalty}; the paper's are 1e-6 to 5e-4")
        if not 0.0 <= self.min_density < 1.0:
            raise ValueError(f"dst: expected min_density in [0, 1), got {self.min_density}; the paper's is 0.01")

    @property
    def idle(self) -> bool:
        return self.sparsity == 0.0

    @torch.no_grad()
    def setup(self, layers: Layers, clock: Clock, pattern: Pattern, seed: int) -> None:
        if self.idle:
            return
        for layer in layers.values():
            layer.threshold = nn.Parameter(layer.threshold_a_row(0.0))
            layer.kind = "step"

    @torch.no_grad()
    def before_step(self, layers: Layers, clock: Clock, optimizer: Optimizer, scale: Tensor | None) -> bool:
        for layer in layers.values():
            t = layer.threshold
            if t is not None and t.grad is not None:
                push = self.penalty * torch.exp(-t)
                t.grad -= push if scale is None else push * scale
        return False

    @torch.no_grad()
    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        for layer in layers.values():
            if layer.threshold is not None:
                fallen = layer.effective_weight().count_nonzero() <= self.min_density * layer.weight.numel()
                # Decided on the device: no step waits for a count.
                layer.threshold.masked_fill_(fallen, 0.0)

    def densities(self, layer: SparseLayer, kept: float) -> Densities:
        return Densities(kept, kept, 1.0)
