"""Threshold and cast: what the forward uses of a dense weight, and what the gradient becomes on its way back.

    kind "soft":  Ŵ = sign(W) · relu(|W| − T),  T = sigmoid(s)    kept: not |W| <= T
    kind "mask":  Ŵ = W where mask, 0 elsewhere                   kept: mask

    dW = m · g     with g = dL/dŴ and the multiplier
                   m = 1 on kept; α on pruned; 0 where W = 0 (soft) and on pruned positions outside grad_mask
    ds = −sigmoid'(s) · Σ sign(W) · m · g      over the whole matrix, or over each row (soft)

W `[N, K]` is the dense master weight, Ŵ its sparse view in the dtype of the product, both in dense storage.
The learned cut-off is the logit s, of shape `[1]` (one for the matrix) or `[N]` (one per row).

STR is soft with α = 0 (arXiv:2002.03231). AutoSparse is soft with 0 < α (arXiv:2304.06941, eq. 7 and 8: the
sum in ds runs over pruned weights too while α > 0). Top-KAST is mask with grad_mask = B and α = 1; the
paper's B contains A, the mask, so a kept position counts as inside B whether or not grad_mask says so.

Called by the layer op, which owns autograd; nothing here is registered with torch.library.
"""
# N: rows of the weight (output features)
# K: columns of the weight (input features)

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._operands import FLOATS, check_kind, check_operands, check_triton_dtype, compute_dtype, expect
from ._triton import require, tl, triton

# Side of the square a program handles and `occupancy` counts in: the finest block of the block kernels, and
# small enough that the backward keeps both fp32 operands in registers without spills.
TILE = 64
# 4 warps leave each thread 32 elements: eight independent 16-byte loads of fp32 in flight.
NUM_WARPS = 4


