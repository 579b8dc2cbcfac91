"""How a weight in blocks lies in memory, what it must be, and the dense matrix that it stands for.

Shared by `gemm.py`, `grad.py` and what is built on them; a check raises ValueError before anything is computed.
"""
# N, K: rows and columns of the weight as a matrix. R, C: rows and columns of its blocks, of r x c elements each

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._operands import FLOATS, check_triton_dtype, expect
from ._index import check_index, sections
from .topology import grid_of

__all__ = ["BlockLayout", "check_layout", "check_weight", "dense_weight"]


class BlockLayout(NamedTuple):
    """Where the blocks of a weight, or of its gradient, are and how they are stored.

    Attributes:
        index: `[index_size(R, C)]`, int32, which blocks there are (`topology.py`).
        block: r and c; multiples of 16 for the Triton back end. Blocks at the far edges may be smaller.
        shape: N and K, of the matrix.
        transposed: the matrix is stored `[K, N]`, as transformers' Conv1D does.
        count: blocks stored one after the other, `[count, r, c]`, contiguous: those of the index row by row of blocks,
            and room behind them. None: the whole matrix is stored.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple's own methods are not used
    block: tuple[int, int]
    shape: tuple[int, int]
    transposed: bool = False
    count: int | None = None  # type: ignore[assignment]  # likewise

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
    index, block, shape, transposed, count = layout
    if backend not in ("torch", "triton"):
        raise ValueError(f'{function}: expected backend "torch" or "triton", got {backend!r}; pass either')
    rows, columns = grid_of(function, shape, block)
    if transposed and count is not None:
        raise ValueError(
            f"{function}: expected packed blocks of a matrix that is not transposed, got both; pack the weight as "
            f"[N, K]"
        )
    if backend == "triton" and (block[0] % 16 or block[1] % 16):
        raise ValueError(
            f'{function}: expected blocks whose sides are multiples of 16 for backend="triton", got '
            f'{block[0]} x {block[1]}; pass backend="torch", which takes any'
        )
    check_index(function, index, rows, columns)


def check_weight(function: str, weight: Tensor, layout: BlockLayout, backend: str) -> None:
    """Refuse a weight in blocks that does not fit its layout or the back end."""
    check_layout(function, layout, backend)
    shape, packed = layout.stored_shape, layout.count is not None
    expect(
        weight.shape == shape and weight.dtype in FLOATS and (not packed or weight.is_contiguous()),
        function,
        f"weight to be a floating-point {list(shape)}{', contiguous' if packed else ''}",
        weight,
        "pack_blocks makes packed blocks" if packed else "pass it as the layout says",
    )
    check_triton_dtype(function, "weight", weight.dtype, backend)
    expect(
        layout.index.device == weight.device,
        function,
        f"the layout's index on {weight.device}",
        layout.index,
        "build it beside the weight",
    )


def dense_weight(weight: Tensor, layout: BlockLayout) -> Tensor:
    """The weight [N, K] of a layout, with exact zeros in pruned blocks. Waits for the host.

    Args:
        weight, layout: as given to `block_forward`.

    Returns:
        `[N, K]`, dtype of `weight`, newly allocated.

    Raises:
        ValueError: as `block_forward`.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block._layout import BlockLayout, dense_weight
        >>> from tritonsparse.kernels.block.topology import build_index_reference
        >>> index = build_index_reference(torch.tensor([[False, True]]))
        >>> dense_weight(torch.tensor([[5.0, 6.0, 7.0]]), BlockLayout(index, (1, 2), (1, 3)))
        tensor([[0., 0., 7.]])
    """
    check_weight("dense_weight", weight, layout, "torch")
    index, block, (n, k), transposed, count = layout
    rows, columns = layout.grid
    parts = sections(index, rows, columns)
    kept = int(parts.row_start[-1])
    lines = torch.arange(rows, device=index.device).repeat_interleave(parts.row_start.diff(), output_size=kept)
    places = lines, parts.row_block[:kept].long()
    if count is not None:
        blocks = weight.new_zeros(rows, columns, *block)
        blocks[places] = weight[:kept]
        return blocks.transpose(1, 2).reshape(rows * block[0], columns * block[1])[:n, :k].contiguous()
    flags = torch.zeros(rows, columns, dtype=torch.bool, device=index.device)
    flags[places] = True
    mask = flags.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    # Whatever a pruned block holds, NaN included, is gone.
    return torch.where(mask, weight.t() if transposed else weight, 0.0)
