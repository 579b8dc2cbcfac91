"""The weight's gradient from a packed input: tiles of X_hat are unpacked inside the product and never stored.

    dW_hat = dY^T X_hat      [N, K] = [M, N]^T [M, K]      accumulated in float32

X_hat comes as `compress.py` packs it (bits, values, row_offsets). The reduction runs over the rows, so each
program walks down all tokens with one tile of the result. Where a tile's values begin in each row is looked
up in a table of counts, four bytes for 32 positions, built for the one call. Called by `linear.py`.
"""
# M rows of x and of grad_y (tokens)   N output features   K input features

from __future__ import annotations

import torch
from torch import Tensor

from .._eager import on_device_of
from .._tiles import input_precision
from .._triton import tl, triton
from .bits import popcount
from .compress import unpack_activation_reference

__all__ = ["packed_grad_weight"]

WORDS_TILE = 128
# (TILE_M, TILE_N, TILE_K, num_warps) by the product's precision. Wide in N, because each tile of X_hat is unpacked
# again for every tile of N. In full float32, without a matrix instruction, anything larger spills (compiled,
# 2026-11-21).
TILES = {"half": (32, 128, 64, 8), "tf32": (32, 64, 64, 8), "ieee": (16, 64, 32, 4)}
# A third tile in flight holds its addresses in registers: 152 instead of 118 on sm_80, so one program instead of two.
NUM_STAGES = 2


def packed_grad_weight_reference(
    grad_y: Tensor, bits: Tensor, values: Tensor, row_offsets: Tensor, k: int, transposed: bool
) -> Tensor:
    """The definition of `packed_grad_weight`: unpack, then the dense library product in the dtype of `values`."""
    x_hat = unpack_activation_reference(bits, values, row_offsets, k)
    return x_hat.t() @ grad_y if transposed else grad_y.t() @ x_hat


@triton.jit
def _word_offsets_kernel(word_offsets, bits, words, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    before = 0
    for start in range(0, words, TILE):
        o_word = start + tl.arange(0, TILE)
        kept = popcount(tl.load(bits + row * words + o_word, mask=o_word < words, other=0))
        tl.store(word_offsets + row * words + o_word, before + tl.cumsum(kept, 0) - kept, mask=o_word < words)
        before += tl.sum(kept)


@triton.jit
def _packed_grad_weight_kernel(  # type: ignore[no-untyped-def]
    grad_weight,
    grad_y,
    bits,
    values,
    row_offsets,
    word_offsets,
    M,
    N,
    K,
    capacity,
    stride_ym,
    stride_yn,
    stride_wn,
    stride_wk,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles_k = tl.cdiv(K, TILE_K)
    o_n = program // tiles_k * TILE_N + tl.arange(0, TILE_N)
    o_k = program % tiles_k * TILE_K + tl.arange(0, TILE_K)
    in_n = o_n < N
    in_k = o_k < K

    words = tl.cdiv(K, 32)
    o_word = program % tiles_k * (TILE_K // 32) + tl.arange(0, TILE_K // 32)
    o_bit = tl.arange(0, 32)
    below = (1 << o_bit) - 1

    total = tl.zeros((TILE_N, TILE_K), dtype=tl.float32)
    # One step at least, of zeros where M is 0: `fused/gemm.py` says why.
    for step in range(tl.maximum(tl.cdiv(M, TILE_M), 1)):
        o_m = (step * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
        in_m = o_m < M
        # [TILE_M, TILE_N]
        g = tl.load(
            grad_y + o_m[:, None] * stride_ym + o_n[None, :] * stride_yn, mask=in_m[:, None] & in_n[None, :], other=0.0
        )
        # [TILE_M, TILE_K / 32]
        inside = in_m[:, None] & (o_word < words)[None, :]
        p_word = o_m[:, None] * words + o_word[None, :]
        word = tl.load(bits + p_word, mask=inside, other=0)[:, :, None]
        first = tl.load(row_offsets + o_m, mask=in_m, other=0)[:, None]
        first += tl.load(word_offsets + p_word, mask=inside, other=0)
        # [TILE_M, TILE_K / 32, 32]; a word is read once and spread, and neighbouring lanes read neighbouring values.
        kept = ((word >> o_bit[None, None, :]) & 1) != 0
        o_value = first[:, :, None] + popcount(word & below[None, None, :])
        x = tl.load(values + o_value, mask=kept & (o_value < capacity), other=float("nan"))
        x = tl.reshape(tl.where(kept, x, 0.0), (TILE_M, TILE_K))
        total = tl.dot(tl.trans(g), x, total, input_precision=PRECISION)

    p_weight = grad_weight + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk
    tl.store(p_weight, total, mask=in_n[:, None] & in_k[None, :])


def _launch_packed_grad_weight(
    grad_y: Tensor, bits: Tensor, values: Tensor, row_offsets: Tensor, k: int, transposed: bool
) -> Tensor:
    m, n = grad_y.shape
    words = bits.shape[1]
    grad_weight = values.new_empty((k, n) if transposed else (n, k))
    if not grad_weight.numel():
        return grad_weight
    stride_wn, stride_wk = (1, n) if transposed else (k, 1)
    precision = input_precision(values.dtype)
    tile_m, tile_n, tile_k, num_warps = TILES[precision if values.dtype == torch.float32 else "half"]
    word_offsets = torch.empty_like(bits)
    with on_device_of(values):
        if m:
            _word_offsets_kernel[(m,)](word_offsets, bits, words, TILE=WORDS_TILE, num_warps=1)
        _packed_grad_weight_kernel[(-(-n // tile_n) * -(-k // tile_k),)](
            grad_weight, grad_y, bits, values, row_offsets, word_offsets, m, n, k, values.numel(),
            grad_y.stride(0), grad_y.stride(1), stride_wn, stride_wk,
            TILE_M=tile_m, TILE_N=tile_n, TILE_K=tile_k, PRECISION=precision,
            num_warps=num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip
    return grad_weight


def packed_grad_weight(
    grad_y: Tensor,
    bits: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    k: int,
    *,
    transposed: bool = False,
    backend: str = "torch",
) -> Tensor:
    """dY^T X_hat of an X_hat packed by `pack_activation`.

    The Triton back end keeps no dense X_hat, neither waits for the device nor resists capture, and sums in a fixed
    order: repeated calls agree bit for bit. float32 products are in TF32 where torch's own are. Operands are the
    caller's to check.

    Args:
        grad_y: `[M, N]`, dtype of `values`, any strides.
        bits, values, row_offsets: as `pack_activation` returned them.
        k: K, the columns of x.
        transposed: return `[K, N]`, the layout of transformers' Conv1D.
        backend: "torch" (unpacks X_hat whole, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        `[N, K]` (`[K, N]` when `transposed`), dtype of `values`, contiguous, newly allocated; NaN in a column of which
        a value did not fit into the pack's capacity.
    """
    if backend == "torch":
        return packed_grad_weight_reference(grad_y, bits, values, row_offsets, k, transposed)
    return _launch_packed_grad_weight(grad_y, bits, values, row_offsets, k, transposed)
