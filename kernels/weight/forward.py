"""Threshold and cast: the effective weight S(W) that the forward multiplies by, in one pass over the dense weight.

    w_hat[n, k] = S(W[n, k])  in the dtype of the product      kinds: `view.py`; definition: `reference.py`

W `[N, K]` is the dense master weight and is only read. A program handles one tile of 64 x 64. Called by `op.py`, which
has the gradient.
"""
# N: rows of the weight (output features)
# K: columns of the weight (input features)

from __future__ import annotations

import torch
from torch import Tensor

from .._eager import on_device_of
from .._operands import check_out_dtype
from .._tile_view import effective_tile, is_kept, sigmoid
from .._triton import require, tl, triton
from .reference import effective_weight_reference
from .view import View, check_view

__all__ = ["cast", "threshold_cast"]

# Side of the square a program handles: small enough that the backward keeps both fp32 operands in registers without
# spills.
TILE = 64
# 4 warps leave each thread 32 elements: eight independent 16-byte loads of fp32 in flight.
NUM_WARPS = 4


@triton.jit
def load_cutoff(  # type: ignore[no-untyped-def]
    threshold,
    o_n,
    o_k,
    N,
    stride_tn,
    stride_tk,
    block_n,
    block_k,
    inside,
    SOFT: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):
    """The cut-offs of rows o_n, `[rows, 1]`, or of the weights at o_n, o_k where there is one per block."""
    if PER_BLOCK:
        o_t = (o_n // block_n * stride_tn)[:, None] + (o_k // block_k * stride_tk)[None, :]
        t = tl.load(threshold + o_t, mask=inside, other=0.0)
    else:
        t = tl.load(threshold + o_n * stride_tn, mask=o_n < N, other=0.0)[:, None]
    if SOFT:
        t = sigmoid(t)
    return t


@triton.jit
def _threshold_cast_kernel(  # type: ignore[no-untyped-def]
    w_hat,
    weight,
    threshold,
    mask,
    N,
    K,
    stride_wn,
    stride_wk,
    stride_tn,
    stride_tk,
    block_n,
    block_k,
    stride_mn,
    stride_mk,
    SOFT: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    # One axis of programs: the second axis of a grid ends at 65,535. int64 before any multiplication.
    program = tl.program_id(0).to(tl.int64)
    tiles_k = tl.cdiv(K, TILE)
    o_n = program // tiles_k * TILE + tl.arange(0, TILE)
    o_k = program % tiles_k * TILE + tl.arange(0, TILE)
    inside = (o_n < N)[:, None] & (o_k < K)[None, :]

    # [TILE, TILE]
    w = tl.load(weight + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk, mask=inside, other=0.0)
    w = w.to(tl.float32)
    t = 0.0
    if mask is None:
        t = load_cutoff(threshold, o_n, o_k, N, stride_tn, stride_tk, block_n, block_k, inside, SOFT, PER_BLOCK)
        kept = is_kept(w, t)
    else:
        kept = tl.load(mask + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk, mask=inside, other=0) != 0
    tl.store(w_hat + o_n[:, None] * K + o_k[None, :], effective_tile(w, kept, t, SOFT), mask=inside)


def strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))


def threshold_strides(threshold: Tensor | None, weight: Tensor) -> tuple[int, int, int, int]:
    """Strides of a threshold along N and K, and the rows and columns of W that share an element of it."""
    if threshold is None:
        return 0, 0, 1, 1
    n, k = weight.shape
    if threshold.dim() == 1:
        # One threshold for the matrix is a threshold a row at stride 0: no flag, no second kernel.
        return threshold.stride(0) if threshold.shape[0] == n else 0, 0, 1, 1
    return *strides(threshold), n // threshold.shape[0], k // threshold.shape[1]


def _launch(weight: Tensor, view: View, dtype: torch.dtype) -> Tensor:
    n, k = weight.shape
    w_hat = weight.new_empty((n, k), dtype=dtype)
    if n and k:
        with on_device_of(weight):
            _threshold_cast_kernel[(-(-n // TILE) * -(-k // TILE),)](
                w_hat, weight, view.threshold, view.mask, n, k,
                *strides(weight), *threshold_strides(view.threshold, weight), *strides(view.mask),
                SOFT=view.kind == "soft", PER_BLOCK=view.per_block, TILE=TILE, num_warps=NUM_WARPS,
            )  # fmt: skip
    return w_hat


def cast(function: str, weight: Tensor, view: View, dtype: torch.dtype, backend: str) -> Tensor:
    """`threshold_cast` for the function of this name, which has checked its operands."""
    if backend == "torch":
        return effective_weight_reference(weight, view, dtype)
    require(function, weight)
    return _launch(weight, view, dtype)


def threshold_cast(
    weight: Tensor, view: View, *, out_dtype: torch.dtype | None = None, backend: str = "torch"
) -> Tensor:
    """S(W): sign(W) relu(|W| - sigmoid(threshold)), or W where kept; in one pass over the weight.

    Comparisons and the sigmoid are in float32 on the master weight (float64 for float64 weights). S(W) is exactly +0
    wherever it is not kept, whatever W holds there. With T = 0 (kind "soft", threshold -inf) it is W, bit for bit,
    except that -0 becomes +0. A NaN weight is kept, except by a mask.

    Args:
        weight: `[N, K]`, float16/bfloat16/float32, float64 with the torch back end; any strides.
        view: of this weight; its grad_mask and alpha are the gradient's and not read here.
        out_dtype: dtype of S(W); the weight's own if None.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        `[N, K]`, contiguous, newly allocated.

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.weight.forward import threshold_cast
        >>> from tritonsparse.kernels.weight.view import View
        >>> weight = torch.tensor([[0.75, -0.25, -1.0]])
        >>> threshold_cast(weight, View("soft", torch.zeros(1)))  # T = sigmoid(0) = 0.5
        tensor([[ 0.2500,  0.0000, -0.5000]])
    """
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    check_view("threshold_cast", weight, view, backend)
    check_out_dtype("threshold_cast", "out_dtype", out_dtype, backend)
    return cast("threshold_cast", weight, view, out_dtype, backend)
