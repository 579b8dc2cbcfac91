"""The kernel of `grad.py`: tiles of dY^T X whose columns are gathered from the list of a block row.

A program takes a tile of rows of one block row and TILE_K of its columns *gathered* from the block row's list, so that
small blocks fill a tile and nothing is computed that is not wanted: with blocks of 32 a tile is 32 x 128 out of four.
Either axis of W may be the gathered one (`takes_rows`); the lists of block columns serve where its rows are. The kernel
computes the tile's transpose, the gathered axis first: Hopper's matrix instruction has no fewer than 64 rows and as few
as 16 columns.

Grids have room for every block: a program whose part of the list is empty computes nothing, and each writes the zeros
of the blocks missing from its part of the dense row, so that every element of dW has one writer.
"""

# M rows of dY and X (tokens, the reduction)   N a tile's own axis of W   K the gathered one

from __future__ import annotations

import torch
from torch import Tensor

from .._tile_view import masked_gradient
from .._tiles import input_precision, is_aligned, limits_of, split_columns
from .._triton import INTERPRETED, tl, triton
from ._grad_tiles import BlockGradTiles, block_grad_tiles, takes_rows
from ._index import sections
from ._layout import BlockLayout

__all__ = ["launch_block_grad"]

# Entries of a block row's list compared at a time with the blocks of a tile.
LIST_TILE = 64
# Rows of a tile of the second step of a split product.
SUM_ROWS = 16


