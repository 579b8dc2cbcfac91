"""dW = m * (dY^T X) in one kernel: the multiplier and the threshold's gradient are the product's epilogue.

    G[N, K]  = dY[M, N]^T X[M, K]                          a weight stored [K, N]: X^T dY, the operands exchanged
    dW       = m * G           m: 1 kept, alpha pruned, 0 outside B
    ds       = -sigma'(s) sum(sign(W) m G)                 soft only (AutoSparse, eqs. 6-8, arXiv:2304.06941)

The definition is `weight/reference.py`'s on the product in the dtype of its operands; here G stays in float32
registers from the product to the multiplier, so it is neither written nor rounded. Per tile, sums over its columns go
to [tiles, N] and are added in order by a second step.

Saves 8 to 10 bytes a weight and needs a product as fast as cuBLAS's in return; `plan.py` says when it is.
"""

# M rows of dY and X (tokens, the reduction)   N rows of the stored weight   K its columns

from __future__ import annotations

import torch
from torch import Tensor

from .._eager import on_device_of, outside_autocast
from .._operands import expect
from .._tile_view import is_kept, masked_gradient, multiplier_tile, sigmoid, times_sign, times_slope
from .._tiles import GROUP, GradTiles, grad_tiles, grouped_tile, input_precision, is_aligned, limits_of, split_columns
from .._triton import INTERPRETED, require, tl, triton
from ..weight.forward import strides
from ..weight.reference import threshold_backward_reference
from ..weight.view import View
from ._operands import check_fused, check_rows

__all__ = ["fused_grad_weight", "product_gradient"]


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    grad_weight,
    weight,
    mask,
    grad_mask,
    g,
    t,
    on_pruned,
    i_n,
    i_k,
    N,
    K,
    stride_wn,
    stride_wk,
    stride_mn,
    stride_mk,
    stride_bn,
    stride_bk,
    SOFT: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Writes dW of the tile at (i_n, i_k) from its G; returns the sums of sign(W) dW over its columns, soft only."""
    o_n, o_k = i_n + tl.arange(0, TILE_N), i_k + tl.arange(0, TILE_K)
    inside = (o_n < N)[:, None] & (o_k < K)[None, :]
    w = None
    if mask is None:
        w = tl.load(weight + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk, mask=inside, other=0.0)
        w = w.to(tl.float32)
        kept = is_kept(w, t)
    else:
        kept = tl.load(mask + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk, mask=inside, other=0) != 0
    in_b = None
    if grad_mask is not None:
        in_b = tl.load(grad_mask + o_n[:, None] * stride_bn + o_k[None, :] * stride_bk, mask=inside, other=0) != 0
    grad_w = masked_gradient(multiplier_tile(w, kept, in_b, on_pruned, SOFT), g)
    tl.store(grad_weight + o_n[:, None] * K + o_k[None, :], grad_w, mask=inside)
    if SOFT:
        # Summed part by part: terms kept for one sum at the end would spill.
        return tl.sum(times_sign(w, grad_w), axis=1)
    return tl.zeros((TILE_N,), dtype=tl.float32)


@triton.jit
def _masked_grad_kernel(  # type: ignore[no-untyped-def]
    grad_weight,
    row_sums,
    left,
    right,
    weight,
    threshold,
    mask,
    grad_mask,
    alpha,
    M,
    N,
    K,
    stride_lm,
    stride_ln,
    stride_rm,
    stride_rk,
    stride_wn,
    stride_wk,
    stride_t,
    stride_mn,
    stride_mk,
    stride_bn,
    stride_bk,
    SOFT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SUBTILES: tl.constexpr,
    LEAST_STEPS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i_n, i_k = grouped_tile(program, tl.cdiv(N, TILE_N), tl.cdiv(K, TILE_K), GROUP)
    o_n = i_n * TILE_N + tl.arange(0, TILE_N)
    o_k = i_k * TILE_K + tl.arange(0, TILE_K)
    in_n, in_k = o_n < N, o_k < K

    o_m = tl.arange(0, TILE_M).to(tl.int64)
    p_left = left + o_n[:, None] * stride_ln + o_m[None, :] * stride_lm
    p_right = right + o_m[:, None] * stride_rm + o_k[None, :] * stride_rk

    # [TILE_N, TILE_K]
    g = tl.zeros((TILE_N, TILE_K), dtype=tl.float32)
    # One step at least, of zeros where M is 0: `gemm.py` says why.
    for i_m in range(tl.maximum(tl.cdiv(M, TILE_M), LEAST_STEPS)):
        in_m = o_m < M - i_m * TILE_M
        a = tl.load(p_left, mask=in_n[:, None] & in_m[None, :], other=0.0)
        b = tl.load(p_right, mask=in_m[:, None] & in_k[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        g = tl.dot(a, b, g, input_precision=INPUT_PRECISION)
        p_left += tl.cast(stride_lm, tl.int64) * TILE_M
        p_right += tl.cast(stride_rm, tl.int64) * TILE_M

    t = 0.0
    if threshold is not None:
        s = tl.load(threshold + o_n * stride_t, mask=in_n, other=0.0)
        t = (sigmoid(s) if SOFT else s)[:, None]
    on_pruned = 0.0
    if alpha is not None:
        on_pruned = tl.load(alpha).to(tl.float32)

    # In parts of TILE_K // SUBTILES columns: W, masks and dW would not fit into registers with the whole of G.
    WIDTH: tl.constexpr = TILE_K // SUBTILES
    parts = split_columns(g, SUBTILES)
    total = tl.zeros((TILE_N,), dtype=tl.float32)
    for i_part in tl.static_range(SUBTILES):
        total += _finish(
            grad_weight, weight, mask, grad_mask, parts[i_part], t, on_pruned,
            i_n * TILE_N, i_k * TILE_K + i_part * WIDTH, N, K,
            stride_wn, stride_wk, stride_mn, stride_mk, stride_bn, stride_bk,
            SOFT, TILE_N, WIDTH,
        )  # fmt: skip
    if SOFT:
        tl.store(row_sums + i_k * N + o_n, times_slope(s, total), mask=in_n)


def _launch(
    left: Tensor, right: Tensor, weight: Tensor, view: View, tiles: GradTiles | None
) -> tuple[Tensor, Tensor | None]:
    (n, k), m = weight.shape, left.shape[0]
    kind, threshold, mask, grad_mask, alpha = view
    precision = input_precision(left.dtype)
    if tiles is None:
        aligned = n % 16 == k % 16 == 0 and is_aligned(left, right)
        tiles = grad_tiles(
            n, k, operand_bytes=left.element_size(), precision=precision, aligned=aligned,
            limits=limits_of(weight.device),
        )  # fmt: skip
    # triton.cdiv takes eleven calls.
    tiles_n, tiles_k = -(-n // tiles.n), -(-k // tiles.k)
    soft = kind == "soft"
    grad_weight = weight.new_empty((n, k))
    row_sums = weight.new_empty((tiles_k, n), dtype=torch.float32) if soft else None
    if weight.numel():
        with on_device_of(weight):
            _masked_grad_kernel[(tiles_n * tiles_k,)](
                grad_weight, row_sums, left, right, weight, threshold, mask, grad_mask, alpha, m, n, k,
                *strides(left), *strides(right), *strides(weight),
                0 if threshold is None else threshold.expand(n).stride(0), *strides(mask), *strides(grad_mask),
                SOFT=soft, INPUT_PRECISION=precision, UPCAST=INTERPRETED, SUBTILES=tiles.subtiles,
                LEAST_STEPS=tiles.least_steps, TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, GROUP=GROUP,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
    if threshold is None:
        return grad_weight, None
    if row_sums is None:
        return grad_weight, torch.zeros_like(threshold)
    return grad_weight, row_sums.sum_to_size(1, threshold.numel()).flatten()


def product_gradient_reference(
    grad_y: Tensor, x: Tensor, weight: Tensor, view: View, transposed: bool
) -> tuple[Tensor, Tensor | None]:
    """The definition of `fused_grad_weight`: the product in the dtype of its operands, then `threshold_backward`'s."""
    with outside_autocast(x):
        dense = x.t() @ grad_y if transposed else grad_y.t() @ x
    return threshold_backward_reference(dense, weight, view)


