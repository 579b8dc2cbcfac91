"""Y = X S(W)^T and dX = dY S(W) in one kernel each, S(W) computed as W is loaded and never stored.

    forward       Y[M, N]  = X[M, K] S(W)[N, K]^T + b
    grad input    dX[M, K] = dY[M, N] S(W)[N, K]

Both are one product, rows times the transpose of S(W): dX is the forward of W^T, and a weight stored `[K, N]` (Conv1D)
is W^T as well, so strides and the axis of a threshold tell the four cases apart. The kernel computes the transpose,
Y^T = S(W) X^T, because Hopper's matrix instruction takes its left operand from registers: W goes from shared memory to
registers, through the threshold and into the product, and Y is stored transposed.

This saves S(W) its write and its read, 4 of 6 bytes a weight in bf16 under an fp32 master, and computes it again
for every TILE_M rows of X: it can win only where the weight's traffic dominates, which is below about 1,000 rows.
`plan.py` says when. S(W) is `weight/reference.py`'s, rounded to the dtype of X before the product as there.
"""

# M rows of x (tokens)   N rows of S(W) (results)   K columns of S(W) (the reduction)

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._eager import as_dtype, on_device_of, outside_autocast
from .._operands import check_out_dtype, expect
from .._tile_view import effective_tile, is_kept, sigmoid
from .._tiles import GROUP, GemmTiles, gemm_tiles, grouped_tile, input_precision, is_aligned, limits_of
from .._triton import INTERPRETED, require, tl, triton
from ..weight.forward import strides
from ..weight.reference import effective_weight_reference
from ..weight.view import View
from ._operands import check_fused, check_rows

__all__ = ["fused_forward", "fused_grad_input", "product"]

# Elements of Y that a program of the second step of a split product sums.
SUM_TILE = 1024


@triton.jit
def _load_cutoff(p_threshold, inside, SOFT: tl.constexpr):  # type: ignore[no-untyped-def]
    t = tl.load(p_threshold, mask=inside, other=0.0)
    if SOFT:
        t = sigmoid(t)
    return t


