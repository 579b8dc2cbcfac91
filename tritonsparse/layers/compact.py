"""Sparse layers that store only their kept blocks, while the topology stays (`compaction.py` says when).

    compact   W [N, K] -> V [nnz, r, c], and with it W.grad and every state tensor of W's shape
    expand    V -> W, zeros elsewhere

A sparse layer is re-classed into its compact class, which multiplies by packed blocks (kernels/block/packed.py). Its
`weight` stays the same Parameter object under the same name, with other data: optimizers, schedulers and lists of
parameters that somebody keeps go on as they were.
Convolutions are packed in storage and gradient, and unpacked for each forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels.block.packed import pack_blocks, unpack_blocks
from ..kernels.block.topology import block_flags, build_index_reference
from .backend import Backend, packed_block_backend
from .base import SparseLayer, product_dtype
from .bsr import block_product
from .conv2d import SparseConv2d
from .linear import SparseConv1D, SparseLinear
from .reclass import reclass

__all__ = ["CompactLayer", "compact", "expand"]

# What is done to every tensor of a weight's shape that an optimizer keeps.
MapState = Callable[[nn.Parameter, Callable[[Tensor], Tensor]], None]


@dataclass(frozen=True)
class Wide:
    """What a compact layer was in dense storage: shape, strides and back end; `matrix` is its shape as [N, K]."""

    shape: torch.Size
    stride: tuple[int, ...]
    matrix: tuple[int, int]
    backend: Backend


class CompactLayer(SparseLayer):
    """A sparse layer of kind "mask" that stores only its kept blocks; made and unmade in place.

    Attributes:
        weight: Parameter `[max(1, nnz), r, c]`.
        index: int32, which blocks they are.
        mask: None; the index says what it said.
        wide: the layer in dense storage.
    """

    wide_class: type[SparseLayer]
    compacted: ClassVar[bool] = True
    # Whether the forward multiplies by packed blocks, or by the weight that they stand for.
    skips_blocks: ClassVar[bool] = True

    index: Tensor
    wide: Wide

    @property
    def dense_shape(self) -> torch.Size:
        return self.wide.shape

    def unpacked(self, values: Tensor) -> Tensor:
        """Packed blocks as the dense weight, of its shape and strides, zeros elsewhere; differentiable."""
        dense = self.stored(unpack_blocks(values, self.index, self.wide.matrix))
        return dense if dense.stride() == self.wide.stride else dense.contiguous()

    def view_tensor(self, name: str) -> Tensor | None:
        if name != "mask":
            return super().view_tensor(name)
        return self.unpacked(torch.ones_like(self.weight, dtype=torch.bool))

    @torch.no_grad()
    def effective_weight(self, given: Mapping[str, Tensor] | None = None) -> Tensor:
        if given and "weight" in given:
            # Of the dense storage, as the state dict has it.
            weight, mask = given["weight"], given["mask"] if "mask" in given else self.view_tensor("mask")
            assert mask is not None
            return torch.where(mask, weight, 0.0)
        return self.unpacked(self.weight)

    @torch.no_grad()
    def kept_count(self) -> int:
        return int(torch.count_nonzero(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        backend = "triton" if self.backend.name == "block" else "torch"
        return block_product(x, self.weight, self.bias, self.index, self.wide.matrix, backend)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.effective_weight()
        destination[f"{prefix}mask"] = self.view_tensor("mask")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        super()._apply(fn, recurse)
        self.index = self.index.to(self.weight.device)
        # The weight may be on another device now: `auto` begins anew there.
        self.wide = replace(self.wide, backend=super().choose_backend(self.backend.asked))
        return self

    def choose_backend(self, asked: str) -> Backend:
        backend = super().choose_backend(asked)
        if not self.skips_blocks:
            if backend.name == "block":
                return replace(backend, name="triton", reason="a convolution unpacks its blocks")
        elif packed_block_backend(asked, self.weight) == "triton":
            return replace(backend, name="block", reason="packed blocks")
        return backend


class CompactLinear(CompactLayer, SparseLinear):  # type: ignore[misc]  # as SparseLinear
    """`SparseLinear` on packed blocks."""

    wide_class = SparseLinear


class CompactConv1D(CompactLayer, SparseConv1D):  # type: ignore[misc]  # as SparseConv1D
    """`SparseConv1D` on packed blocks of its weight as [N, K]."""

    wide_class = SparseConv1D


class CompactConv2d(CompactLayer, SparseConv2d):  # type: ignore[misc]  # as SparseConv2d
    """`SparseConv2d` that stores packed blocks; its forward unpacks them for the dense library's convolution."""

    wide_class = SparseConv2d
    skips_blocks = False

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.weight
        return nn.Conv2d._conv_forward(self, x, self.unpacked(values.to(product_dtype(x, values))), self.bias)


_COMPACT: dict[type[SparseLayer], type[CompactLayer]] = {
    cls.wide_class: cls for cls in (CompactLinear, CompactConv1D, CompactConv2d)
}


def compact(layer: SparseLayer, map_state: MapState) -> None:
    """Pack a layer of kind "mask" and blocks, whose weights outside the mask are 0, in place."""
    block = layer.block
    assert layer.mask is not None and block is not None  # compaction.py
    flags = block_flags(layer.oriented(layer.mask), block)
    index, count = build_index_reference(flags), max(1, int(flags.sum()))

    def packed(tensor: Tensor) -> Tensor:
        return pack_blocks(layer.oriented(tensor), index, block, count)

    n, k = layer.oriented(layer.weight).shape
    wide = Wide(layer.weight.shape, layer.weight.stride(), (n, k), layer.backend)
    map_state(layer.weight, packed)
    _refill(layer.weight, packed)
    # The topology of the dense storage holds on to the mask that it was made of.
    layer.mask = layer.topology = None
    vars(layer).update(index=index, wide=wide)
    reclass(layer, _COMPACT[type(layer)])
    layer.backend = layer.choose_backend(layer.backend.asked)


def expand(layer: CompactLayer, map_state: MapState) -> None:
    """Undo `compact`, in place: zeros outside the kept blocks."""
    wide = layer.wide

    def dense(tensor: Tensor) -> Tensor:
        made = torch.empty_strided(wide.shape, wide.stride, dtype=tensor.dtype, device=tensor.device)
        return made.copy_(layer.unpacked(tensor))

    mask = dense(torch.ones_like(layer.weight, dtype=torch.bool))
    map_state(layer.weight, dense)
    _refill(layer.weight, dense)
    reclass(layer, layer.wide_class)
    layer.mask, layer.backend = mask, wide.backend
    del layer.index, layer.wide


def _refill(parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    """Give a Parameter and its gradient other data of another shape, under the same identity."""
    data, grad = change(parameter.detach()), parameter.grad
    parameter.grad = None
    # A graph that somebody still holds (the last loss) keeps the Parameter's gradient accumulator alive, which expects
    # the old shape. Torch makes a new one only where the dtype or the device changes: so it changes twice.
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data
    if grad is not None:
        parameter.grad = change(grad)
