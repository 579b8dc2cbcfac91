"""Modules that hold only the kept blocks of a weight: what `Sparsifier.finalize(format="bsr")` leaves in the model.

    values   Parameter [nnz, r, c]   the kept blocks of W [N, K], in the order of the index
    index    int32 buffer            which they are (kernels/block/topology.py)
    bias     as it was

A stock module is re-classed in place, as sparse layers are, so it stays where its parents know it and under every name
it has. Linear layers and transformers' `Conv1D` become a `BlockLinear`, convolutions of one pixel a `BlockConv2d`.
They train too: gradients and an optimizer's state are of the size of `values`; the topology stays.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.block.packed import pack_blocks, packed_block_linear, unpack_blocks
from ..kernels.block.topology import build_index_reference, grid_of, index_size
from .backend import packed_block_backend
from .base import autocast_operands, product_dtype
from .reclass import reclass

__all__ = ["BLOCK_CLASSES", "BlockConv2d", "BlockLayer", "BlockLinear", "block_product", "packs"]


def block_product(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, shape: tuple[int, int], backend: str
) -> Tensor:
    """`packed_block_linear` in the dtype that autocast asks for; float64 stays out of it, as for torch's own ops."""
    x, bias = autocast_operands(x, bias, product_dtype(x, values))
    return packed_block_linear(x, values, bias, index, shape=shape, backend=backend)


class BlockLayer(nn.Module):
    """What the modules of packed blocks share; never constructed, only re-classed into (`adopt`, `pack`).

    Attributes:
        values: Parameter `[count, r, c]`, count = max(1, kept blocks).
        index: int32 buffer `[index_size(N/r, K/c)]`.
        bias: Parameter `[N]` or None.
        shape: N and K of the weight as a matrix, outputs by inputs.
        block: rows and columns of a block.
        backend: "auto" (Triton's kernels on a GPU), "torch" or "triton".
    """

    values: nn.Parameter
    index: Tensor
    bias: nn.Parameter | None
    shape: tuple[int, int]
    block: tuple[int, int]
    backend: str

    @classmethod
    def adopt(cls, module: nn.Module, block: tuple[int, int], count: int) -> BlockLayer:
        """Re-class a stock module (of `BLOCK_CLASSES`) in place, with room for `count` blocks and none of them kept."""
        weight = cast(Tensor, module.weight)
        shape = matrix_shape(module)
        values = nn.Parameter(weight.new_zeros((count, *block)), requires_grad=weight.requires_grad)
        bias = module._parameters.pop("bias")
        del module._parameters["weight"]
        reclass(module, cls)
        layer = cast(BlockLayer, module)
        layer.shape, layer.block, layer.backend = shape, block, "auto"
        layer.register_parameter("values", values)
        layer.register_parameter("bias", bias)
        size = index_size(*grid_of("adopt", shape, block))
        layer.register_buffer("index", torch.zeros(size, dtype=torch.int32, device=weight.device))
        return layer

    @classmethod
    @torch.no_grad()
    def pack(cls, module: nn.Module, matrix: Tensor, flags: Tensor, block: tuple[int, int]) -> BlockLayer:
        """Re-class a stock module in place, with the blocks of a matrix that flags name.

        Args:
            module: of a class in `BLOCK_CLASSES`.
            matrix: `[N, K]`, the weight as outputs by inputs; blocks divide it.
            flags: `[N/r, K/c]`, bool, True = kept.
            block: rows and columns of a block.
        """
        index = build_index_reference(flags)
        # One block at least, so that no Parameter is empty; it is read by nothing if nothing is kept.
        values = pack_blocks(matrix, index, block, max(1, int(flags.sum())))
        layer = cls.adopt(module, block, len(values))
        layer.values.copy_(values)
        layer.index.copy_(index)
        return layer

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at every read: for code that asks a layer what its weight is."""
        return self.to_dense()

    def to_dense(self) -> Tensor:
        """W as a matrix `[N, K]` with exact zeros; differentiable in `values`."""
        return unpack_blocks(self.values, self.index, self.shape)

    def density(self) -> float:
        """Kept blocks over all blocks. Waits for the device."""
        rows, columns = grid_of("density", self.shape, self.block)
        return int(self.index[rows]) / (rows * columns)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + b over the last dimension of x."""
        return block_product(
            x, self.values, self.bias, self.index, self.shape, packed_block_backend(self.backend, self.values)
        )

    def extra_repr(self) -> str:
        (n, k), (r, c) = self.shape, self.block
        return f"{k}, {n}, bias={self.bias is not None}, blocks={len(self.values)} of {r}x{c}"


class BlockLinear(BlockLayer):
    """y = x Wᵀ + b of packed blocks; in place of `nn.Linear` or `Conv1D`.

    Example:
        >>> import torch
        >>> from tritonsparse.layers.bsr import BlockLinear
        >>> weight = torch.tensor([[0.0, 0.0, 3.0, 4.0]])
        >>> linear = BlockLinear.pack(torch.nn.Linear(4, 1, bias=False), weight, weight.view(1, 2, 2).any(2), (1, 2))
        >>> linear
        BlockLinear(4, 1, bias=False, blocks=1 of 1x2)
        >>> linear(torch.tensor([[9.0, 9.0, 1.0, 2.0]])).detach()
        tensor([[11.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class BlockConv2d(BlockLayer):
    """A convolution of one pixel, of packed blocks: every pixel's channels are a row of x; stays channels-last."""

    stride: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :: self.stride[0], :: self.stride[1]]
        return self.product(x.movedim(-3, -1)).movedim(-1, -3)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[N, K, 1, 1]`, made anew at every read."""
        return self.to_dense()[:, :, None, None]


BLOCK_CLASSES: dict[type[nn.Module], type[BlockLayer]] = {
    nn.Linear: BlockLinear,
    Conv1D: BlockLinear,
    nn.Conv2d: BlockConv2d,
}


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """N and K of a stock module's weight as a matrix, outputs by inputs."""
    shape = cast(Tensor, module.weight).shape
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1:].numel())


def packs(module: nn.Module) -> str | None:
    """Why a layer cannot hold packed blocks; None where it can. A sparse layer is asked as its stock class is."""
    if isinstance(module, nn.Conv2d) and (
        module.kernel_size != (1, 1) or module.groups > 1 or module.padding not in ((0, 0), "valid", "same")
    ):
        return "a convolution of more than one pixel, of groups or with padding"
    return None
