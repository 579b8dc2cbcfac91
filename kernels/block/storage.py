"""Blocks of a weight as they are stored: the kept ones packed one after the other, and the matrix that they stand for.

Packed blocks [nnz, r, c] stand in row-major order, as `row_block` of the index lists them (`_index.py`). There may be
more places than kept blocks. Nothing here waits for the device.
"""
# N, K: rows and columns of the weight as a matrix. R, C: rows and columns of its blocks, of r x c elements each

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._index import sections
from ._layout import BlockLayout, check_weight
from .topology import grid_of

__all__ = ["as_blocks", "as_matrix", "dense_weight", "listed_blocks", "pack_blocks", "places", "unpack_blocks"]


def places(index: Tensor, rows: int, columns: int, count: int) -> Tensor:
    """Where each of `count` packed blocks stands among the R C blocks, row-major; R C behind the kept ones. int64."""
    parts = sections(index, rows, columns)
    position = torch.arange(count, dtype=torch.int32, device=index.device)
    row = torch.searchsorted(parts.row_start, position, right=True) - 1
    # There may be more places than entries of the list.
    column = parts.row_block[position.clamp(max=rows * columns)]
    return torch.where(row < rows, row * columns + column, rows * columns)


def listed_blocks(index: Tensor, rows: int, columns: int) -> Tensor:
    """The flags `[rows, columns]` of the blocks that an index lists."""
    flags = torch.zeros(rows * columns + 1, dtype=torch.bool, device=index.device)
    # What lies behind the list falls on the entry behind the flags.
    flags[places(index, rows, columns, rows * columns)] = True
    return flags[:-1].view(rows, columns)


def as_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """A matrix as its blocks `[R C, r, c]`, row-major, zeros beyond its edges."""
    (r, c), (n, k) = block, matrix.shape
    rows, columns = grid_of("as_blocks", (n, k), block)
    padded = F.pad(matrix, (0, columns * c - k, 0, rows * r - n)) if n % r or k % c else matrix
    return padded.reshape(rows, r, columns, c).transpose(1, 2).reshape(rows * columns, r, c)


def as_matrix(blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix `[N, K]` of blocks `[R C, r, c]`, contiguous; what stands out over its edges is cut off."""
    _, r, c = blocks.shape
    rows, columns = grid_of("as_matrix", shape, (r, c))
    matrix = blocks.reshape(rows, columns, r, c).transpose(1, 2).reshape(rows * r, columns * c)
    return matrix[: shape[0], : shape[1]].contiguous()


def pack_blocks(matrix: Tensor, index: Tensor, block: tuple[int, int], count: int) -> Tensor:
    """The kept blocks of a matrix, in the order of the index; differentiable.

    Args:
        matrix: `[N, K]` of any dtype and strides, N and K multiples of the block's sides.
        index: `[index_size(R, C)]`, int32.
        block: rows and columns of a block.
        count: blocks to return, of at least the number kept; those behind are 0.

    Returns:
        `[count, r, c]`, contiguous, newly allocated.

    Raises:
        ValueError: the block does not divide the matrix, or the index is of another shape.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.storage import pack_blocks
        >>> from tritonsparse.kernels.block.topology import build_index_reference
        >>> index = build_index_reference(torch.tensor([[False, True]]))
        >>> pack_blocks(torch.tensor([[1, 2, 3, 4]]), index, (1, 2), 1)
        tensor([[[3, 4]]])
    """
    (n, k), (r, c) = matrix.shape, block
    rows, columns = grid_of("pack_blocks", (n, k), block)
    if n % r or k % c:
        raise ValueError(
            f"pack_blocks: expected a matrix that divides into blocks of {r}x{c}, got {[n, k]}; pad it with zeros"
        )
    place = places(index, rows, columns, count)
    kept = place < rows * columns
    place = place.clamp(max=rows * columns - 1)
    blocks = matrix.reshape(rows, r, columns, c).transpose(1, 2)[place // columns, place % columns]
    zero = torch.zeros((), dtype=matrix.dtype, device=matrix.device)
    return torch.where(kept[:, None, None], blocks, zero).contiguous()


def unpack_blocks(values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix `[N, K]` of packed blocks, 0 elsewhere; differentiable.

    Args:
        values: `[>= nnz, r, c]`, any dtype; what lies behind the kept blocks does not matter.
        index: `[index_size(R, C)]`, int32.
        shape: N and K; blocks at the far edges may be cut off.

    Returns:
        `[N, K]`, contiguous, newly allocated.

    Raises:
        ValueError: the index is of another shape.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.storage import unpack_blocks
        >>> from tritonsparse.kernels.block.topology import build_index_reference
        >>> index = build_index_reference(torch.tensor([[False, True]]))
        >>> unpack_blocks(torch.tensor([[[3, 4]]]), index, (1, 4))
        tensor([[0, 0, 3, 4]])
    """
    count, r, c = values.shape
    rows, columns = grid_of("unpack_blocks", shape, (r, c))
    # One block more than there are takes whatever lies behind the kept ones.
    blocks = values.new_zeros((rows * columns + 1, r, c))
    blocks = blocks.index_put((places(index, rows, columns, count),), values)[:-1]
    return as_matrix(blocks, shape)


def dense_weight(weight: Tensor, layout: BlockLayout) -> Tensor:
    """The weight [N, K] of a layout, with exact zeros in pruned blocks, whatever these hold.

    Args:
        weight, layout: as given to `block_forward`.

    Returns:
        `[N, K]`, dtype of `weight`, newly allocated.

    Raises:
        ValueError: as `block_forward`.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.storage import BlockLayout, dense_weight
        >>> from tritonsparse.kernels.block.topology import build_index_reference
        >>> index = build_index_reference(torch.tensor([[False, True]]))
        >>> dense_weight(torch.tensor([[5.0, 6.0, 7.0]]), BlockLayout(index, (1, 2), (1, 3)))
        tensor([[0., 0., 7.]])
    """
    check_weight("dense_weight", weight, layout, "torch")
    if layout.count is not None:
        return unpack_blocks(weight, layout.index, layout.shape)
    (r, c), (n, k) = layout.block, layout.shape
    mask = listed_blocks(layout.index, *layout.grid).repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
    return torch.where(mask, weight.t() if layout.transposed else weight, 0.0)