def _kept(w: torch.Tensor, threshold: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
    if threshold is None:
        assert mask is not None  # check_kind
        return mask
    # "not <=" rather than ">": a NaN weight is kept, so it reaches the loss instead of vanishing.
    return ~(w.abs() <= threshold.to(w.dtype).sigmoid()[:, None])


def view_reference(
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    kind: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The definition of Ŵ; computes in float64 for float64 weights, else in float32."""
    check_kind("view_reference", kind, threshold, mask)
    w = weight.to(compute_dtype(weight))
    if threshold is None:
        assert mask is not None  # check_kind
        return torch.where(mask, w, 0.0).to(out_dtype).contiguous()
    cutoff = threshold.to(w.dtype).sigmoid()[:, None]
    # sign(W) · relu(|W| − T) in two vectorised passes (torch.where is ten times slower on a CPU); + 0 for -0.
    return (w - w.clamp(-cutoff, cutoff) + 0.0).to(out_dtype).contiguous()


def threshold_cast_reference(
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    kind: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition of `threshold_cast`: `view_reference` and the counts of what it keeps."""
    w_hat = view_reference(weight, threshold, mask, kind, out_dtype)
    kept = _kept(weight.to(compute_dtype(weight)), threshold, mask)
    n, k = weight.shape
    padded = F.pad(kept, (0, -k % TILE, 0, -n % TILE))
    occupancy = padded.view(-(-n // TILE), TILE, -(-k // TILE), TILE).sum(dim=(1, 3), dtype=torch.int32)
    return w_hat, occupancy.sum(dtype=torch.int64), occupancy


def threshold_backward_reference(
    grad: torch.Tensor,
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    grad_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `threshold_backward`; computes in the dtype `view_reference` does."""
    check_kind("threshold_backward_reference", kind, threshold, mask)
    w, g = weight.to(compute_dtype(weight)), grad.to(compute_dtype(weight))
    kept = _kept(w, threshold, mask)
    if alpha is None:
        multiplier, due = w.new_ones(()), kept
    else:
        on_kept = kept.to(w.dtype)
        multiplier = on_kept + (1.0 - on_kept) * alpha.to(w.dtype)
        pruned_due = (alpha != 0).expand_as(w) if threshold is None else (w != 0) & (alpha != 0)
        due = kept | (pruned_due if grad_mask is None else pruned_due & grad_mask)
    # A choice, not a product: where no gradient is due, a NaN in g must not leave one behind.
    grad_w = torch.where(due, multiplier * g, 0.0)
    grad_weight = grad_w.to(weight.dtype).contiguous()
    if threshold is None:
        return grad_weight, weight.new_zeros(0, dtype=torch.float32)

    s = threshold.to(w.dtype)
    slope = s.sigmoid() * (-s).sigmoid()
    # Summed over the weights that share a threshold.
    total = (w.sign() * grad_w).sum_to_size(threshold.numel(), 1).flatten()
    return grad_weight, torch.where(slope == 0, 0.0, -slope * total).to(threshold.dtype)


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    # Rounded division: tl.sigmoid divides approximately, and 1/(1 + exp(inf)) has to be exactly 0.
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _threshold_cast_kernel(  # type: ignore[no-untyped-def]
    w_hat,
    occupancy,
    weight,
    threshold,
    mask,
    N,
    K,
    stride_wn,
    stride_wk,
    stride_t,
    stride_mn,
    stride_mk,
    TILE: tl.constexpr,
):
    # One axis of programs: the second axis of a grid ends at 65,535. int64 before any multiplication.
    program = tl.program_id(0).to(tl.int64)
    tiles_k = tl.cdiv(K, TILE)
    o_n = program // tiles_k * TILE + tl.arange(0, TILE)
    o_k = program % tiles_k * TILE + tl.arange(0, TILE)
    in_n = o_n < N
    inside = in_n[:, None] & (o_k < K)[None, :]

    # [TILE, TILE]
    w = tl.load(weight + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk, mask=inside, other=0.0)
    w = w.to(tl.float32)
    if mask is None:
        t = _sigmoid(tl.load(threshold + o_n * stride_t, mask=in_n, other=0.0))[:, None]
        kept = inside & ~(tl.abs(w) <= t)
        w = tl.where(w > 0, w - t, w + t)
    else:
        kept = tl.load(mask + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk, mask=inside, other=0) != 0

    tl.store(w_hat + o_n[:, None] * K + o_k[None, :], tl.where(kept, w, 0.0), mask=inside)
    tl.store(occupancy + program, tl.sum(kept.to(tl.int32)))


@triton.jit
def _threshold_backward_kernel(  # type: ignore[no-untyped-def]
    grad_weight,
    row_sums,
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
    stride_t,
    stride_mn,
    stride_mk,
    stride_bn,
    stride_bk,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles_k = tl.cdiv(K, TILE)
    o_n = program // tiles_k * TILE + tl.arange(0, TILE)
    o_k = program % tiles_k * TILE + tl.arange(0, TILE)
    in_n = o_n < N
    inside = in_n[:, None] & (o_k < K)[None, :]

    # [TILE, TILE]
    g = tl.load(grad + o_n[:, None] * stride_gn + o_k[None, :] * stride_gk, mask=inside, other=0.0)
    if mask is None:
        w = tl.load(weight + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk, mask=inside, other=0.0)
        w = w.to(tl.float32)
        s = tl.load(threshold + o_n * stride_t, mask=in_n, other=0.0)
        kept = ~(tl.abs(w) <= _sigmoid(s)[:, None])
    else:
        kept = tl.load(mask + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk, mask=inside, other=0) != 0
    on_pruned = 0.0
    if alpha is not None:
        on_pruned = tl.load(alpha)
    if mask is None:
        on_pruned = tl.where(w != 0, on_pruned, 0.0)
    if grad_mask is not None:
        b = tl.load(grad_mask + o_n[:, None] * stride_bn + o_k[None, :] * stride_bk, mask=inside, other=0)
        on_pruned = tl.where(b != 0, on_pruned, 0.0)
    multiplier = tl.where(kept, 1.0, on_pruned)
    grad_w = tl.where(multiplier == 0, 0.0, multiplier * g.to(tl.float32))

    tl.store(grad_weight + o_n[:, None] * K + o_k[None, :], grad_w, mask=inside)
    if mask is None:
        slope = _sigmoid(s) * _sigmoid(-s)
        # sign(W) · grad_w; like torch's, the sign of NaN is 0.
        total = tl.sum(tl.where(w > 0, grad_w, tl.where(w < 0, -grad_w, 0.0)), axis=1)
        row_sum = tl.where(slope == 0, 0.0, -slope * total)
        tl.store(row_sums + program % tiles_k * N + o_n, row_sum, mask=in_n)


def _strides(matrix: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))


def _row_stride(threshold: torch.Tensor | None, n: int) -> int:
    # One threshold for the matrix is a threshold a row at stride 0: no flag, no second kernel.
    return 0 if threshold is None else threshold.expand(n).stride(0)


def _launch_threshold_cast(
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    tiles_n, tiles_k = -(-n // TILE), -(-k // TILE)
    w_hat = weight.new_empty((n, k), dtype=out_dtype)
    occupancy = weight.new_empty((tiles_n, tiles_k), dtype=torch.int32)
    if weight.numel():
        with torch.cuda.device_of(weight):
            _threshold_cast_kernel[(tiles_n * tiles_k,)](
                w_hat, occupancy, weight, threshold, mask, n, k,
                *_strides(weight), _row_stride(threshold, n), *_strides(mask),
                TILE=TILE, num_warps=NUM_WARPS,
            )  # fmt: skip
    # Summing the tiles' counts costs the one small launch that zeroing a counter would, without its atomics.
    return w_hat, occupancy.sum(dtype=torch.int64), occupancy


def _launch_threshold_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    grad_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    tiles_n, tiles_k = -(-n // TILE), -(-k // TILE)
    grad_weight = weight.new_empty((n, k))
    row_sums = None if threshold is None else weight.new_empty((tiles_k, n), dtype=torch.float32)
    if weight.numel():
        with torch.cuda.device_of(weight):
            _threshold_backward_kernel[(tiles_n * tiles_k,)](
                grad_weight, row_sums, grad, weight, threshold, mask, grad_mask, alpha, n, k,
                *_strides(grad), *_strides(weight), _row_stride(threshold, n), *_strides(mask), *_strides(grad_mask),
                TILE=TILE, num_warps=NUM_WARPS,
            )  # fmt: skip
    if threshold is None or row_sums is None:
        return grad_weight, weight.new_zeros(0, dtype=torch.float32)
    return grad_weight, row_sums.sum_to_size(1, threshold.numel()).flatten()


def threshold_cast(
    weight: torch.Tensor,
    threshold: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    kind: str,
    out_dtype: torch.dtype | None = None,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ŵ = sign(W) · relu(|W| − sigmoid(threshold)), or W where mask; in one pass over the weight.

    Comparisons and the sigmoid are in float32 on the master weight (float64 for float64 weights). Ŵ is
    exactly +0 wherever it is not kept, whatever W holds there. With T = 0 (threshold −inf) Ŵ is W, bit for
    bit, except that −0 becomes +0. A NaN weight of kind "soft" is kept.

    Args:
        weight: `[N, K]`, float16/bfloat16/float32, float64 with the torch back end; any strides.
        threshold: `[1]` or `[N]`, float32, logits of the cut-off T; for kind "soft" and only there.
        mask: `[N, K]`, bool, True = kept; for kind "mask" and only there.
        kind: "soft" or "mask".
        out_dtype: dtype of Ŵ; the weight's own if None.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        `w_hat`: `[N, K]`, contiguous, newly allocated.
        `kept`: 0-dim int64, number of kept weights, counted before rounding to `out_dtype`.
        `occupancy`: `[ceil(N/64), ceil(K/64)]`, int32, number of kept weights in each 64 x 64 tile.

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.threshold import threshold_cast
        >>> weight = torch.tensor([[0.75, -0.25, -1.0]])
        >>> threshold_cast(weight, torch.zeros(1), kind="soft")  # T = sigmoid(0) = 0.5
        (tensor([[ 0.2500,  0.0000, -0.5000]]), tensor(2), tensor([[2]], dtype=torch.int32))
    """
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    check_operands("threshold_cast", weight, threshold, {"mask": mask}, kind, backend)
    if out_dtype not in FLOATS:
        raise ValueError(
            f"threshold_cast: expected a floating-point out_dtype, got {out_dtype}; "
            f"pass the dtype of the product that reads w_hat"
        )
    check_triton_dtype("threshold_cast", "out_dtype", out_dtype, backend)
    if backend == "torch":
        return threshold_cast_reference(weight, threshold, mask, kind, out_dtype)
    require("threshold_cast", weight)
    return _launch_threshold_cast(weight, threshold, mask, out_dtype)


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
    """dW = m · g and ds = −sigmoid'(s) · Σ sign(W) · m · g, with g = dL/dŴ and m as in the head of this file.

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
        kind: "soft" or "mask".
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        `grad_weight`: `[N, K]`, the weight's dtype, contiguous, newly allocated.
        `grad_threshold`: shape and dtype of `threshold`; empty float32 `[0]` for kind "mask".

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.threshold import threshold_backward
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
    check_triton_dtype("threshold_backward", "grad", grad.dtype, backend)
    if alpha is not None:
        expect(
            alpha.shape in ((), (1,))
            and alpha.dtype in (torch.float32, compute_dtype(weight))
            and alpha.device == weight.device,
            "threshold_backward",
            f"alpha to be one float32 value on {weight.device}",
            alpha,
            "keep the schedule's value in a float32 tensor beside the weight",
        )
    if backend == "torch":
        return threshold_backward_reference(grad, weight, threshold, mask, grad_mask, alpha, kind)
    require("threshold_backward", weight)
    return _launch_threshold_backward(grad, weight, threshold, mask, grad_mask, alpha)
