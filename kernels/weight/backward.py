"""What the gradient of a view becomes on its way back to the dense weight and its threshold.

    dW = m · g     with g = dL/dŴ

    "soft", "hard", "mask":  m = 1 on kept; α on pruned; 0 on pruned positions outside grad_mask, and where W = 0 (soft)
    "soft":                  ds = −sigmoid'(s) · Σ sign(W) · m · g
    "step":                  m = 1[kept] + |W| · H(|W| − t),  dt = −Σ W · H(|W| − t) · g
                             H(q) = 2 − 4|q| up to |q| = 0.4, then 0.4 up to |q| = 1, then 0
    "hard":                  no gradient for the cut-off

Sums run over the weights that share a threshold. The views themselves are `forward.py`'s.

STR is soft with α = 0 (arXiv:2002.03231). AutoSparse is soft with 0 < α (arXiv:2304.06941, eq. 7 and 8: the sum in ds
runs over pruned weights too while α > 0). DST is step with a threshold per row (arXiv:2005.06870, eq. 4 and 6).
Top-KAST is mask with grad_mask = B and α = 1; the paper's B contains A, the mask, so a kept position counts as inside B
whether or not grad_mask says so.
"""
# N: rows of the weight (output features)
# K: columns of the weight (input features)

from __future__ import annotations

import torch

from .._eager import on_device_of
from .._operands import FLOATS, check_alpha, check_estimator, check_operands, check_triton_dtype, expect, refuse
from .._triton import require, tl, triton
from ._reference import gradients_reference, sum_shared, threshold_backward_reference
from .forward import NUM_WARPS, TILE, load_cutoff, sigmoid, strides, threshold_strides

__all__ = ["HARD_WARPS", "SUM_COLUMNS", "gradients_alone", "threshold_backward", "threshold_backward_reference"]

