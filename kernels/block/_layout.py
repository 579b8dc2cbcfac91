"""How a weight in blocks lies in memory, and what it must be.

Shared by `gemm.py`, `grad.py` and what is built on them; a check raises ValueError before anything is computed.
"""
# N, K: rows and columns of the weight as a matrix. R, C: rows and columns of its blocks, of r x c elements each

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._operands import FLOATS, check_triton_dtype, refuse
from ._index import check_index
from .topology import grid_of

__all__ = ["BlockLayout", "check_bias", "check_layout", "check_weight"]


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Where the blocks of a weight, or of its gradient, are and how they are stored.

    Attributes:
        index: `[index_size(R, C)]`, int32, which blocks there are (`topology.py`).
        block: r and c; multiples of 16 for the Triton back end. Blocks at the far edges may be smaller.
        shape: N and K, of the matrix.
        transposed: the matrix is stored `[K, N]`, as transformers' Conv1D does.
        count: blocks stored one after the other, `[count, r, c]`, contiguous: those of the index row by row of blocks,
            and room behind them. None: the whole matrix is stored.
    """

    index: Tensor
    block: tuple[int, int]
    shape: tuple[int, int]
    transposed: bool = False
    count: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """R and C."""
        return -(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """What a weight, or its gradient, has to be."""
        if self.count is not None:
            return self.count, *self.block
        return self.shape[::-1] if self.transposed else self.shape


def check_layout(function: str, layout: BlockLayout, backend: str) -> None:
    """Refuse a layout that contradicts itself, or that the back end does not take."""
    block = layout.block
    if backend not in ("torch", "triton"):
        raise ValueError(f'{function}: expected backend "torch" or "triton", got {backend!r}; pass either')
    rows, columns = grid_of(function, layout.shape, block)
    if layout.transposed and layout.count is not None:
        raise ValueError(
            f"{function}: expected packed blocks of a matrix that is not transposed, got both; pack the weight as "
            f"[N, K]"
        )
    if backend == "triton" and (block[0] % 16 or block[1] % 16):
        raise ValueError(
            f'{function}: expected blocks whose sides are multiples of 16 for backend="triton", got '
            f'{block[0]} x {block[1]}; pass backend="torch", which takes any'
        )
    check_index(function, layout.index, rows, columns)


def check_weight(function: str, weight: Tensor, layout: BlockLayout, backend: str) -> None:
    """Refuse a weight in blocks that does not fit its layout or the back end."""
    check_layout(function, layout, backend)
    shape, packed = layout.stored_shape, layout.count is not None
    if not (weight.shape == shape and weight.dtype in FLOATS and (not packed or weight.is_contiguous())):
        refuse(
            function,
            f"weight to be a floating-point {list(shape)}{', contiguous' if packed else ''}",
            weight,
            "pack_blocks makes packed blocks" if packed else "pass it as the layout says",
        )
    check_triton_dtype(function, "weight", weight.dtype, backend)
    if layout.index.device != weight.device:
        refuse(function, f"the layout's index on {weight.device}", layout.index, "build it on the weight's device")


def check_bias(function: str, bias: Tensor | None, n: int, x: Tensor) -> None:
    """Refuse a bias that is not added to the n results of x as it is."""
    if bias is not None and not (bias.shape == (n,) and bias.dtype == x.dtype and bias.device == x.device):
        refuse(function, f"bias to be {x.dtype} [{n}] on {x.device}", bias, "cast the bias with x")
