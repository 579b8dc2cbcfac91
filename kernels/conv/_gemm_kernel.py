"""The kernel of `gemm.py`: a product of gathered rows by the effective weight, for Y and for dX alike.

Rows are positions of the result, in the order (batch, row, column); channels are neighbours in memory. What a row reads
at a kernel position is that at position 0, moved by one number, unless the walk divides (`geometry.Walk`).
"""

# M positions of the result (batch, rows, columns)   N its channels in a group   K channels reduced in a group

from __future__ import annotations

from .._tile_view import effective_tile, is_kept, sigmoid
from .._tiles import grouped_tile
from .._triton import tl, triton

# Sizes of images and the walk: kernels made for their divisors would be many, and no faster.
UNSPECIALIZED = (
    *("M", "y_height", "y_width", "x_height", "x_width", "offset_h", "step_h", "offset_w", "step_w"),
    *("taps", "taps_w", "tap", "tap_step_h", "tap_step_w"),
)


@triton.jit
def _in_image(pixel, size, DIVISOR: tl.constexpr):  # type: ignore[no-untyped-def]
    inside = (pixel >= 0) & (pixel < size * DIVISOR)
    if DIVISOR > 1:
        inside = inside & (pixel % DIVISOR == 0)
    return inside


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _conv_gemm_kernel(  # type: ignore[no-untyped-def]
    y,
    x,
    weight,
    threshold,
    mask,
    bias,
    row_start,
    row_block,
    row_order,
    M,
    N,
    K,
    groups,
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
    stride_wg,
    stride_wn,
    stride_wk,
    stride_wt,
    stride_t,
    stride_mg,
    stride_mn,
    stride_mk,
    stride_mt,
    mul_h,
    offset_h,
    step_h,
    mul_w,
    offset_w,
    step_w,
    taps,
    taps_w,
    tap,
    tap_step_h,
    tap_step_w,
    part_size,
    SOFT: tl.constexpr,
    THRESHOLD_ALONG_K: tl.constexpr,
    DIVISOR_H: tl.constexpr,
    DIVISOR_W: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLAT: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    SMALL: tl.constexpr,
):
    INDEXED: tl.constexpr = row_start is not None
    program = tl.program_id(0).to(tl.int64)
    i_split = (program % SPLITS).to(tl.int32)
    tiles_n = tl.cdiv(N, TILE_N)
    i_m, i_n = grouped_tile(program // SPLITS, tl.cdiv(M, TILE_M), tiles_n * groups, GROUP)
    if INDEXED:
        # The longest rows of blocks first: what ends last is short.
        row = tl.load(row_order + i_n // (BLOCK_N // TILE_N))
        start = tl.load(row_start + row)
        steps = (tl.load(row_start + row + 1) - start) * (BLOCK_K // TILE_K)
        # In 32 bits: after a division in 64, ptxas 12 takes every register there is.
        group = (row // (N // BLOCK_N)).to(tl.int64)
        i_n = row % (N // BLOCK_N) * BLOCK_N + i_n % (BLOCK_N // TILE_N) * TILE_N
    else:
        steps = tl.cdiv(taps * K, TILE_K) if FLAT else taps * tl.cdiv(K, TILE_K)
        group, i_n = i_n // tiles_n, i_n % tiles_n * TILE_N
    share = tl.cdiv(steps, SPLITS)
    first = i_split * share
    count = tl.minimum(share, steps - first)

    o_n = i_n + tl.arange(0, TILE_N)
    in_n = o_n < N
    in_w = in_n
    o_m = i_m * TILE_M + tl.arange(0, TILE_M)
    in_m = o_m < M
    in_x_m = in_m
    if not INDEXED:
        # One step at least, of zeros where there is none to take: `fused/gemm.py` says why.
        in_w, in_x_m = o_n < tl.where(count > 0, N, 0), o_m < tl.where(count > 0, M, 0)
        count = tl.maximum(count, 1)
    # Offsets of 32 bits, where all elements are within their reach, take half the registers.
    o_b = (o_m // (y_height * y_width)).to(OFFSET)
    o_p = (o_m % (y_height * y_width)).to(tl.int32)
    o_h, o_w = o_p // y_width, o_p % y_width
    # The pixel of each position at kernel position 0, before the divisor.
    h_first, w_first = o_h * mul_h + offset_h, o_w * mul_w + offset_w
    o_x = o_b * stride_xb
    if DIVISOR_H * DIVISOR_W == 1:
        o_x += h_first.to(OFFSET) * stride_xh + w_first.to(OFFSET) * stride_xw
    if SMALL:
        # Whether each kernel position lies in the image, in bits: one register a row, where its pixel would take two.
        bits = tl.zeros((TILE_M,), dtype=tl.int32)
        for i_bit in range(taps // taps_w):
            bits |= _in_image(h_first + i_bit * step_h, x_height, DIVISOR_H).to(tl.int32) << i_bit
        for i_bit in range(taps_w):
            bits |= _in_image(w_first + i_bit * step_w, x_width, DIVISOR_W).to(tl.int32) << (i_bit + 16)
        bits = tl.where(in_x_m, bits, 0)
    p_x = x + group * K
    p_w = weight + group * stride_wg
    o_w_n = o_n.to(OFFSET) * stride_wn
    if mask is not None:
        p_mask = mask + group * stride_mg
        o_mask_n = o_n.to(OFFSET) * stride_mn
    elif threshold is not None and not THRESHOLD_ALONG_K:
        t = tl.load(threshold + (group * N + o_n) * stride_t, mask=in_n, other=0.0)[:, None]
        if SOFT:
            t = sigmoid(t)
    if INDEXED:
        next_block = tl.load(row_block + start + first // (BLOCK_K // TILE_K))

    # [TILE_N, TILE_M]
    product = tl.zeros((TILE_N, TILE_M), dtype=tl.float32)
    for step in range(count):
        i = first + step
        if FLAT:
            o_r = i * TILE_K + tl.arange(0, TILE_K)
            in_k = o_r < taps * K
            i_t, o_k = o_r // K, o_r % K
        else:
            if INDEXED:
                block = next_block
                # Loaded a step before it is needed: a load whose address another load makes is not pipelined.
                next_block = tl.load(row_block + start + (i + 1) // (BLOCK_K // TILE_K))
                i_t = block // (K // BLOCK_K)
                i_k = block % (K // BLOCK_K) * BLOCK_K + i % (BLOCK_K // TILE_K) * TILE_K
            else:
                i_t = i // tl.cdiv(K, TILE_K)
                i_k = i % tl.cdiv(K, TILE_K) * TILE_K
            o_k = i_k + tl.arange(0, TILE_K)
            in_k = o_k < K
        t_h, t_w = i_t // taps_w, i_t % taps_w
        o_t = tl.cast(tap + t_h * tap_step_h + t_w * tap_step_w, OFFSET)
        d_h, d_w = t_h * step_h, t_w * step_w
        if FLAT:
            o_t, t_h, t_w, d_h, d_w = o_t[None, :], t_h[:, None], t_w[:, None], d_h[:, None], d_w[:, None]
        if SMALL:
            in_x = ((bits[None, :] >> t_h) & (bits[None, :] >> (t_w + 16)) & 1) != 0
        else:
            in_x = in_x_m[None, :] & _in_image(h_first[None, :] + d_h, x_height, DIVISOR_H)
            in_x = in_x & _in_image(w_first[None, :] + d_w, x_width, DIVISOR_W)
        if DIVISOR_H * DIVISOR_W == 1:
            moved = tl.cast(d_h, OFFSET) * stride_xh + tl.cast(d_w, OFFSET) * stride_xw
        else:
            moved = ((h_first[None, :] + d_h) // DIVISOR_H).to(OFFSET) * stride_xh
            moved += ((w_first[None, :] + d_w) // DIVISOR_W).to(OFFSET) * stride_xw
        if not INDEXED:
            in_x = in_x & in_k[:, None]
        x_tile = tl.load(p_x + (o_x[None, :] + moved + o_k[:, None]), mask=in_x, other=0.0)

        o_c = o_k.to(OFFSET)[None, :]
        o_weight = o_w_n[:, None] + (o_t * stride_wt + o_c * stride_wk)
        if INDEXED:
            # Blocks are whole.
            w = tl.load(p_w + o_weight)
        else:
            w = tl.load(p_w + o_weight, mask=in_w[:, None] & in_k[None, :], other=0.0)
        if mask is not None:
            o_kept = o_mask_n[:, None] + (o_t * stride_mt + o_c * stride_mk)
            kept = tl.load(p_mask + o_kept, mask=in_w[:, None] & in_k[None, :], other=0) != 0
            w = effective_tile(w, kept, 0.0, False)
        elif threshold is not None:
            w = w.to(tl.float32)
            if THRESHOLD_ALONG_K:
                t = tl.load(threshold + (group * K + o_k) * stride_t, mask=in_k, other=0.0)[None, :]
                if SOFT:
                    t = sigmoid(t)
            w = effective_tile(w, is_kept(w, t), t, SOFT)
        w_hat = w.to(x_tile.dtype)
        if UPCAST:
            w_hat, x_tile = w_hat.to(tl.float32), x_tile.to(tl.float32)
        product = tl.dot(w_hat, x_tile, product, input_precision=INPUT_PRECISION)

    if bias is not None and SPLITS == 1:
        product += tl.load(bias + group * N + o_n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    # A split product leaves its parts [SPLITS, B, H, W, C] in fp32 for _sum_splits_kernel.
    o_y = o_b * stride_yb + o_h.to(OFFSET) * stride_yh + o_w.to(OFFSET) * stride_yw
    p_y = y + (i_split * tl.cast(part_size, tl.int64) + group * N)
    tl.store(p_y + (o_y[None, :] + o_n.to(OFFSET)[:, None]), product, mask=in_m[None, :] & in_n[:, None])
