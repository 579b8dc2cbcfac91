"""The kernel of `gemm.py` and its launcher: a product of gathered rows by the view, for Y and for dX alike.

Rows are positions of the result, in the order (batch, row, column); channels are neighbours in memory. What a row reads
at a kernel position is that at position 0, moved by one number, unless the walk divides (`_conv_tiles.Walk`).
"""

# M positions of the result (batch, rows, columns)   N its channels in a group   K channels reduced in a group

from __future__ import annotations

import torch
from torch import Tensor

from .._tiles import GROUP, grouped_tile, input_precision, limits_of
from .._triton import INTERPRETED, tl, triton
from ..block.topology import sections
from ..fused.gemm import SUM_TILE, _sum_splits_kernel
from ..weight.forward import sigmoid, strides
from ._operands import Block, blocks_of, channels_last, input_blocks
from ._tiles import ConvTiles, Geometry, Walk, conv_tiles

__all__ = ["launch_conv"]


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
            w = tl.where(kept, w, 0.0)
        elif threshold is not None:
            w = w.to(tl.float32)
            if THRESHOLD_ALONG_K:
                t = tl.load(threshold + (group * K + o_k) * stride_t, mask=in_k, other=0.0)[None, :]
                if SOFT:
                    t = sigmoid(t)
            kept = ~(tl.abs(w) <= t)
            if SOFT:
                w = tl.where(w > 0, w - t, w + t)
            w = tl.where(kept, w, 0.0)
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


def launch_conv(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    walks: tuple[list[Walk], list[Walk]],
    geometry: Geometry,
    threshold: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    block: Block | None,
    kind: str,
    exchanged: bool,
    tiles: ConvTiles | None,
) -> Tensor:
    """Writes the walked results of x into y, which is channels-last; `exchanged`: y is dX, x is dY."""
    # In the kernel's letters: dX reduces over what the forward results in.
    n, k = weight.shape[0] // geometry.groups, weight.shape[1] // geometry.taps
    channels, rows = k, n
    (stride_wn, stride_wk), (stride_mn, stride_mk) = strides(weight), strides(mask)
    stride_wg, stride_wt, stride_mg, stride_mt = (
        rows * stride_wn, channels * stride_wk, rows * stride_mn, channels * stride_mk
    )  # fmt: skip
    listed: tuple[Tensor | None, ...] = (None, None, None)
    if index is not None and block is not None:
        sides = input_blocks(weight, block, geometry) if exchanged else blocks_of(weight, block)
        parts_of_index = sections(index, *sides)
        listed = (parts_of_index.row_start, parts_of_index.row_block, parts_of_index.row_order)
    if exchanged:
        n, k, stride_wn, stride_wk, stride_mn, stride_mk = k, n, stride_wk, stride_wn, stride_mk, stride_mn
        block = None if block is None else (block[1], block[0])
    if not y.numel():
        return y
    x = channels_last(x)
    precision = input_precision(x.dtype)
    batch, _, height, width = y.shape
    if tiles is None:
        per_phase = batch * -(-height // walks[0][0].every) * -(-width // walks[1][0].every)
        tiles = conv_tiles(
            per_phase, n, k, max(walk.taps for walk in walks[0]) * max(walk.taps for walk in walks[1]),
            groups=geometry.groups, weight_bytes=weight.element_size(), x_bytes=x.element_size(),
            mask_bytes=0 if mask is None else 1, precision=precision, limits=limits_of(x.device), block=block,
        )  # fmt: skip
    # One threshold for the matrix is read at stride 0, along whichever axis.
    per_row = threshold is not None and threshold.numel() > 1
    # Half of what 32 bits reach: what lies beyond an edge is computed, too, before it is masked.
    reach = max(
        sum(size * step for size, step in zip(each.shape, each.stride(), strict=True)) for each in (x, y, weight)
    )
    offset = tl.int32 if reach < 2**30 else tl.int64
    into = y
    if tiles.splits > 1:
        parts = y.new_empty((tiles.splits, batch, height, width, y.shape[1]), dtype=torch.float32)
        into = parts[0].permute(0, 3, 1, 2)
    with torch.cuda.device_of(x):
        for down in walks[0]:
            for along in walks[1]:
                part = into[:, :, down.first :: down.every, along.first :: along.every]
                m = batch * part.shape[2] * part.shape[3]
                grid = triton.cdiv(m, tiles.m) * triton.cdiv(n, tiles.n) * geometry.groups * tiles.splits
                if not grid:
                    continue
                _conv_gemm_kernel[(grid,)](
                    part, x, weight, threshold, mask, bias, *listed, m, n, k, geometry.groups,
                    part.shape[2], part.shape[3], x.shape[2], x.shape[3],
                    part.stride(0), part.stride(2), part.stride(3), x.stride(0), x.stride(2), x.stride(3),
                    stride_wg, stride_wn, stride_wk, stride_wt,
                    threshold.stride(0) if threshold is not None and per_row else 0,
                    stride_mg, stride_mn, stride_mk, stride_mt,
                    down.mul, down.offset, down.step, along.mul, along.offset, along.step,
                    down.taps * along.taps, max(along.taps, 1),
                    down.tap * geometry.kernel[1] + along.tap, down.tap_step * geometry.kernel[1], along.tap_step,
                    y.numel(), SOFT=kind == "soft", THRESHOLD_ALONG_K=exchanged and per_row,
                    DIVISOR_H=down.divisor, DIVISOR_W=along.divisor, INPUT_PRECISION=precision, UPCAST=INTERPRETED,
                    BLOCK_N=None if block is None else block[0], BLOCK_K=None if block is None else block[1],
                    FLAT=tiles.flat, SPLITS=tiles.splits, TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, GROUP=GROUP,
                    OFFSET=offset, SMALL=max(geometry.kernel) <= 16,
                    num_warps=tiles.num_warps, num_stages=tiles.num_stages,
                )  # fmt: skip
        if tiles.splits > 1:
            _sum_splits_kernel[(triton.cdiv(y.numel(), SUM_TILE),)](
                y, parts, bias, y.numel(), y.shape[1], ACTIVATION=None, SPLITS=tiles.splits, SUM_TILE=SUM_TILE,
                num_warps=4,
            )  # fmt: skip
    return y
