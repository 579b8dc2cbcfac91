"""The kernels of `grad.py`: the gathered product with its epilogue, and the sum of its parts.

A tile of G stays inside one kernel position, or runs on over several (`flat`). Its reduction is over positions of dY in
the order (batch, row, column), cut into parts where the tiles alone leave multiprocessors idle; the parts are then
summed in order by a second kernel, which has the epilogue. With blocks a program is a slot of a row of them, and one
whose row is shorter returns at once: the grid is that of the full matrix.
"""

# M positions of dY (batch, rows, columns)   N output, K input channels of a group   the matrix is [groups N, taps K]

from __future__ import annotations

from .._tile_view import is_kept, masked_gradient, multiplier_tile, sigmoid, times_sign, times_slope
from .._tiles import grouped_tile, split_columns
from .._triton import tl, triton

# Sizes of images and the walk: kernels made for their divisors would be many, and no faster.
UNSPECIALIZED = (
    *("M", "y_height", "y_width", "x_height", "x_width", "offset_h", "step_h", "offset_w", "step_w"),
    *("taps", "taps_w", "splits"),
)


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    tile, row_start, row_block, row_order, N, K, groups, taps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLAT: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile's rows and columns of the matrix, first and end; its kernel position; its number along the columns.

    The end of the rows is 0 where the index lists no such block.
    """
    if row_start is not None:
        PER_N: tl.constexpr = BLOCK_N // TILE_N
        PER_K: tl.constexpr = BLOCK_K // TILE_K
        i_part, i_block = tile % (PER_N * PER_K), tile // (PER_N * PER_K)
        rows = groups * N // BLOCK_N
        row = tl.load(row_order + i_block % rows)
        start = tl.load(row_start + row)
        slot = i_block // rows
        listed = slot < tl.load(row_start + row + 1) - start
        column = tl.load(row_block + start + slot, mask=listed, other=0)
        i_t = (column // (K // BLOCK_K)).to(tl.int64)
        row, column = row.to(tl.int64), column.to(tl.int64)
        n_first = row * BLOCK_N + i_part % PER_N * TILE_N
        n_end = tl.where(listed, n_first + TILE_N, 0)
        k_first = column * BLOCK_K + i_part // PER_N * TILE_K
        i_column = column * PER_K + i_part // PER_N
        k_end = k_first + TILE_K
    else:
        tiles_n = tl.cdiv(N, TILE_N)
        tiles_k = tl.cdiv(taps * K, TILE_K) if FLAT else tl.cdiv(K, TILE_K)
        i_n, i_column = grouped_tile(tile, tiles_n * groups, tiles_k if FLAT else taps * tiles_k, GROUP)
        # Divisions in 32 bits: after one in 64, ptxas 12 takes every register there is.
        i_n, narrow = i_n.to(tl.int32), i_column.to(tl.int32)
        group = (i_n // tiles_n).to(tl.int64)
        n_first, n_end = group * N + i_n % tiles_n * TILE_N, group * N + N
        i_t = i_column * 0 if FLAT else (narrow // tiles_k).to(tl.int64)
        k_first = i_column * TILE_K if FLAT else i_t * K + narrow % tiles_k * TILE_K
        k_end = tl.cast(taps, tl.int64) * K if FLAT else i_t * K + K
    return n_first, n_end, k_first, k_end, i_t, i_column


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    grad_weight, row_sums, weight, threshold, mask, grad_mask, alpha, g,
    n_first, n_end, k_first, k_end, i_column, rows, columns,
    stride_wn, stride_wk, stride_t, stride_mn, stride_mk, stride_bn, stride_bk,
    SOFT: tl.constexpr, SUBTILES: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Writes dW of a tile, [rows, columns] being the matrix, from its G; and its sums of the threshold's gradient."""
    o_n = n_first + tl.arange(0, TILE_N)
    in_n = o_n < n_end
    on_pruned = 0.0
    if alpha is not None:
        on_pruned = tl.load(alpha).to(tl.float32)
    if threshold is not None:
        s = tl.load(threshold + o_n * stride_t, mask=in_n, other=0.0)
        t = (sigmoid(s) if SOFT else s)[:, None]

    # In parts of TILE_K // SUBTILES columns: with the whole of G, W, masks and dW would not fit into registers.
    WIDTH: tl.constexpr = TILE_K // SUBTILES
    parts = split_columns(g, SUBTILES)
    total = tl.zeros((TILE_N,), dtype=tl.float32)
    for i_part in tl.static_range(SUBTILES):
        o_k = k_first + i_part * WIDTH + tl.arange(0, WIDTH)
        inside = in_n[:, None] & (o_k < k_end)[None, :]
        # Blocks that are kept whole have neither.
        w, kept, in_b = None, inside, None
        if threshold is not None:
            w = tl.load(weight + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk, mask=inside, other=0.0)
            w = w.to(tl.float32)
            kept = is_kept(w, t)
        elif mask is not None:
            kept = tl.load(mask + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk, mask=inside, other=0) != 0
        if grad_mask is not None:
            in_b = tl.load(grad_mask + o_n[:, None] * stride_bn + o_k[None, :] * stride_bk, mask=inside, other=0) != 0
        grad_w = masked_gradient(multiplier_tile(w, kept, in_b, on_pruned, SOFT), parts[i_part])
        tl.store(grad_weight + o_n[:, None] * columns + o_k[None, :], grad_w, mask=inside)
        if SOFT:
            # Summed part by part: terms kept for one sum at the end would spill.
            total += tl.sum(times_sign(w, grad_w), axis=1)
    if SOFT:
        tl.store(row_sums + i_column * rows + o_n, times_slope(s, total), mask=in_n)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _conv_grad_kernel(  # type: ignore[no-untyped-def]
    grad_weight,
    row_sums,
    parts,
    grad_y,
    x,
    weight,
    threshold,
    mask,
    grad_mask,
    alpha,
    row_start,
    row_block,
    row_order,
    M,
    N,
    K,
    groups,
    taps,
    taps_w,
    splits,
    y_height,
    y_width,
    x_height,
    x_width,
    stride_yb,
    stride_yh,
    stride_yw,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_wn,
    stride_wk,
    stride_t,
    stride_mn,
    stride_mk,
    stride_bn,
    stride_bk,
    mul_h,
    offset_h,
    step_h,
    mul_w,
    offset_w,
    step_w,
    SOFT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLAT: tl.constexpr,
    SUBTILES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i_split = (program % splits).to(tl.int32)
    n_first, n_end, k_first, k_end, i_t, i_column = _place(
        program // splits, row_start, row_block, row_order, N, K, groups, taps, BLOCK_N, BLOCK_K, FLAT, TILE_N, TILE_K,
        GROUP,
    )  # fmt: skip
    if n_end == 0:
        return
    group = (n_first.to(tl.int32) // N).to(tl.int64)
    o_n = n_first + tl.arange(0, TILE_N)
    in_n = o_n < n_end
    o_k = k_first + tl.arange(0, TILE_K)
    in_k = o_k < k_end
    if FLAT:
        o_t, o_c = o_k.to(tl.int32) // K, o_k.to(tl.int32) % K
        d_h, d_w = (o_t // taps_w * step_h)[None, :], (o_t % taps_w * step_w)[None, :]
    else:
        o_c = o_k - i_t * K
        d_h, d_w = i_t.to(tl.int32) // taps_w * step_h, i_t.to(tl.int32) % taps_w * step_w
    p_y = grad_y + o_n
    p_x = x + (group * K + o_c)

    tiles_m = tl.cdiv(M, TILE_M)
    share = tl.cdiv(tiles_m, splits)
    first = i_split * share
    # [TILE_N, TILE_K]
    g = tl.zeros((TILE_N, TILE_K), dtype=tl.float32)
    # One step at least, of zeros: `fused/gemm.py` says why.
    for step in range(tl.maximum(tl.minimum(share, tiles_m - first), 1)):
        o_m = (first + step) * TILE_M + tl.arange(0, TILE_M)
        in_m = o_m < M
        o_b = (o_m // (y_height * y_width)).to(tl.int64)
        o_p = o_m % (y_height * y_width)
        o_h, o_w = o_p // y_width, o_p % y_width
        o_y = o_b * stride_yb + o_h.to(tl.int64) * stride_yh + o_w.to(tl.int64) * stride_yw
        left = tl.load(p_y[:, None] + o_y[None, :], mask=in_n[:, None] & in_m[None, :], other=0.0)
        x_h, x_w = (o_h * mul_h + offset_h)[:, None] + d_h, (o_w * mul_w + offset_w)[:, None] + d_w
        in_x = (x_h >= 0) & (x_h < x_height) & (x_w >= 0) & (x_w < x_width)
        o_x = (o_b * stride_xb)[:, None] + x_h.to(tl.int64) * stride_xh + x_w.to(tl.int64) * stride_xw
        right = tl.load(p_x[None, :] + o_x, mask=in_x & in_m[:, None] & in_k[None, :], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        g = tl.dot(left, right, g, input_precision=INPUT_PRECISION)

    columns = tl.cast(taps, tl.int64) * K
    if parts is None:
        _finish(
            grad_weight, row_sums, weight, threshold, mask, grad_mask, alpha, g, n_first, n_end, k_first, k_end,
            i_column, groups * N, columns, stride_wn, stride_wk, stride_t, stride_mn, stride_mk, stride_bn, stride_bk,
            SOFT, SUBTILES, TILE_N, TILE_K,
        )  # fmt: skip
    else:
        p_parts = parts + i_split * (groups * N * columns) + o_n[:, None] * columns + o_k[None, :]
        tl.store(p_parts, g, mask=in_n[:, None] & in_k[None, :])


@triton.jit(do_not_specialize=("taps", "splits"))
def _finish_splits_kernel(  # type: ignore[no-untyped-def]
    grad_weight,
    row_sums,
    parts,
    weight,
    threshold,
    mask,
    grad_mask,
    alpha,
    row_start,
    row_block,
    row_order,
    N,
    K,
    groups,
    taps,
    splits,
    stride_wn,
    stride_wk,
    stride_t,
    stride_mn,
    stride_mk,
    stride_bn,
    stride_bk,
    SOFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLAT: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n_first, n_end, k_first, k_end, _, i_column = _place(
        program, row_start, row_block, row_order, N, K, groups, taps, BLOCK_N, BLOCK_K, FLAT, TILE_N, TILE_K, GROUP
    )
    if n_end == 0:
        return
    o_n = n_first + tl.arange(0, TILE_N)
    o_k = k_first + tl.arange(0, TILE_K)
    columns = tl.cast(taps, tl.int64) * K
    p_parts = parts + o_n[:, None] * columns + o_k[None, :]
    inside = (o_n < n_end)[:, None] & (o_k < k_end)[None, :]
    g = tl.zeros((TILE_N, TILE_K), dtype=tl.float32)
    for _split in range(splits):
        g += tl.load(p_parts, mask=inside, other=0.0)
        p_parts += groups * N * columns
    _finish(
        grad_weight, row_sums, weight, threshold, mask, grad_mask, alpha, g, n_first, n_end, k_first, k_end,
        i_column, groups * N, columns, stride_wn, stride_wk, stride_t, stride_mn, stride_mk, stride_bn, stride_bk,
        SOFT, 1, TILE_N, TILE_K,
    )  # fmt: skip
