"""Packed activations: what the backward of a linear layer keeps of its input, in a quarter of the memory.

    X_hat = X where not |X| < T and X != 0, in rows that count; 0 elsewhere      [M, K]

    bits         int32 [M, ceil(K/32)]   bit j of word w of row r: position (r, 32 w + j) is kept
    values       [capacity]              the kept elements of X, row by row; zeros behind them
    row_offsets  int64 [M + 1]           row r's values lie at row_offsets[r] : row_offsets[r + 1]

SWAT (arXiv:2001.01969, algorithm 1) multiplies the output gradient by X_hat where the chain rule has X. An exact
zero is never stored: it adds nothing to that product, and after a ReLU the k-th magnitude may itself be 0.
A NaN is stored, so it reaches the gradient as it would from X.

The capacity is fixed before the count is known, so that shapes are static. What does not fit is not stored,
and `overflow` says so; nobody may go on from there (`packing.py` packs again with room for all). A value that was not
stored unpacks as NaN, never as 0. Called by `packing.py`; `grad_weight.py` and `conv2d.py` read it.
"""
# M rows of x (tokens)   K columns (features)   W = ceil(K/32) words a row

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._eager import as_dtype, on_device_of
from .._operands import check_triton_dtype, compute_dtype
from .._triton import require, tl, triton
from .bits import pack_bits, unpack_bits, word_positions

__all__ = ["check_backend", "pack_activation", "unpack_activation"]

# Columns that a program takes at a time: with 4 warps one 16-byte load of a 2-byte dtype for each thread.
TILE = 1024
NUM_WARPS = 4


def _kept(x: Tensor, cutoff: Tensor, row_mask: Tensor | None) -> Tensor:
    magnitude = as_dtype(x, compute_dtype(x)).abs()
    # "not <" rather than ">=": a NaN is kept.
    kept = ~(magnitude < as_dtype(cutoff, magnitude.dtype)[:, None]) & (x != 0)
    return kept if row_mask is None else kept & row_mask[:, None]