# Columns whose terms of a threshold's gradient are summed before they are written, where thresholds are per block.
SUM_COLUMNS = 16
# Kind "hard" with 4 warps spills two registers on sm_90 to fit a seventh program on a multiprocessor.
HARD_WARPS = 8


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
    if mask is None:
        w = tl.load(weight + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk, mask=inside, other=0.0)
        w = w.to(tl.float32)
        t = load_cutoff(threshold, o_n, o_k, N, stride_tn, stride_tk, block_n, block_k, inside, SOFT, PER_BLOCK)
        pruned = tl.abs(w) <= t
    else:
        kept = tl.load(mask + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk, mask=inside, other=0)
        pruned = kept == 0
    if STEP:
        q = tl.abs(tl.abs(w) - t)
        tail = tl.where(q <= 0.4, 2.0 - 4.0 * q, tl.where(q <= 1.0, 0.4, 0.0))
        reach = tl.where(tail == 0, 0.0, w * tail)
        multiplier = tl.where(pruned, 0.0, 1.0) + tl.abs(reach)
    else:
        on_pruned = 0.0
        if alpha is not None:
            on_pruned = tl.load(alpha)
        if SOFT:
            on_pruned = tl.where(w != 0, on_pruned, 0.0)
        if grad_mask is not None:
            b = tl.load(grad_mask + o_n[:, None] * stride_bn + o_k[None, :] * stride_bk, mask=inside, other=0)
            on_pruned = tl.where(b != 0, on_pruned, 0.0)
        multiplier = tl.where(pruned, on_pruned, 1.0)
    g = tl.load(grad + o_n[:, None] * stride_gn + o_k[None, :] * stride_gk, mask=inside, other=0.0).to(tl.float32)
    grad_w = tl.where(multiplier == 0, 0.0, multiplier * g)
    tl.store(grad_weight + o_n[:, None] * K + o_k[None, :], grad_w, mask=inside)

    if sums is not None:
        if STEP:
            terms = tl.where(reach == 0, 0.0, -reach * g)
        else:
            # −sigmoid'(s) · sign(W) · grad_w; like torch's, the sign of NaN is 0.
            terms = tl.where(w > 0, -grad_w, tl.where(w < 0, grad_w, 0.0))
        if PER_BLOCK:
            terms = tl.sum(tl.reshape(terms, [TILE, TILE // SUM_COLUMNS, SUM_COLUMNS]), axis=2)
            o_s = program % tiles_k * (TILE // SUM_COLUMNS) + tl.arange(0, TILE // SUM_COLUMNS)
            in_s = in_n[:, None] & (o_s * SUM_COLUMNS < K)[None, :]
            if SOFT:
                o_t = (o_n // block_n * stride_tn)[:, None] + (o_s * SUM_COLUMNS // block_k * stride_tk)[None, :]
                s = tl.load(threshold + o_t, mask=in_s, other=0.0)
                slope = sigmoid(s) * sigmoid(-s)
                terms = tl.where(slope == 0, 0.0, slope * terms)
            tl.store(sums + o_s[None, :] * N + o_n[:, None], terms, mask=in_s)
        else:
            row_sum = tl.sum(terms, axis=1)
            if SOFT:
                s = tl.load(threshold + o_n * stride_tn, mask=in_n, other=0.0)
                slope = sigmoid(s) * sigmoid(-s)
                row_sum = tl.where(slope == 0, 0.0, slope * row_sum)
            tl.store(sums + program % tiles_k * N + o_n, row_sum, mask=in_n)


def _launch(
    grad: torch.Tensor,
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    grad_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    n, k = weight.shape
    tiles_n, tiles_k = -(-n // TILE), -(-k // TILE)
    per_block = threshold is not None and threshold.dim() == 2
    grad_weight = weight.new_empty((n, k))
    sums = None
    if kind in ("soft", "step"):
        sums = weight.new_empty((k // SUM_COLUMNS if per_block else tiles_k, n), dtype=torch.float32)
    if weight.numel():
        with on_device_of(weight):
            _threshold_backward_kernel[(tiles_n * tiles_k,)](
                grad_weight, sums, grad, weight, threshold, mask, grad_mask, alpha, n, k,
                *strides(grad), *strides(weight), *threshold_strides(threshold, weight),
                *strides(mask), *strides(grad_mask),
                SOFT=kind == "soft", STEP=kind == "step", PER_BLOCK=per_block,
                TILE=TILE, SUM_COLUMNS=SUM_COLUMNS, num_warps=HARD_WARPS if kind == "hard" else NUM_WARPS,
            )  # fmt: skip
    if threshold is None:
        return grad_weight, None
    if sums is None:
        return grad_weight, torch.zeros_like(threshold)
    if per_block:
        return grad_weight, sum_shared(sums.t(), threshold)
    of_rows = sums.sum(0)
    return grad_weight, of_rows if threshold.shape[0] == n else of_rows.sum(0, keepdim=True)


def _by_kernel(
    grad: torch.Tensor,
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    grad_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    require("threshold_backward", weight)
    if threshold is not None and threshold.dim() == 2:
        if threshold.shape == (1, weight.shape[1]) and kind != "hard":
            # One a column, as beside a transposed weight: one a row of the transposed matrices.
            turned = None if grad_mask is None else grad_mask.t()
            new, of_rows = _launch(grad.t(), weight.t(), threshold[0], None, turned, alpha, kind)
            assert of_rows is not None  # a threshold was given
            return new.t().contiguous(), of_rows[None]
        if kind != "hard" and weight.shape[1] // threshold.shape[1] % SUM_COLUMNS:
            refuse(
                "threshold_backward",
                f'blocks of a multiple of {SUM_COLUMNS} columns for backend="triton"',
                threshold,
                'pass backend="torch", which takes any',
            )
    return _launch(grad, weight, threshold, mask, grad_mask, alpha, kind)


def gradients_alone(
    grad: torch.Tensor,
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    grad_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    kind: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`threshold_backward` for callers that have checked the view and made `grad`; None where there is no threshold."""
    check_triton_dtype("threshold_backward", "grad", grad.dtype, backend)
    check_alpha("threshold_backward", alpha, weight)
    compute = gradients_reference if backend == "torch" else _by_kernel
    return compute(grad, weight, threshold, mask, grad_mask, alpha, kind)


def threshold_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    threshold: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    grad_mask: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    *,
    kind: str,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """dW = m · g and the threshold's gradient, with g = dL/dŴ and m as in the head of this file.

    Where m = 0 the result is a selected 0, not a product: a NaN or infinity in g there reaches neither dW nor
    ds. Where sigmoid'(s) = 0 (s = ±inf) ds is 0 likewise. Sums run in a fixed order: repeated calls agree bit
    for bit.

    Args:
        grad: `[N, K]`, g, any floating dtype (not float64 with the triton back end), any strides.
        weight: as given to `threshold_cast`.
        threshold: as given to `threshold_cast`.
        mask: as given to `threshold_cast`.
        grad_mask: `[N, K]`, bool, True = gradient computed; None = everywhere. Kept positions always count.
        alpha: 0-dim or `[1]`, float32, the multiplier on pruned positions; None = 0. Read on the device.
        kind: "soft", "hard", "step" or "mask"; "step" takes neither grad_mask nor alpha.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        `grad_weight`: `[N, K]`, the weight's dtype, contiguous, newly allocated.
        `grad_threshold`: shape and dtype of `threshold`, zeros for kind "hard"; empty float32 `[0]` for kind "mask".

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.weight.backward import threshold_backward
        >>> weight, grad = torch.tensor([[0.75, -0.25, -1.0]]), torch.tensor([[2.0, 4.0, 8.0]])
        >>> threshold_backward(grad, weight, torch.zeros(1), alpha=torch.tensor(0.5), kind="soft")
        (tensor([[2., 2., 8.]]), tensor([2.]))
    """
    masks = {"mask": mask, "grad_mask": grad_mask}
    check_operands("threshold_backward", weight, threshold, masks, kind, backend)
    expect(
        grad.shape == weight.shape and grad.dtype in FLOATS and grad.device == weight.device,
        "threshold_backward",
        f"grad to be floating-point {list(weight.shape)} on {weight.device}",
        grad,
        "pass the gradient of w_hat",
    )
    check_estimator("threshold_backward", kind, grad_mask, alpha)
    grad_weight, grad_threshold = gradients_alone(grad, weight, threshold, mask, grad_mask, alpha, kind, backend)
    if grad_threshold is None:
        return grad_weight, weight.new_zeros(0, dtype=torch.float32)
    return grad_weight, grad_threshold
