"""`nn.Conv2d` seen through a view: the same Parameter, a convolution with S(W).

    W_hat = S(W)            as of the matrix [out, kh kw in/groups] (kernels/weight/op.py)
    Y     = conv2d(X, W_hat)

Every padding mode, stride, dilation and grouping is `nn.Conv2d`'s own code. Autograd gives dX from W_hat and the dense
gradient of W_hat, which the effective weight's backward multiplies into dW. The back ends "fused" and "block" make it
inside the products instead (kernels/conv/conv2d.py), "block" of kept blocks alone; `auto` takes "fused" for a
convolution whose products were all measured to be faster so. Depthwise and narrowly grouped ones are never fused: no
tile of ours would be filled.

As a matrix, what methods choose masks on, a weight [out, in/groups, kh, kw] has its columns in the order
(kh, kw, in/groups): a block spans output channels and input channels at one kernel position, n of every m is along
input channels (as AC/DC has it, arXiv:2106.12379), a channel is an output channel. That is also the memory order of
a channels-last weight, where the matrix is a view; elsewhere it is a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.activation.conv2d import sparse_input_conv2d
from ..kernels.block.topology import Topology
from ..kernels.conv.conv2d import fused_conv2d
from ..kernels.conv.geometry import Geometry
from ..kernels.weight.op import effective_weight
from ..kernels.weight.reference import effective_weight_reference
from ..kernels.weight.view import View
from .backend import Backend, conv_is_fused
from .base import SparseLayer
from .view_state import VIEW_TENSORS

__all__ = ["SparseConv2d", "is_depthwise"]

# Channels of a group, in or out, that fill a tile of our kernels.
NARROWEST = 16


class SparseConv2d(SparseLayer, nn.Conv2d):  # type: ignore[misc]  # Conv2d types its bias otherwise
    """`nn.Conv2d` seen through a view; `weight` [out_channels, in_channels / groups, kh, kw]."""

    stock_class = nn.Conv2d

    def weight_for(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if self.kind == "dense":
            return weight.to(dtype)
        matrix = self._matrix(self.powered(weight))
        w_hat = effective_weight(matrix, self._view(self._matrix), dtype=dtype, backend=self.backend.elementwise)
        return self._tensor(w_hat)

    def product(self, x: Tensor, w_hat: Tensor) -> Tensor:
        # x and the bias are cast by autocast itself, as a dense layer's are.
        return self._conv_forward(x, w_hat, self.bias)

    def packed_product(self, x: Tensor, w_hat: Tensor) -> Tensor:
        assert self.sparse_input is not None  # packs_input
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        else:
            padding = cast(tuple[int, int], self.padding)
        y, cutoff, overflow = sparse_input_conv2d(
            x.to(w_hat.dtype), w_hat, None if self.bias is None else self.bias.to(w_hat.dtype),
            self.sparse_input.packing(), stride=self.stride, padding=padding, dilation=self.dilation,
            groups=self.groups, backend=self.backend.elementwise,
        )  # fmt: skip
        self.sparse_input.note(cutoff, overflow)
        return y

    def block_product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return self._fused(x, weight, dtype, self.current_topology())

    def is_fused(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
        if self.backend.name == "fused":
            return True
        if self.backend.asked != "auto" or not x.is_cuda or x.dim() != 4 or torch.compiler.is_compiling():
            return False
        if self.kind == "step" or self.view.per_block:
            return False
        padding = self._zeros_around if self.padding_mode == "zeros" else (0, 0, 0, 0)
        backward = torch.is_grad_enabled() and weight.requires_grad
        shape = (weight.shape[0], weight[0].numel())
        return conv_is_fused(self._geometry(padding), x, shape, self.kind, dtype, backward)

    def fused_product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return self._fused(x, weight, dtype, None)

    def _fused(self, x: Tensor, weight: Tensor, dtype: torch.dtype, topology: Topology | None) -> Tensor:
        images = (x if x.dim() == 4 else x[None]).to(dtype)
        padding = self._zeros_around
        if self.padding_mode != "zeros":
            images = F.pad(images, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0, 0, 0)
        y = fused_conv2d(
            images, self.oriented(self.powered(weight)), self._view(self.oriented),
            None if self.bias is None else self.bias.to(dtype), self._geometry(padding), topology,
            dtype=dtype, backend="triton",
        )  # fmt: skip
        return y if x.dim() == 4 else y[0]

    def _view(self, matrix: Callable[[Tensor], Tensor]) -> View:
        """The view, its masks as matrices."""
        mask, grad_mask = (None if each is None else matrix(each) for each in (self.mask, self.grad_mask))
        return View(self.kind, self.threshold, mask, grad_mask, self.alpha)

    @property
    def _zeros_around(self) -> tuple[int, int, int, int]:
        """The padding as (top, left, bottom, right)."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return top, left, bottom, right

    def _geometry(self, padding: tuple[int, int, int, int]) -> Geometry:
        return Geometry.of(self.kernel_size, self.stride, padding, self.dilation, self.groups)

    def input_flags(self, flags: Tensor) -> Tensor | None:
        return self._geometry((0, 0, 0, 0)).input_flags(flags)

    def choose_backend(self, asked: str) -> Backend:
        backend = super().choose_backend(asked)
        narrow = self.groups > 1 and min(self.unit_shape) < NARROWEST
        if narrow and backend.name in ("fused", "block"):
            return replace(backend, name="triton", reason=f"a convolution of {self.groups} narrow groups is not fused")
        return backend

    def oriented(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [out, kh kw in/groups]; a copy unless it is channels-last."""
        return tensor.permute(0, 2, 3, 1).flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """`oriented` undone: [out, kh kw in/groups] -> the weight's shape; a view."""
        out, inputs, height, width = self.dense_shape
        return matrix.reshape(out, height, width, inputs).permute(0, 3, 1, 2)

    @property
    def unit_shape(self) -> tuple[int, int]:
        """(out, in) channels of a group: what blocks and groups of m must divide, so that none straddles a kernel
        position or a group of the convolution."""
        return self.weight.shape[0] // self.groups, self.weight.shape[1]

    def seen(self, weight: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        mask = None if view.mask is None else self._matrix(view.mask)
        return self._tensor(effective_weight_reference(self._matrix(weight), view._replace(mask=mask), dtype))

    def _in_memory_order(self) -> bool:
        # Views but those with a threshold a block are elementwise in each row, whose order is then free: the weight's
        # own costs no copy.
        return self.weight.is_contiguous() and (self.threshold is None or self.threshold.dim() < 2)

    def _matrix(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(1) if self._in_memory_order() else self.oriented(tensor)

    def _tensor(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight.shape) if self._in_memory_order() else self.stored(matrix)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        super()._apply(fn, recurse)
        for name in VIEW_TENSORS:
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape == self.weight.shape and tensor.stride() != self.weight.stride():
                # Beside a channels-last weight the masks are channels-last: their matrices are then views too.
                setattr(self, name, torch.empty_like(self.weight, dtype=tensor.dtype).copy_(tensor))
        return self


def is_depthwise(module: nn.Module) -> bool:
    """A convolution whose groups have one input channel each, and are several."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels and module.groups > 1
