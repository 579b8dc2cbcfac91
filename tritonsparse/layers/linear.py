"""Linear layers seen through a view: y = x S(W)^T + b.

SparseLinear    `nn.Linear`, weight [N, K]
SparseConv1D    transformers' `Conv1D` (GPT-2), weight [K, N]
"""

# N output features   K input features

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.activation.linear import sparse_input_linear
from ..kernels.block.linear import block_linear
from ..kernels.fused.linear import fused_linear
from ..kernels.semi_structured import semi_structured_linear
from .backend import Backend, choose_backend, product_is_fused
from .base import SparseLayer, autocast_operands

__all__ = ["SparseConv1D", "SparseLinear"]

# Rows of x from which a training forward casts all of a weight in blocks before its two products, for 6 bytes a weight.
# Cast inside them it costs their loops about half their speed: at 90 % of zeros, at 4.3 TB/s and 790 TFLOP/s,
# 1.4 ps a weight are 3.7e-15 s M (1 - 0.9) twice at M of about 1,900.
CAST_ROWS = 2048


class _SparseMatrix(SparseLayer):
    """What both have in common: the products of a matrix."""

    caches = True
    # Whether a training forward of many rows casts a weight in blocks first; turned off to time products that cast it.
    casts_first: ClassVar[bool] = True

    def product(self, x: Tensor, w_hat: Tensor) -> Tensor:
        x, bias = autocast_operands(x, self.bias, w_hat.dtype)
        if self.backend.name == "semi_structured" and self.kind == "mask":
            return semi_structured_linear(
                x, w_hat, bias, transposed=self.transposed, backend="semi_structured",
                sparse_grad_input=self.backend.sparse_grad_input,
            )  # fmt: skip
        return F.linear(x, w_hat.t() if self.transposed else w_hat, bias)

    def packed_product(self, x: Tensor, w_hat: Tensor) -> Tensor:
        assert self.sparse_input is not None  # packs_input
        x, bias = autocast_operands(x, self.bias, w_hat.dtype)
        y, cutoff, overflow = sparse_input_linear(
            x, w_hat, bias, self.sparse_input.packing(x.shape[:-1]),
            transposed=self.transposed, backend=self.backend.elementwise,
        )  # fmt: skip
        self.sparse_input.note(cutoff, overflow)
        return y

    def block_product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x, bias = autocast_operands(x, self.bias, dtype)
        view, cache = self.view, self.cache
        w_hat = None if cache is None else cache.read(dtype, weight, view.threshold, view.mask)
        weight = self.powered(weight)
        many = self.casts_first and torch.is_grad_enabled() and x.numel() >= CAST_ROWS * x.shape[-1]
        if w_hat is None and many and weight.dtype == torch.float32 and dtype.itemsize == 2:
            w_hat = weight.detach().to(dtype)
        return block_linear(
            x, weight, self.current_topology(), view, bias,
            w_hat=w_hat, transposed=self.transposed, dtype=dtype, backend="triton",
        )  # fmt: skip

    def is_fused(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
        name, cache = self.backend.name, self.cache
        if name == "fused":
            # Where the Sparsifier writes the effective weight, or multiplies the gradient, there is nothing to fuse.
            return cache is None
        if name != "triton" or not x.is_cuda or self.kind == "step" or self.view.per_block:
            return False
        if torch.is_grad_enabled():
            return not (cache is not None and cache.defer) and self._is_planned("grad_weight", x, weight, dtype)
        return cache is None and self._is_planned("forward", x, weight, dtype)

    def _is_planned(self, op: str, x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
        return product_is_fused(op, x, weight.shape, self.kind, dtype)

    def fused_product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        w_hat = None
        if self.backend.name == "triton" and torch.is_grad_enabled():
            # The gradient of the weight alone is faster fused.
            w_hat = self.weight_for(weight.detach(), dtype).detach()
        x, bias = autocast_operands(x, self.bias, dtype)
        return fused_linear(
            x, self.powered(weight), self.view, bias, w_hat=w_hat, transposed=self.transposed, dtype=dtype
        )

    def choose_backend(self, asked: str) -> Backend:
        n, k = reversed(self.dense_shape) if self.transposed else self.dense_shape
        return choose_backend(asked, self.weight, (n, k), self.pattern)

    @property
    def follows_density(self) -> bool:
        block, backend = self.block, self.backend
        fits = block is not None and block[0] % 16 == block[1] % 16 == 0
        return fits and self.weight.is_cuda and backend.asked == "auto" and backend.name in ("triton", "block")


class SparseLinear(_SparseMatrix, nn.Linear):  # type: ignore[misc]  # Linear types its bias as never None
    """`nn.Linear` seen through a view; `weight` [out_features, in_features]."""

    stock_class = nn.Linear


class SparseConv1D(_SparseMatrix, Conv1D):  # type: ignore[misc]  # likewise
    """transformers' `Conv1D` (GPT-2) seen through a view; `weight` [in_features, out_features]."""

    stock_class = Conv1D
    transposed = True
