"""A layer's effective weight as the Sparsifier wrote it last (`weight_cache.py`), and whether it is still true."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Cache", "versions_of"]


@dataclass(eq=False)
class Cache:
    """What one layer keeps from forward to forward.

    Attributes:
        w_hat: S(W), shape of the weight; None where none is kept.
        versions: `versions_of` the tensors that it was made of.
        defer: leave dense gradients in `.grad`: the Sparsifier multiplies them once a step.
    """

    w_hat: Tensor | None = None
    versions: tuple[int, ...] = ()
    defer: bool = False

    def read(self, dtype: torch.dtype, weight: Tensor, threshold: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """S(W) in `dtype`, if that is what is kept and none of the tensors has been written since."""
        if self.w_hat is None or self.w_hat.dtype != dtype:
            return None
        if torch.compiler.is_compiling() or self.versions == versions_of(weight, threshold, mask):
            return self.w_hat
        return None


def versions_of(weight: Tensor, threshold: Tensor | None, mask: Tensor | None) -> tuple[int, ...]:
    """Counters that an in-place edit of the tensors moves; another weight has another address."""
    return (
        weight._version,
        weight.data_ptr(),
        -1 if threshold is None else threshold._version,
        -1 if mask is None else mask._version,
    )