@triton.jit
def _gathered(start, blocks, i_block, i_part, K, SIDE: tl.constexpr, ALIGNED: tl.constexpr, TILE_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The columns of part i_part of a block row's list: their places in the list, themselves, whether they exist."""
    o_list = i_part * TILE_K + tl.arange(0, TILE_K)
    entry = tl.load(start + i_block) + o_list // SIDE
    listed = entry < tl.load(start + i_block + 1)
    o_k = tl.load(blocks + entry, mask=listed, other=0).to(tl.int64) * SIDE + o_list % SIDE
    # Blocks are multiples of 16 wide, so columns come in runs of 16: loads may be as wide.
    o_k = tl.max_contiguous(tl.multiple_of(o_k, 16), 16)
    in_k = listed & (o_k < K)
    if ALIGNED:
        in_k = tl.max_constancy(in_k, 16)
    return entry, o_k, in_k


@triton.jit
def _places(  # type: ignore[no-untyped-def]
    positions, entry, o_k, in_k, total, stride_k, PACKED: tl.constexpr, SIDE_N: tl.constexpr, SIDE_K: tl.constexpr
):
    """Where columns lie in dW, dense or packed, and which have room there."""
    if PACKED:
        slot = entry if positions is None else tl.load(positions + entry, mask=in_k, other=0)
        first = tl.max_constancy(tl.multiple_of(slot.to(tl.int64) * (SIDE_N * SIDE_K), 16), 16)
        within = tl.max_contiguous(tl.multiple_of(o_k % SIDE_K, 16), 16)
        return first + within * stride_k, in_k & (first < total)
    return o_k * stride_k, in_k


@triton.jit
def _store_zeros(  # type: ignore[no-untyped-def]
    grad_weight, blocks, begin, end, i_part, o_n, in_n, K, stride_gn, stride_gk,
    ALIGNED: tl.constexpr, SIDE_K: tl.constexpr, LIST_TILE: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Zeros in part i_part of dense rows o_n, where its blocks are not among entries begin to end of the list."""
    o_k = i_part * TILE_K + tl.arange(0, TILE_K)
    listed = tl.zeros((TILE_K,), dtype=tl.int32)
    for i_list in range(begin, end, LIST_TILE):
        o_list = i_list + tl.arange(0, LIST_TILE)
        block = tl.load(blocks + o_list, mask=o_list < end, other=-1)
        listed |= tl.max(((o_k // SIDE_K)[:, None] == block[None, :]).to(tl.int32), axis=1)
    empty = (listed == 0) & (o_k < K)
    if ALIGNED:
        empty = tl.max_constancy(empty, 16)
    p_zero = grad_weight + o_k[:, None] * stride_gk + o_n[None, :] * stride_gn
    zeros = tl.zeros((TILE_K, TILE_N), dtype=grad_weight.dtype.element_ty)
    tl.store(p_zero, zeros, mask=empty[:, None] & in_n[None, :])


@triton.jit
def _block_grad_kernel(  # type: ignore[no-untyped-def]
    grad_weight,
    parts,
    left,
    right,
    start,
    blocks,
    positions,
    kept,
    alpha,
    M,
    N,
    K,
    BLOCKS,
    total,
    stride_lm,
    stride_ln,
    stride_rm,
    stride_rk,
    stride_gn,
    stride_gk,
    stride_fn,
    stride_fk,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SPLITS: tl.constexpr,
    SUBTILES: tl.constexpr,
    SIDE_N: tl.constexpr,
    SIDE_K: tl.constexpr,
    LIST_TILE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    ROW_TILES: tl.constexpr = (SIDE_N + TILE_N - 1) // TILE_N
    program = tl.program_id(0).to(tl.int64)
    i_split = program % SPLITS
    i_part = program // SPLITS % tl.cdiv(BLOCKS * SIDE_K, TILE_K)
    i_row = program // SPLITS // tl.cdiv(BLOCKS * SIDE_K, TILE_K)
    i_block = i_row // ROW_TILES
    i_n = i_block * SIDE_N + i_row % ROW_TILES * TILE_N
    begin, end = tl.load(start + i_block), tl.load(start + i_block + 1)
    o_n = i_n + tl.arange(0, TILE_N)
    in_n = (o_n < N) & (o_n < (i_block + 1) * SIDE_N)

    # Of the parts of a split reduction the last has the least to add, and writes the zeros.
    if not PACKED and i_split == SPLITS - 1:
        _store_zeros(
            grad_weight, blocks, begin, end, i_part, o_n, in_n, K, stride_gn, stride_gk,
            ALIGNED, SIDE_K, LIST_TILE, TILE_N, TILE_K,
        )  # fmt: skip

    if begin + i_part * TILE_K // SIDE_K >= end:
        return
    entry, o_k, in_k = _gathered(start, blocks, i_block, i_part, K, SIDE_K, ALIGNED, TILE_K)
    place_k, in_k = _places(positions, entry, o_k, in_k, total, stride_gk, PACKED, SIDE_N, SIDE_K)

    # One step at least, of zeros: `fused/gemm.py` says why.
    steps = tl.maximum(tl.cdiv(tl.cdiv(M, TILE_M), SPLITS), 1)
    i_m = i_split * steps * TILE_M
    o_m = i_m + tl.arange(0, TILE_M)
    p_left = left + o_m[:, None] * stride_lm + o_n[None, :] * stride_ln
    p_right = right + o_k[:, None] * stride_rk + o_m[None, :] * stride_rm

    # [TILE_K, TILE_N]
    g = tl.zeros((TILE_K, TILE_N), dtype=tl.float32)
    for _ in range(steps):
        in_m = i_m + tl.arange(0, TILE_M) < M
        a = tl.load(p_right, mask=in_k[:, None] & in_m[None, :], other=0.0)
        b = tl.load(p_left, mask=in_m[:, None] & in_n[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        g = tl.dot(a, b, g, input_precision=INPUT_PRECISION)
        i_m += TILE_M
        p_left += tl.cast(stride_lm, tl.int64) * TILE_M
        p_right += tl.cast(stride_rm, tl.int64) * TILE_M

    multiplier = tl.full((TILE_K,), 1.0, dtype=tl.float32)
    if kept is not None:
        is_kept = tl.load(kept + i_block * stride_fn + o_k // SIDE_K * stride_fk, mask=in_k, other=0) != 0
        on_pruned = 0.0
        if alpha is not None:
            on_pruned = tl.load(alpha).to(tl.float32)
        multiplier = tl.where(is_kept, 1.0, on_pruned)

    first_n = i_block * SIDE_N if PACKED else 0
    WIDTH: tl.constexpr = TILE_N // SUBTILES
    columns = split_columns(g, SUBTILES)
    for i_sub in tl.static_range(SUBTILES):
        o_row = i_n + i_sub * WIDTH + tl.arange(0, WIDTH)
        inside = in_k[:, None] & ((o_row < N) & (o_row < (i_block + 1) * SIDE_N))[None, :]
        places = place_k[:, None] + ((o_row - first_n) * stride_gn)[None, :]
        result = masked_gradient(multiplier[:, None], columns[i_sub])
        if SPLITS == 1:
            tl.store(grad_weight + places, result, mask=inside)
        else:
            tl.store(parts + i_split * total + places, result, mask=inside)


@triton.jit
def _sum_parts_kernel(  # type: ignore[no-untyped-def]
    grad_weight,
    parts,
    start,
    blocks,
    positions,
    N,
    K,
    BLOCKS,
    total,
    stride_gn,
    stride_gk,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr,
    SIDE_N: tl.constexpr,
    SIDE_K: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    ROW_TILES: tl.constexpr = (SIDE_N + TILE_N - 1) // TILE_N
    program = tl.program_id(0).to(tl.int64)
    i_part = program % tl.cdiv(BLOCKS * SIDE_K, TILE_K)
    i_row = program // tl.cdiv(BLOCKS * SIDE_K, TILE_K)
    i_block = i_row // ROW_TILES
    if tl.load(start + i_block) + i_part * TILE_K // SIDE_K >= tl.load(start + i_block + 1):
        return
    entry, o_k, in_k = _gathered(start, blocks, i_block, i_part, K, SIDE_K, ALIGNED, TILE_K)
    o_n = i_block * SIDE_N + i_row % ROW_TILES * TILE_N + tl.arange(0, TILE_N)
    place_k, in_k = _places(positions, entry, o_k, in_k, total, stride_gk, PACKED, SIDE_N, SIDE_K)
    inside = in_k[:, None] & ((o_n < N) & (o_n < (i_block + 1) * SIDE_N))[None, :]
    first_n = i_block * SIDE_N if PACKED else 0
    places = place_k[:, None] + ((o_n - first_n) * stride_gn)[None, :]
    g = tl.load(parts + places, mask=inside, other=0.0)
    for i_split in tl.static_range(1, SPLITS):
        g += tl.load(parts + tl.cast(total, tl.int64) * i_split + places, mask=inside, other=0.0)
    tl.store(grad_weight + places, g, mask=inside)


def launch_block_grad(
    grad_y: Tensor,
    x: Tensor,
    layout: BlockLayout,
    kept: Tensor | None,
    alpha: Tensor | None,
    out_dtype: torch.dtype,
    tiles: BlockGradTiles | None,
) -> Tensor:
    """`block_grad_weight` of checked operands."""
    block, (n, k), transposed, packed = layout.block, layout.shape, layout.transposed, layout.count is not None
    m, grid = x.shape[0], layout.grid
    lists = sections(layout.index, *grid)
    by_rows = takes_rows((n, k), block, transposed)
    left, right = (grad_y, x) if by_rows else (x, grad_y)
    start, blocks = (lists.row_start, lists.row_block) if by_rows else (lists.column_start, lists.column_block)
    positions = None if by_rows or not packed else lists.column_position
    # Places beyond the number kept, and those beyond the edges in blocks that stand out over them, stay 0.
    allocate = x.new_zeros if packed else x.new_empty
    grad = allocate(layout.stored_shape, dtype=out_dtype)
    strides = (block[1], 1) if packed else (1, n) if transposed else (k, 1)
    stride_f = (0, 0) if kept is None else (kept.stride(0), kept.stride(1))
    (blocks_n, blocks_k), (side_n, side_k), (size_n, size_k), strides, stride_f = (
        (pair if by_rows else pair[::-1]) for pair in (grid, block, (n, k), strides, stride_f)
    )
    precision = input_precision(x.dtype)
    if tiles is None:
        tiles = block_grad_tiles(
            m, (blocks_n, side_n), blocks_k * side_k, operand_bytes=x.element_size(), precision=precision,
            aligned=n % 16 == k % 16 == 0 and is_aligned(grad_y, x), limits=limits_of(x.device),
        )  # fmt: skip
    if not grad.numel():
        return grad
    row_tiles, lists_k = blocks_n * triton.cdiv(side_n, tiles.n), triton.cdiv(blocks_k * side_k, tiles.k)
    split = tiles.splits > 1
    parts = x.new_empty((tiles.splits, *grad.shape), dtype=torch.float32) if split else None
    shared = {"PACKED": packed, "ALIGNED": size_k % 16 == 0, "SPLITS": tiles.splits, "SIDE_N": side_n, "SIDE_K": side_k}
    with torch.cuda.device_of(x):
        _block_grad_kernel[(row_tiles * lists_k * tiles.splits,)](
            grad, parts, left, right, start, blocks, positions, kept, alpha,
            m, size_n, size_k, blocks_k, grad.numel(), *left.stride(), *right.stride(), *strides, *stride_f,
            INPUT_PRECISION=precision, UPCAST=INTERPRETED, SUBTILES=tiles.subtiles, LIST_TILE=LIST_TILE,
            TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, **shared,
        )  # fmt: skip
        if split:
            _sum_parts_kernel[(blocks_n * triton.cdiv(side_n, SUM_ROWS) * lists_k,)](
                grad, parts, start, blocks, positions, size_n, size_k, blocks_k, grad.numel(), *strides,
                TILE_N=SUM_ROWS, TILE_K=tiles.k, num_warps=4, **shared,
            )  # fmt: skip
    return grad