def pack_activation_reference(
    x: Tensor, cutoff: Tensor, row_mask: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of `pack_activation`; on a GPU it waits for the count of what it keeps."""
    kept = _kept(x, cutoff, row_mask)
    row_offsets = F.pad(kept.sum(1).cumsum(0), (1, 0))
    # Boolean indexing says the same, six times slower on a CPU.
    chosen = x.reshape(-1)[kept.reshape(-1).nonzero()[:capacity, 0]]
    values = F.pad(chosen, (0, capacity - chosen.numel()))
    return pack_bits(kept), values, row_offsets, row_offsets[-1] > capacity


def unpack_activation_reference(bits: Tensor, values: Tensor, row_offsets: Tensor, k: int) -> Tensor:
    """The definition of `unpack_activation`; on a GPU it waits for the count of what was kept."""
    if not bits.numel():
        return values.new_zeros((bits.shape[0], k))
    kept = unpack_bits(bits, k)
    missing = int(row_offsets[-1]) - values.numel()
    if missing > 0:
        values = F.pad(values, (0, missing), value=float("nan"))
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)


@triton.jit
def _activation_bits_kernel(  # type: ignore[no-untyped-def]
    bits,
    counts,
    x,
    cutoff,
    row_mask,
    K,
    stride_xm,
    stride_xk,
    stride_c,
    stride_r,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    words = tl.cdiv(K, 32)
    counted = True
    if row_mask is not None:
        counted = tl.load(row_mask + row * stride_r) != 0
    t = tl.load(cutoff + row * stride_c)
    o_bit = tl.arange(0, 32)
    count = 0
    for i_word in range(0, words, TILE // 32):
        o_word = i_word + tl.arange(0, TILE // 32)
        o_k = o_word[:, None].to(tl.int64) * 32 + o_bit[None, :]
        # [TILE / 32, 32]; a position outside the row reads as 0, which is never kept.
        element = tl.load(x + row * stride_xm + o_k * stride_xk, mask=o_k < K, other=0.0).to(tl.float32)
        kept = (~(tl.abs(element) < t) & (element != 0) & counted).to(tl.int32)
        tl.store(bits + row * words + o_word, tl.sum(kept << o_bit[None, :], axis=1), mask=o_word < words)
        count += tl.sum(kept)
    tl.store(counts + row, count)


@triton.jit
def _pack_activation_kernel(  # type: ignore[no-untyped-def]
    values,
    x,
    bits,
    row_offsets,
    K,
    capacity,
    stride_xm,
    stride_xk,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    words = tl.cdiv(K, 32)
    position = tl.load(row_offsets + row)
    for i_word in range(0, words, TILE // 32):
        kept, o_value, position = word_positions(bits, position, row, i_word, words, TILE)
        o_k = (i_word + tl.arange(0, TILE // 32))[:, None].to(tl.int64) * 32 + tl.arange(0, 32)[None, :]
        element = tl.load(x + row * stride_xm + o_k * stride_xk, mask=o_k < K, other=0.0)
        tl.store(values + o_value, element, mask=kept & (o_value < capacity))


@triton.jit
def _unpack_activation_kernel(  # type: ignore[no-untyped-def]
    x,
    bits,
    values,
    row_offsets,
    K,
    capacity,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    words = tl.cdiv(K, 32)
    position = tl.load(row_offsets + row)
    for i_word in range(0, words, TILE // 32):
        kept, o_value, position = word_positions(bits, position, row, i_word, words, TILE)
        o_k = (i_word + tl.arange(0, TILE // 32))[:, None].to(tl.int64) * 32 + tl.arange(0, 32)[None, :]
        element = tl.load(values + o_value, mask=kept & (o_value < capacity), other=float("nan"))
        tl.store(x + row * K + o_k, tl.where(kept, element, 0.0), mask=o_k < K)


def _launch_pack_activation(
    x: Tensor, cutoff: Tensor, row_mask: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, k = x.shape
    bits = x.new_empty((m, -(-k // 32)), dtype=torch.int32)
    counts = x.new_empty(m, dtype=torch.int32)
    values = x.new_zeros(capacity)
    with on_device_of(x):
        if m:
            _activation_bits_kernel[(m,)](
                bits, counts, x, cutoff, row_mask, k,
                x.stride(0), x.stride(1), cutoff.expand(m).stride(0), 0 if row_mask is None else row_mask.stride(0),
                TILE=TILE, num_warps=NUM_WARPS,
            )  # fmt: skip
        row_offsets = F.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))
        if m:
            _pack_activation_kernel[(m,)](
                values, x, bits, row_offsets, k, capacity, x.stride(0), x.stride(1), TILE=TILE, num_warps=NUM_WARPS
            )
    return bits, values, row_offsets, row_offsets[-1] > capacity


def _launch_unpack_activation(bits: Tensor, values: Tensor, row_offsets: Tensor, k: int) -> Tensor:
    x = values.new_empty((bits.shape[0], k))
    if x.numel():
        with on_device_of(x):
            _unpack_activation_kernel[(x.shape[0],)](
                x, bits, values, row_offsets, k, values.numel(), TILE=TILE, num_warps=NUM_WARPS
            )
    return x


def pack_activation(
    x: Tensor, cutoff: Tensor, row_mask: Tensor | None, capacity: int, backend: str = "torch"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x` where not |x| < cutoff, as bits and values in row-major order; in two passes over `x`.

    Comparisons are in float32 (float64 for float64 x). Places come from prefix sums, so repeated calls agree bit for
    bit. The Triton back end neither waits for the device nor resists capture; the reference waits. Operands are the
    caller's to check.

    Args:
        x: `[M, K]`, float16/bfloat16/float32, float64 with the torch back end; any strides.
        cutoff: `[1]`, or `[M]` for one a row; float32 (float64 beside a float64 x). NaN keeps all, +inf keeps nothing
            finite.
        row_mask: `[M]`, bool, True = counted; a row that is not keeps nothing. None = all.
        capacity: values that fit, at least 0.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        `bits`: `[M, ceil(K/32)]`, int32; complete whether or not the values fit.
        `values`: `[capacity]`, dtype of x, zeros behind the last value.
        `row_offsets`: `[M + 1]`, int64; the last is the number kept, which may exceed `capacity`.
        `overflow`: 0-dim bool, on x's device: values are missing.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.activation.compress import pack_activation
        >>> pack_activation(torch.tensor([[3.0, -1.0], [2.0, -4.0]]), torch.tensor([3.0]), None, 3)[:3]
        (tensor([[1],
                [2]], dtype=torch.int32), tensor([ 3., -4.,  0.]), tensor([0, 1, 2]))
    """
    if backend == "torch":
        return pack_activation_reference(x, cutoff, row_mask, capacity)
    return _launch_pack_activation(x, cutoff, row_mask, capacity)


def unpack_activation(bits: Tensor, values: Tensor, row_offsets: Tensor, k: int, backend: str = "torch") -> Tensor:
    """The dense X_hat `[M, K]`, K = `k`, of what `pack_activation` returned; NaN where a value did not fit.

    Contiguous, newly allocated, dtype of `values`. `backend` as there.
    """
    if backend == "torch":
        return unpack_activation_reference(bits, values, row_offsets, k)
    return _launch_unpack_activation(bits, values, row_offsets, k)


def check_backend(function: str, x: Tensor, backend: str) -> None:
    """Refuse a back end that is unknown, or that cannot take `x`."""
    if backend not in ("torch", "triton"):
        raise ValueError(f'{function}: expected backend "torch" or "triton", got {backend!r}; pass either')
    check_triton_dtype(function, "x", x.dtype, backend)
    if backend == "triton":
        require(function, x)
