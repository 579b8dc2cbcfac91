"""`nn.Conv2d` seen through a view: the same Parameter, a convolution with S(W).

    What = S(W)            as of the matrix [out, kh kw in/groups] (kernels/weight/op.py)
    Y    = conv2d(X, What)

Every padding mode, stride, dilation and grouping is `nn.Conv2d`'s own code. Autograd gives dX from What and the dense
gradient of What, which the view's backward multiplies into dW. The back ends "fused" and "block" have the view inside
the products instead (kernels/conv/conv2d.py), "block" those of kept blocks alone; `auto` takes "fused" for a
convolution whose products were all measured to be faster so (kernels/plan.py). Depthwise and narrowly grouped ones
always have their view beside the vendor's: no tile of ours would be filled.

As a matrix, what methods choose masks on, a weight [out, in/groups, kh, kw] has its columns in the order
(kh, kw, in/groups): a block spans output channels and input channels at one kernel position, n of every m is along
input channels (as AC/DC has it, arXiv:2106.12379), a channel is an output channel. That is also the memory order of
a channels-last weight, where the matrix is a view; elsewhere it is a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block_index import fresh_index, index_of, is_indexed
from .kernels.activation.conv2d import packed_conv2d
from .kernels.conv._operands import input_flags
from .kernels.conv._tiles import Geometry
from .kernels.conv.conv2d import masked_conv2d, prefers_fused
from .kernels.weight.forward import view_reference
from .kernels.weight.op import masked_weight
from .layers import VIEW_TENSORS, SparseLayer

__all__ = ["SparseConv2d", "is_depthwise"]

# Channels of a group, in or out, that fill a tile of our kernels.
NARROWEST = 16


class SparseConv2d(SparseLayer, nn.Conv2d):  # type: ignore[misc]  # Conv2d types its bias otherwise
    """`nn.Conv2d` seen through a view; `weight` [out_channels, in_channels / groups, kh, kw]."""

    stock_class = nn.Conv2d
    transposed = False
    plans_blocks: ClassVar[bool] = False

    def oriented(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [out, kh kw in/groups]; a copy unless it is channels-last."""
        return tensor.permute(0, 2, 3, 1).flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """`oriented` undone: [out, kh kw in/groups] -> the weight's shape; a view."""
        out, inputs, height, width = self.weight.shape
        return matrix.reshape(out, height, width, inputs).permute(0, 3, 1, 2)

    @property
    def unit_shape(self) -> tuple[int, int]:
        """(out, in) channels of a group: what blocks and groups of m must divide, so that none straddles a kernel
        position or a group of the convolution."""
        return self.weight.shape[0] // self.groups, self.weight.shape[1]

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        if self.kind == "dense":
            return self.weight.detach().clone()
        mask = None if self.mask is None else self._matrix(self.mask)
        weight = self._matrix(self.dense_weight())
        return self._tensor(view_reference(weight, self.threshold, mask, self.kind, self.weight.dtype))

    def input_flags(self, flags: Tensor) -> Tensor | None:
        return input_flags(flags, self._geometry((0, 0, 0, 0)))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "dense":
            weight = self.weight
            if self.packs_activation(x) and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
                # The packing op is not on autocast's list.
                weight = weight.to(torch.get_autocast_dtype(x.device.type))  # type: ignore[assignment]
            return self._conv_forward(x, weight, self.bias)
        out_dtype = self.weight.dtype
        # What is made in autocast's dtype at once; x and bias are cast by the convolution itself. float64 stays out.
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            out_dtype = torch.get_autocast_dtype(x.device.type)
        if not self.packs_activation(x) and self._is_inside(x, out_dtype):
            return self._inside(x, out_dtype)
        w_hat = masked_weight(
            self._matrix(self.dense_weight()),
            kind=self.kind,
            threshold=self.threshold,
            mask=None if self.mask is None else self._matrix(self.mask),
            grad_mask=None if self.grad_mask is None else self._matrix(self.grad_mask),
            alpha=self.alpha,
            backend=self._beside,
            out_dtype=out_dtype,
        )
        return self._conv_forward(x, self._tensor(w_hat), self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`nn.Conv2d`'s own, or with the input saved packed where the layer is told so."""
        if not self.packs_activation(x):
            return super()._conv_forward(x, weight, bias)
        assert self.activation_density is not None  # packs_activation
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        else:
            padding = cast(tuple[int, int], self.padding)
        y, cutoff, overflow = packed_conv2d(
            x.to(weight.dtype),
            weight,
            None if bias is None else bias.to(weight.dtype),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            density=self.activation_density,
            cutoff=self.activation_cutoff,
            scope=self.activation_scope,
            slack=self.activation_slack,
            backend=self._beside,
        )
        self.note_packing(cutoff, overflow)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        super()._apply(fn, recurse)
        for name in VIEW_TENSORS:
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape == self.weight.shape and tensor.stride() != self.weight.stride():
                # Beside a channels-last weight the masks are channels-last: their matrices are then views too.
                setattr(self, name, torch.empty_like(self.weight, dtype=tensor.dtype).copy_(tensor))
        return self

    def _choose_backend(self) -> None:
        super()._choose_backend()
        narrow = self.groups > 1 and min(self.unit_shape) < NARROWEST
        if narrow and self.backend in ("fused", "block"):
            self.backend, self.backend_reason = "triton", f"{self.groups} groups have their view beside the product"

    @property
    def _beside(self) -> str:
        """The back end of a view beside the product."""
        return "torch" if self.backend == "torch" else "triton"

    def _is_inside(self, x: Tensor, dtype: torch.dtype) -> bool:
        if self.backend == "fused" or (self.backend == "block" and self.kind == "mask"):
            return True
        if self.backend_choice != "auto" or not x.is_cuda or x.dim() != 4 or torch.compiler.is_compiling():
            return False
        if self.kind == "step" or (self.threshold is not None and self.threshold.dim() == 2):
            return False
        backward = torch.is_grad_enabled() and self.weight.requires_grad
        n, k = self.weight.shape[0], self.weight[0].numel()
        padding = self._zeros_around if self.padding_mode == "zeros" else (0, 0, 0, 0)
        return prefers_fused(
            self._geometry(padding), x.shape[0], (x.shape[2], x.shape[3]), n, k, dtype, self.kind,
            torch.cuda.get_device_name(x.device), backward,
        )  # fmt: skip

    @property
    def _zeros_around(self) -> tuple[int, int, int, int]:
        """The padding as (top, left, bottom, right)."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return top, left, bottom, right

    def _geometry(self, padding: tuple[int, int, int, int]) -> Geometry:
        return Geometry.of(self.kernel_size, self.stride, padding, self.dilation, self.groups)

    def _inside(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """The forward with the view inside the products, of the kept blocks alone under "block"."""
        images = (x if x.dim() == 4 else x[None]).to(out_dtype)
        padding = self._zeros_around
        if self.padding_mode != "zeros":
            images = F.pad(images, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0, 0, 0)
        geometry = self._geometry(padding)
        y = masked_conv2d(
            images,
            self.oriented(self.dense_weight()),
            None if self.bias is None else self.bias.to(out_dtype),
            kernel=geometry.kernel,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            kind=self.kind,
            threshold=self.threshold,
            mask=None if self.mask is None else self.oriented(self.mask),
            grad_mask=None if self.grad_mask is None else self.oriented(self.grad_mask),
            alpha=self.alpha,
            **(self._lists() if self.backend == "block" else {}),
            backend="fused",
            out_dtype=out_dtype,
        )
        return y if x.dim() == 4 else y[0]

    def _lists(self) -> dict[str, Any]:
        """The indices of the kept blocks: the Sparsifier's, or of this forward's own."""
        index, input_index, grad_index = self.block_index, self.input_index, self.grad_index
        if index is None or input_index is None or (not torch.compiler.is_compiling() and not is_indexed(self)):
            index, grad_index, kept = fresh_index(self)
            turned = self.input_flags(kept)
            assert turned is not None  # this class's own
            (input_index,) = index_of(turned)
        return {"index": index, "input_index": input_index, "grad_index": grad_index, "block": self.block}

    def _in_memory_order(self) -> bool:
        # Views but those with a threshold a block are elementwise in each row, whose order is then free: the weight's
        # own costs no copy.
        return self.weight.is_contiguous() and (self.threshold is None or self.threshold.dim() < 2)

    def _matrix(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(1) if self._in_memory_order() else self.oriented(tensor)

    def _tensor(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight.shape) if self._in_memory_order() else self.stored(matrix)


def is_depthwise(module: nn.Module) -> bool:
    """A convolution whose groups have one input channel each, and are several."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels and module.groups > 1
