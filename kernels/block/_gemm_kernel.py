"""The kernel of `gemm.py`: one tile of the result after another, from the blocks that its line keeps.

A work item is one tile of the result: part of a block row and TILE_M rows of x. Items go longest row first, so that
programs end together whoever takes them, and a group of tiles of x stays in the L2 while it passes through all rows.
Where there are few items, one row that keeps much would outlast all others: a row longer than what each program has on
average is cut into parts (`_parts`), which are summed in order. Which rows those are is read from the index.
The index of the next block is carried in a loop variable: loaded where it is used it would halve the copies of a tile
that Triton's pipeline holds in flight (`tests/kernels/compile_kernels.py` holds it to as many as stages). W is the
right operand, of which Hopper's matrix instruction takes any multiple of 8 columns: narrow blocks fit.
"""

# M rows of x (tokens)   N results   K the reduction; a line is a block row (forward) or a block column (dX)

from __future__ import annotations

from .._tiles import grouped_tile, split_columns
from .._triton import tl, triton


@triton.jit
def _parts(p_start, line, lines, tiles, programs, TILES_K: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """In how many parts a line's steps are taken, for `tiles` items of each line without parts."""
    steps = (tl.load(p_start + line + 1) - tl.load(p_start + line)) * TILES_K
    fair = tl.cdiv(tl.load(p_start + lines).to(tl.int64) * TILES_K * tiles, programs).to(tl.int32)
    parts = tl.minimum(tl.cdiv(steps, tl.maximum(fair, 1)), SPLITS)
    # A part is written and read again: half as much again is let pass.
    return tl.where(2 * steps <= 3 * fair, 1, parts)


@triton.jit(do_not_specialize=["ROWS", "COLUMNS"])
def _block_gemm_kernel(  # type: ignore[no-untyped-def]
    y,
    y_parts,
    x,
    weight,
    bias,
    index,
    M,
    N,
    K,
    ROWS,
    COLUMNS,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    ALONG_COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    N_FIRST: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SIDE_N: tl.constexpr,
    SIDE_K: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    SUBTILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    TILES_N: tl.constexpr = SIDE_N // TILE_N
    TILES_K: tl.constexpr = SIDE_K // TILE_K
    # Sections of the index, in the order of `_index.Sections`.
    entries = tl.cast(ROWS, tl.int64) * COLUMNS + 1
    p_start, p_order = index, index + (ROWS + 1) + entries + (COLUMNS + 1) + 2 * entries
    p_block, lines = p_start + ROWS + 1, ROWS
    p_position = p_block
    if ALONG_COLUMNS:
        p_start, p_order = index + (ROWS + 1) + entries, p_order + ROWS
        p_block, lines = p_start + COLUMNS + 1, COLUMNS
        p_position = p_block + entries

    tiles_m, tiles_n = tl.cdiv(M, TILE_M), lines * TILES_N
    for item in range(tl.program_id(0), tiles_m * tiles_n * SPLITS, tl.num_programs(0)):
        i_split = item % SPLITS
        i_m, i_n = grouped_tile(item // SPLITS, tiles_m, tiles_n, GROUP)
        line = tl.load(p_order + i_n // TILES_N)
        # Within the line's blocks; of the result.
        o_side = i_n % TILES_N * TILE_N
        i_n = line * SIDE_N + o_side
        o_m = tl.cast(i_m, tl.int64) * TILE_M + tl.arange(0, TILE_M)
        o_n = i_n.to(tl.int64) + tl.arange(0, TILE_N)
        o_k = tl.arange(0, TILE_K)
        in_n = o_n < N

        first = tl.load(p_start + line)
        steps = (tl.load(p_start + line + 1) - first) * TILES_K
        begin, end, parts = 0, steps, 1
        if SPLITS > 1:
            parts = _parts(p_start, line, lines, tiles_m * TILES_N, tl.num_programs(0), TILES_K, SPLITS)
            share = tl.cdiv(steps, parts)
            begin = tl.minimum(i_split * share, steps)
            end = tl.minimum(begin + share, steps)
        if not DESCRIPTORS:
            # Rows beyond the last are read as the last, and not stored.
            p_x = x + tl.minimum(o_m, M - 1)[:, None] * stride_xm + o_k.to(tl.int64)[None, :] * stride_xk
            p_w = weight + o_k.to(tl.int64)[:, None] * stride_wk
            p_w += tl.arange(0, TILE_N).to(tl.int64)[None, :] * stride_wn

        # [TILE_M, TILE_N]
        product = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
        block = tl.load(p_block + first + begin // TILES_K)
        position = tl.load(p_position + first + begin // TILES_K) if PACKED and ALONG_COLUMNS else block
        for step in range(begin, end):
            i_side = step % TILES_K * TILE_K
            i_k = block * SIDE_K + i_side
            w_n, w_k = i_n, i_k
            if PACKED and ALONG_COLUMNS:
                w_n, w_k = o_side, position * SIDE_K + i_side
            elif PACKED:
                w_n, w_k = (first + step // TILES_K) * SIDE_N + o_side, i_side
            ahead = first + (step + 1) // TILES_K
            block = tl.load(p_block + ahead)
            if PACKED and ALONG_COLUMNS:
                position = tl.load(p_position + ahead)

            if DESCRIPTORS:
                x_tile = x.load([i_m * TILE_M, i_k])
                w = weight.load([w_n, w_k]).T if N_FIRST else weight.load([w_k, w_n])
            else:
                p_w_tile = p_w + (tl.cast(w_n, tl.int64) * stride_wn + tl.cast(w_k, tl.int64) * stride_wk)
                p_x_tile = p_x + i_k.to(tl.int64) * stride_xk
                in_k = i_k + o_k < K
                if EVEN_K:
                    x_tile = tl.load(p_x_tile)
                    w = tl.load(p_w_tile) if EVEN_N else tl.load(p_w_tile, mask=in_n[None, :], other=0.0)
                else:
                    x_tile = tl.load(p_x_tile, mask=in_k[None, :], other=0.0)
                    w = tl.load(p_w_tile, mask=in_k[:, None] & in_n[None, :], other=0.0)
            w = w.to(x_tile.dtype)
            if UPCAST:
                x_tile, w = x_tile.to(tl.float32), w.to(tl.float32)
            product = tl.dot(x_tile, w, product, input_precision=INPUT_PRECISION)

        # Rows that go to y; of a line in several parts they go to [SPLITS, M, N] in fp32, for _sum_line_parts_kernel.
        rows, rows_apart = M, 0
        if SPLITS > 1:
            mine = tl.where(i_split < parts, M, 0)
            rows, rows_apart = tl.where(parts == 1, mine, 0), tl.where(parts == 1, 0, mine)
        subtiles = split_columns(product, SUBTILES)
        for i_subtile in tl.static_range(SUBTILES):
            o_n = i_n.to(tl.int64) + i_subtile * (TILE_N // SUBTILES) + tl.arange(0, TILE_N // SUBTILES)
            in_n = o_n < N
            subtile = subtiles[i_subtile]
            if SPLITS > 1:
                p_part = y_parts + (tl.cast(i_split, tl.int64) * M + o_m)[:, None] * N + o_n[None, :]
                tl.store(p_part, subtile, mask=(o_m < rows_apart)[:, None] & in_n[None, :])
            if bias is not None:
                subtile += tl.load(bias + o_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
            p_y = y + o_m[:, None] * N + o_n[None, :]
            tl.store(p_y, subtile, mask=(o_m < rows)[:, None] & in_n[None, :])


@triton.jit
def _sum_line_parts_kernel(  # type: ignore[no-untyped-def]
    y,
    y_parts,
    bias,
    p_start,
    total,
    N,
    lines,
    tiles,
    programs,
    SIDE_N: tl.constexpr,
    TILES_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SUM_TILE: tl.constexpr,
):
    o_y = tl.program_id(0).to(tl.int64) * SUM_TILE + tl.arange(0, SUM_TILE)
    o_n = o_y % N
    # Lines in one part are in y already.
    line = tl.minimum(o_n // SIDE_N, lines - 1).to(tl.int32)
    parts = _parts(p_start, line, lines, tiles, programs, TILES_K, SPLITS)
    inside = (o_y < total) & (parts > 1)
    p_part = y_parts + o_y
    product = tl.load(p_part, mask=inside, other=0.0)
    for i_split in tl.static_range(1, SPLITS):
        p_part += total
        product += tl.load(p_part, mask=inside & (i_split < parts), other=0.0)
    if bias is not None:
        product += tl.load(bias + o_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + o_y, product, mask=inside)
