"""The gradient of the effective weight on its way back to the dense weight and its threshold.

    dW = m g, and the threshold's gradient      g = dL/dS(W)      equations and sources: `reference.py`

A program handles one tile of 64 x 64 and leaves sums over its columns, which a second step adds in a fixed order.
"""
# N: rows of the weight (output features)
# K: columns of the weight (input features)

from __future__ import annotations

import torch
from torch import Tensor

from .._eager import on_device_of
from .._operands import FLOATS, check_triton_dtype, expect, refuse
from .._tile_view import (
    is_kept,
    masked_gradient,
    multiplier_tile,
    step_multiplier,
    step_reach,
    step_terms,
    times_sign,
    times_slope,
)
from .._triton import require, tl, triton
from .forward import TILE, load_cutoff, strides, threshold_strides
from .reference import sum_shared, threshold_backward_reference
from .view import View, check_view

__all__ = ["NUM_WARPS", "SUM_COLUMNS", "gradient", "threshold_backward"]

# Columns whose terms of a threshold's gradient are summed before they are written, where thresholds are per block.
SUM_COLUMNS = 16
# With 4, kind "hard" spills on sm_90 and kind "soft" on sm_80.
NUM_WARPS = 8


@triton.jit
def _threshold_backward_kernel(  # type: ignore[no-untyped-def]
    grad_weight,
    sums,
    grad,
    weight,
    threshold,
    mask,
    grad_mask,
    alpha,
    N,
    K,
    stride_gn,
    stride_gk,
    stride_wn,
    stride_wk,
    stride_tn,
    stride_tk,
    block_n,
    block_k,
    stride_mn,
    stride_mk,
    stride_bn,
    stride_bk,
    SOFT: tl.constexpr,
    STEP: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles_k = tl.cdiv(K, TILE)
    o_n = program // tiles_k * TILE + tl.arange(0, TILE)
    o_k = program % tiles_k * TILE + tl.arange(0, TILE)
    in_n = o_n < N
    inside = in_n[:, None] & (o_k < K)[None, :]

    # [TILE, TILE]
    w = None
    if mask is None:
        w = tl.load(weight + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk, mask=inside, other=0.0)
        w = w.to(tl.float32)
        t = load_cutoff(threshold, o_n, o_k, N, stride_tn, stride_tk, block_n, block_k, inside, SOFT, PER_BLOCK)
        kept = is_kept(w, t)
    else:
        kept = tl.load(mask + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk, mask=inside, other=0) != 0
    if STEP:
        reach = step_reach(w, t)
        multiplier = step_multiplier(kept, reach)
    else:
        on_pruned = 0.0
        if alpha is not None:
            on_pruned = tl.load(alpha)
        in_b = None
        if grad_mask is not None:
            in_b = tl.load(grad_mask + o_n[:, None] * stride_bn + o_k[None, :] * stride_bk, mask=inside, other=0) != 0
        multiplier = multiplier_tile(w, kept, in_b, on_pruned, SOFT)
    g = tl.load(grad + o_n[:, None] * stride_gn + o_k[None, :] * stride_gk, mask=inside, other=0.0).to(tl.float32)
    grad_w = masked_gradient(multiplier, g)
    tl.store(grad_weight + o_n[:, None] * K + o_k[None, :], grad_w, mask=inside)

    if sums is not None:
        terms = step_terms(reach, g) if STEP else times_sign(w, grad_w)
        if PER_BLOCK:
            terms = tl.sum(tl.reshape(terms, [TILE, TILE // SUM_COLUMNS, SUM_COLUMNS]), axis=2)
            o_s = program % tiles_k * (TILE // SUM_COLUMNS) + tl.arange(0, TILE // SUM_COLUMNS)
            in_s = in_n[:, None] & (o_s * SUM_COLUMNS < K)[None, :]
            if SOFT:
                o_t = (o_n // block_n * stride_tn)[:, None] + (o_s * SUM_COLUMNS // block_k * stride_tk)[None, :]
                terms = times_slope(tl.load(threshold + o_t, mask=in_s, other=0.0), terms)
            tl.store(sums + o_s[None, :] * N + o_n[:, None], terms, mask=in_s)
        else:
            row_sum = tl.sum(terms, axis=1)
            if SOFT:
                row_sum = times_slope(tl.load(threshold + o_n * stride_tn, mask=in_n, other=0.0), row_sum)
            tl.store(sums + program % tiles_k * N + o_n, row_sum, mask=in_n)


def _launch(grad: Tensor, weight: Tensor, view: View) -> tuple[Tensor, Tensor | None]:
    n, k = weight.shape
    kind, threshold = view.kind, view.threshold
    tiles_n, tiles_k = -(-n // TILE), -(-k // TILE)
    grad_weight = weight.new_empty((n, k))
    sums = None
    if kind in ("soft", "step"):
        sums = weight.new_empty((k // SUM_COLUMNS if view.per_block else tiles_k, n), dtype=torch.float32)
    if weight.numel():
        with on_device_of(weight):
            _threshold_backward_kernel[(tiles_n * tiles_k,)](
                grad_weight, sums, grad, weight, threshold, view.mask, view.grad_mask, view.alpha, n, k,
                *strides(grad), *strides(weight), *threshold_strides(threshold, weight),
                *strides(view.mask), *strides(view.grad_mask),
                SOFT=kind == "soft", STEP=kind == "step", PER_BLOCK=view.per_block,
                TILE=TILE, SUM_COLUMNS=SUM_COLUMNS, num_warps=NUM_WARPS,
            )  # fmt: skip
    if threshold is None:
        return grad_weight, None
    if sums is None:
        return grad_weight, torch.zeros_like(threshold)
    if view.per_block:
        return grad_weight, sum_shared(sums.t(), threshold)
    of_rows = sums.sum(0)
    return grad_weight, of_rows if threshold.shape[0] == n else of_rows.sum(0, keepdim=True)


def _by_kernel(grad: Tensor, weight: Tensor, view: View) -> tuple[Tensor, Tensor | None]:
    require("threshold_backward", weight)
    threshold = view.threshold
    if threshold is not None and view.per_block and view.kind != "hard":
        if threshold.shape == (1, weight.shape[1]):
            # One a column, as a transposed weight has them: one a row of the transposed matrices.
            turned = None if view.grad_mask is None else view.grad_mask.t()
            a_row = view._replace(threshold=threshold[0], grad_mask=turned)
            new, of_rows = _launch(grad.t(), weight.t(), a_row)
            assert of_rows is not None  # a threshold was given
            return new.t().contiguous(), of_rows[None]
        if weight.shape[1] // threshold.shape[1] % SUM_COLUMNS:
            refuse(
                "threshold_backward",
                f'blocks of a multiple of {SUM_COLUMNS} columns for backend="triton"',
                threshold,
                'pass backend="torch", which takes any',
            )
    return _launch(grad, weight, view)


def gradient(grad: Tensor, weight: Tensor, view: View, backend: str) -> tuple[Tensor, Tensor | None]:
    """`threshold_backward` for a caller that has checked the view and made `grad`."""
    if backend == "torch":
        return threshold_backward_reference(grad, weight, view)
    check_triton_dtype("threshold_backward", "grad", grad.dtype, backend)
    return _by_kernel(grad, weight, view)


def threshold_backward(
    grad: Tensor, weight: Tensor, view: View, *, backend: str = "torch"
) -> tuple[Tensor, Tensor | None]:
    """dW = m g and the threshold's gradient, with g = dL/dS(W).

    Where m = 0 the result is a selected 0, not a product: a NaN or infinity in g there reaches neither dW nor
    ds. Where sigmoid'(s) = 0 (s = ±inf) ds is 0 likewise. Sums run in a fixed order: repeated calls agree bit
    for bit.

    Args:
        grad: `[N, K]`, g, any floating dtype (not float64 with the triton back end), any strides.
        weight: as given to `threshold_cast`.
        view: as given to `threshold_cast`.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        `grad_weight`: `[N, K]`, the weight's dtype, contiguous, newly allocated.
        `grad_threshold`: shape and dtype of the threshold, zeros for kind "hard"; None for kind "mask".

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.weight.backward import threshold_backward
        >>> from tritonsparse.kernels.weight.view import View
        >>> weight, grad = torch.tensor([[0.75, -0.25, -1.0]]), torch.tensor([[2.0, 4.0, 8.0]])
        >>> threshold_backward(grad, weight, View("soft", torch.zeros(1), alpha=torch.tensor(0.5)))
        (tensor([[2., 2., 8.]]), tensor([2.]))
    """
    check_view("threshold_backward", weight, view, backend)
    expect(
        grad.shape == weight.shape and grad.dtype in FLOATS and grad.device == weight.device,
        "threshold_backward",
        f"grad to be floating-point {list(weight.shape)} on {weight.device}",
        grad,
        "pass the gradient of the effective weight",
    )
    return gradient(grad, weight, view, backend)
