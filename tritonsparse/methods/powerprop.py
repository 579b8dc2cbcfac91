"""PowerPropagation: weights as powers of what is trained, so that the rich get richer; masks as Top-KAST's.

Schwarz, Jayakumar, Pascanu, Latham & Teh, "Powerpropagation: A sparsity inducing weight reparameterisation",
arXiv:2110.00296.

    W      = theta |theta|^(a-1)                 eq. (1); theta is the layer's `weight`
    dtheta = a |theta|^(a-1) dW                  eq. (2)
    theta0 = sign(W0) |W0|^(1/a)                 so that training starts from the W0 that was given
    A, B, dW: Top-KAST's, on |W|                 topkast.py

A small weight gets a small gradient and stays small, so more can be pruned for the same loss. Forward and dX see W on
A. What the optimizer holds, decays and the penalty pulls on is theta. The finished model holds W.
A layer keeps W for its backward, one tensor more than Top-KAST.

Differs from the paper in:
- no mask is chosen after training: A is Top-KAST's from the first step on (the paper's sparse-to-sparse section, and
  its "TopKAST + Powerprop"); `backward_sparsity` 0 without a penalty is the default here.
- the gradient is 0 at theta = 0, as eq. (2) has it; autograd of the published formula gives NaN there for a < 2.
- the published notebook halves the output layer's sparsity at evaluation; nothing is halved here.
- blocks are chosen by the sum of |W|, not of |theta|; elements are in the same order under both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..clock import Clock
from ..kernels.weight.power import root
from ..pattern import Block, Unstructured
from .base import Layers
from .topkast import TopKAST

__all__ = ["PowerProp"]


@dataclass(kw_only=True)
class PowerProp(TopKAST):
    """Top-KAST on weights theta |theta|^(a-1); the fields that it shares are Top-KAST's.

    sparsity: of the forward set A, in [0, 1); 0 leaves every layer dense, on the plain weights.
    exponent: a, above 1 (the paper: 2 to 5); 1 is Top-KAST.
    penalty: coefficient of Top-KAST's exploration regulariser, on theta; 0 = none.
    """

    name: ClassVar[str] = "powerprop"
    patterns: ClassVar[tuple[type, ...]] = (Unstructured, Block)
    exponent: float = 2.0
    penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.exponent = float(self.exponent)
        if not 1.0 <= self.exponent < math.inf:
            raise ValueError(
                f"powerprop: expected an exponent of at least 1, got {self.exponent}; the paper has 2 to 5"
            )

    @torch.no_grad()
    def first_masks(self, layers: Layers, clock: Clock) -> None:
        # On W0, whose order theta keeps; every refusal comes from here, before a weight has changed.
        super().first_masks(layers, clock)
        for layer in layers.values():
            layer.weight.copy_(root(layer.weight, self.exponent))
            layer.exponent = self.exponent

    def magnitudes(self, layers: Layers) -> dict[str, Tensor]:
        return {
            name: magnitude if layers[name].exponent is None else magnitude.pow(self.exponent)
            for name, magnitude in super().magnitudes(layers).items()
        }