def product_gradient(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    view: View,
    transposed: bool,
    backend: str,
    tiles: GradTiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`fused_grad_weight` for a caller that has checked its operands."""
    if backend == "torch":
        return product_gradient_reference(grad_y, x, weight, view, transposed)
    left, right = (x, grad_y) if transposed else (grad_y, x)
    return _launch(left, right, weight, view, tiles)


def fused_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    view: View,
    *,
    transposed: bool = False,
    backend: str = "torch",
    tiles: GradTiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dW = m * (dY^T X) and ds, the multiplier applied as the product leaves its registers.

    Where m = 0 the result is a selected 0: a NaN or infinity of the product there reaches neither dW nor ds. Sums
    are in float32 (float64 where all is float64) and in a fixed order: repeated calls agree bit for bit. float32
    operands are multiplied in full float32 unless torch allows tf32 (`_tiles.input_precision`). Capturable in a CUDA
    graph.

    Args:
        grad_y: `[M, N]`, float16/bfloat16/float32 (float64 with the torch back end), any strides.
        x: `[M, K]`, dtype of grad_y, any strides.
        weight: `[N, K]` (`[K, N]` when `transposed`), any of these dtypes and any strides: the dense master.
        view: of this weight; kind "soft", "hard" or "mask" ("step" has a multiplier of its own), with a threshold for
            the matrix or a row.
        transposed: `weight` is stored `[K, N]`, as transformers' Conv1D does.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).
        tiles: configuration of the Triton kernel; computed from the shapes if None.

    Returns:
        `grad_weight`: the weight's shape and dtype, contiguous, newly allocated.
        `grad_threshold`: shape and dtype of the threshold, zeros for "hard"; None for "mask".

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.fused.grad import fused_grad_weight
        >>> from tritonsparse.kernels.weight.view import View
        >>> weight, x, grad_y = torch.tensor([[0.75, -0.25, -1.0]]), torch.tensor([[2.0, 4.0, 8.0]]), torch.ones(1, 1)
        >>> fused_grad_weight(grad_y, x, weight, View("soft", torch.zeros(1), alpha=torch.tensor(0.5)))
        (tensor([[2., 2., 8.]]), tensor([2.]))
    """
    function = "fused_grad_weight"
    check_fused(function, weight, view, backend)
    if view.kind == "step":
        raise ValueError(
            f'{function}: expected kind "soft", "hard" or "mask", got "step"; '
            f"give the dense product to threshold_backward"
        )
    n, k = reversed(weight.shape) if transposed else weight.shape
    check_rows(function, "grad_y", grad_y, n, weight, backend)
    check_rows(function, "x", x, k, weight, backend)
    expect(
        grad_y.shape[0] == x.shape[0] and grad_y.dtype == x.dtype,
        function,
        f"grad_y to have the rows and the dtype of x, {x.shape[0]} and {x.dtype}",
        grad_y,
        "pass both as the forward's product left them",
    )
    if backend == "triton":
        require(function, weight)
    return product_gradient(grad_y, x, weight, view, transposed, backend, tiles)