@triton.jit
def _masked_gemm_kernel(  # type: ignore[no-untyped-def]
    y,
    x,
    weight,
    threshold,
    mask,
    bias,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_t,
    stride_mn,
    stride_mk,
    SOFT: tl.constexpr,
    THRESHOLD_ALONG_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i_split = program % SPLITS
    i_m, i_n = grouped_tile(program // SPLITS, tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), GROUP)
    o_m = i_m * TILE_M + tl.arange(0, TILE_M)
    o_n = i_n * TILE_N + tl.arange(0, TILE_N)
    in_m, in_n = o_m < M, o_n < N

    # One step at least, of zeros where K is 0: where a loop may take none, ptxas copies the accumulators between its
    # last product and their wait, and serialises every product of the loop.
    tiles = tl.maximum(tl.cdiv(tl.cdiv(K, TILE_K), SPLITS), 1)
    i_k = i_split * tiles * TILE_K
    o_k = i_k + tl.arange(0, TILE_K)
    p_x = x + o_m[None, :] * stride_xm + o_k[:, None] * stride_xk
    p_w = weight + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk
    t_n = 0.0
    if mask is None and not THRESHOLD_ALONG_K:
        t_n = _load_cutoff(threshold + o_n * stride_t, in_n, SOFT)[:, None]

    # [TILE_N, TILE_M]
    product = tl.zeros((TILE_N, TILE_M), dtype=tl.float32)
    for _ in range(tiles):
        o_k = i_k + tl.arange(0, TILE_K)
        in_k = o_k < K
        w = tl.load(p_w, mask=in_n[:, None] & in_k[None, :], other=0.0).to(tl.float32)
        t = t_n
        if mask is None:
            if THRESHOLD_ALONG_K:
                t = _load_cutoff(threshold + o_k * stride_t, in_k, SOFT)[None, :]
            kept = is_kept(w, t)
        else:
            p_mask = mask + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk
            kept = tl.load(p_mask, mask=in_n[:, None] & in_k[None, :], other=0) != 0
        x_tile = tl.load(p_x, mask=in_m[None, :] & in_k[:, None], other=0.0)
        w_hat = effective_tile(w, kept, t, SOFT).to(x_tile.dtype)
        if UPCAST:
            w_hat, x_tile = w_hat.to(tl.float32), x_tile.to(tl.float32)
        product = tl.dot(w_hat, x_tile, product, input_precision=INPUT_PRECISION)
        i_k += TILE_K
        p_x += tl.cast(stride_xk, tl.int64) * TILE_K
        p_w += tl.cast(stride_wk, tl.int64) * TILE_K

    if SPLITS == 1 and bias is not None:
        product += tl.load(bias + o_n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    # A split product leaves its parts [SPLITS, M, N] in fp32 for _sum_splits_kernel.
    p_y = y + i_split * M * N + o_m[None, :] * N + o_n[:, None]
    tl.store(p_y, product, mask=in_m[None, :] & in_n[:, None])


@triton.jit
def _sum_splits_kernel(  # type: ignore[no-untyped-def]
    y, parts, bias, total, N, SPLITS: tl.constexpr, SUM_TILE: tl.constexpr
):
    o_y = tl.program_id(0).to(tl.int64) * SUM_TILE + tl.arange(0, SUM_TILE)
    inside = o_y < total
    product = tl.load(parts + o_y, mask=inside, other=0.0)
    for i_split in tl.static_range(1, SPLITS):
        product += tl.load(parts + tl.cast(total, tl.int64) * i_split + o_y, mask=inside, other=0.0)
    if bias is not None:
        product += tl.load(bias + o_y % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + o_y, product, mask=inside)


def product_reference(
    x: Tensor, weight: Tensor, view: View, bias: Tensor | None, exchanged: bool, out_dtype: torch.dtype
) -> Tensor:
    """The definition of both products: `effective_weight_reference`, then the dense library product."""
    w_hat = effective_weight_reference(weight, view, x.dtype)
    with outside_autocast(x, bias):
        y = F.linear(x, w_hat.t() if exchanged else w_hat, bias)
    return as_dtype(y, out_dtype)


def product(
    x: Tensor,
    weight: Tensor,
    view: View,
    bias: Tensor | None,
    exchanged: bool,
    out_dtype: torch.dtype,
    backend: str,
    tiles: GemmTiles | None = None,
) -> Tensor:
    """x times S(W)^T, or S(W) (exchanged), for a caller that has checked its operands."""
    if backend == "torch":
        return product_reference(x, weight, view, bias, exchanged, out_dtype)
    # The stored matrix, or its transpose (exchanged), is [N, K]; a threshold per row runs along its stored rows.
    (n, k), m = weight.shape, x.shape[0]
    threshold, mask = view.threshold, view.mask
    (stride_wn, stride_wk), (stride_mn, stride_mk) = strides(weight), strides(mask)
    if exchanged:
        n, k, stride_wn, stride_wk, stride_mn, stride_mk = k, n, stride_wk, stride_wn, stride_mk, stride_mn
    # One threshold for the matrix is read at stride 0, along whichever axis. Of no rows there are none to read.
    per_row = threshold is not None and threshold.numel() != 1
    precision = input_precision(x.dtype)
    if tiles is None:
        aligned = n % 16 == k % 16 == 0 and is_aligned(x, weight, mask)
        tiles = gemm_tiles(
            (m, n, k), weight_bytes=weight.element_size(), x_bytes=x.element_size(), masked=mask is not None,
            precision=precision, aligned=aligned, limits=limits_of(x.device),
        )  # fmt: skip
    split = tiles.splits > 1
    y = x.new_empty((m, n), dtype=out_dtype)
    if not y.numel():
        return y
    parts = x.new_empty((tiles.splits, m, n), dtype=torch.float32) if split else y
    with on_device_of(x):
        _masked_gemm_kernel[(-(-m // tiles.m) * -(-n // tiles.n) * tiles.splits,)](
            parts, x, weight, threshold, mask, bias, m, n, k,
            *strides(x), stride_wn, stride_wk,
            threshold.stride(0) if threshold is not None and per_row else 0, stride_mn, stride_mk,
            SOFT=view.kind == "soft", THRESHOLD_ALONG_K=exchanged and per_row, INPUT_PRECISION=precision,
            UPCAST=INTERPRETED, SPLITS=tiles.splits, TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, GROUP=GROUP,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        if split:
            _sum_splits_kernel[(-(-m * n // SUM_TILE),)](
                y, parts, bias, m * n, n, SPLITS=tiles.splits, SUM_TILE=SUM_TILE, num_warps=4
            )
    return y


def fused_forward(
    x: Tensor,
    weight: Tensor,
    view: View,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "torch",
    tiles: GemmTiles | None = None,
) -> Tensor:
    """Y = X S(W)^T + bias, S(W) computed inside the product.

    S(W) is rounded to the dtype of x, products are summed in float32 (float64 where all is float64) with the bias
    before the one rounding to `out_dtype`. float32 operands are multiplied in full float32 unless torch allows tf32
    (`_tiles.input_precision`). Deterministic, capturable in a CUDA graph. A NaN or infinity in x meets the zeros of
    S(W) as in any product.

    Args:
        x: `[M, K]`, float16/bfloat16/float32 (float64 with the torch back end), any strides.
        weight: `[N, K]` (`[K, N]` when `transposed`), any of these dtypes and any strides: the dense master.
        view: of this weight, with a threshold for the matrix or a row, or a mask (`weight/view.py`).
        bias: `[N]`, dtype of x, or None.
        transposed: `weight` is stored `[K, N]`, as transformers' Conv1D does.
        out_dtype: dtype of Y; that of x if None.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).
        tiles: configuration of the Triton kernel; computed from the shapes if None.

    Returns:
        `[M, N]`, contiguous, newly allocated.

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.fused.gemm import fused_forward
        >>> from tritonsparse.kernels.weight.view import View
        >>> weight = torch.tensor([[0.75, -0.25, -1.0]])  # T = sigmoid(0) = 0.5: S(W) = [0.25, 0, -0.5]
        >>> fused_forward(torch.tensor([[4.0, 9.0, 2.0]]), weight, View("soft", torch.zeros(1)))
        tensor([[0.]])
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_fused("fused_forward", weight, view, backend)
    n, k = reversed(weight.shape) if transposed else weight.shape
    check_rows("fused_forward", "x", x, k, weight, backend)
    check_out_dtype("fused_forward", "out_dtype", out_dtype, backend)
    if bias is not None:
        expect(
            bias.shape == (n,) and bias.dtype == x.dtype and bias.device == x.device,
            "fused_forward",
            f"bias to be {x.dtype} [{n}] on {x.device}",
            bias,
            "cast the bias with x",
        )
    if backend == "triton":
        require("fused_forward", weight)
    return product(x, weight, view, bias, transposed, out_dtype, backend, tiles)


def fused_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    view: View,
    *,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "torch",
    tiles: GemmTiles | None = None,
) -> Tensor:
    """dX = dY S(W), S(W) computed inside the product; rounding and repeatability as in `fused_forward`.

    Args:
        grad_y: `[M, N]`, float16/bfloat16/float32 (float64 with the torch back end), any strides.
        weight, view, transposed: as given to `fused_forward`.
        out_dtype: dtype of dX; that of grad_y if None.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).
        tiles: configuration of the Triton kernel; computed from the shapes if None. The kernel's n is dX's K, its k
            dY's N.

    Returns:
        `[M, K]`, contiguous, newly allocated.

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.fused.gemm import fused_grad_input
        >>> from tritonsparse.kernels.weight.view import View
        >>> grad_y, weight = torch.tensor([[2.0]]), torch.tensor([[0.75, -0.25]])
        >>> fused_grad_input(grad_y, weight, View("hard", torch.tensor([0.5])))
        tensor([[1.5000, 0.0000]])
    """
    out_dtype = grad_y.dtype if out_dtype is None else out_dtype
    check_fused("fused_grad_input", weight, view, backend)
    check_rows("fused_grad_input", "grad_y", grad_y, weight.shape[1 if transposed else 0], weight, backend)
    check_out_dtype("fused_grad_input", "out_dtype", out_dtype, backend)
    if backend == "triton":
        require("fused_grad_input", weight)
    return product(grad_y, weight, view, None, not transposed, out_dtype, backend, tiles)
