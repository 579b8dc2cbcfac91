"""Threshold and cast: what the forward uses of a dense weight.

    kind "soft":          Ŵ = sign(W) · relu(|W| − T),  T = sigmoid(s)    kept: not |W| <= T
    kind "hard", "step":  Ŵ = W where kept, 0 elsewhere                   kept: not |W| <= t
    kind "mask":          Ŵ = W where mask, 0 elsewhere                   kept: mask

W `[N, K]` is the dense master weight, Ŵ its sparse view in the dtype of the product, both in dense storage.
`threshold` holds the logits s ("soft") or the cut-offs t themselves ("hard", "step"): `[1]`, one for the matrix;
`[N]`, one per row; or `[R, C]`, one per block of N/R x K/C weights. "hard" and "step" differ in the gradient alone
(`backward.py`, which also says whose methods these are).

Called by the layer op, which owns autograd; nothing here is registered with torch.library.
"""
# N: rows of the weight (output features)
# K: columns of the weight (input features)

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._eager import as_dtype, on_device_of
from .._operands import FLOATS, check_kind, check_operands, check_triton_dtype, compute_dtype
from .._triton import require, tl, triton

# Side of the square a program handles and `occupancy` counts in: the finest block of the block kernels, and
# small enough that the backward keeps both fp32 operands in registers without spills.
TILE = 64
# 4 warps leave each thread 32 elements: eight independent 16-byte loads of fp32 in flight.
NUM_WARPS = 4


def cutoff(weight: torch.Tensor, threshold: torch.Tensor, kind: str) -> torch.Tensor:
    """The cut-off on |W|, in the dtype of computation: `[1]`, `[N, 1]`, or `[N, K]` of a threshold per block."""
    t = as_dtype(threshold, compute_dtype(weight))
    return spread(t.sigmoid() if kind == "soft" else t, weight)


def spread(t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a threshold says to each weight: `[1]`, `[N, 1]`, or `[N, K]` of a threshold per block."""
    if t.dim() == 1:
        return t if t.shape[0] == 1 else t[:, None]
    (n, k), (rows, columns) = weight.shape, t.shape
    return t.repeat_interleave(n // rows, 0).repeat_interleave(k // columns, 1)


def kept_reference(
    weight: torch.Tensor, threshold: torch.Tensor | None, mask: torch.Tensor | None, kind: str
) -> torch.Tensor:
    """Which weights the view keeps: bool `[N, K]`."""
    if threshold is None:
        assert mask is not None  # check_kind
        return mask
    # "not <=" rather than ">": a NaN weight is kept, so it reaches the loss instead of vanishing.
    return ~(as_dtype(weight, compute_dtype(weight)).abs() <= cutoff(weight, threshold, kind))


def view_reference(
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    kind: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The definition of Ŵ; computes in float64 for float64 weights, else in float32."""
    check_kind("view_reference", kind, threshold, mask)
    w = as_dtype(weight, compute_dtype(weight))
    if kind != "soft":
        w_hat = torch.where(kept_reference(weight, threshold, mask, kind), w, 0.0)
        return as_dtype(w_hat, out_dtype).contiguous()
    assert threshold is not None  # check_kind
    t = cutoff(weight, threshold, kind)
    # sign(W) · relu(|W| − T) in two vectorised passes; + 0 for −0.
    return as_dtype((w - w.clamp(-t, t)).add_(0.0), out_dtype).contiguous()


def threshold_cast_reference(
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    kind: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition of `threshold_cast`: `view_reference` and the counts of what it keeps."""
    w_hat = view_reference(weight, threshold, mask, kind, out_dtype)
    kept = kept_reference(weight, threshold, mask, kind)
    n, k = weight.shape
    padded = F.pad(kept, (0, -k % TILE, 0, -n % TILE))
    occupancy = padded.view(-(-n // TILE), TILE, -(-k // TILE), TILE).sum(dim=(1, 3), dtype=torch.int32)
    return w_hat, occupancy.sum(dtype=torch.int64), occupancy


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    # Rounded division: tl.sigmoid divides approximately, and 1/(1 + exp(inf)) has to be exactly 0.
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


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
    occupancy,
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
    if mask is None:
        t = load_cutoff(threshold, o_n, o_k, N, stride_tn, stride_tk, block_n, block_k, inside, SOFT, PER_BLOCK)
        kept = inside & ~(tl.abs(w) <= t)
        if SOFT:
            w = tl.where(w > 0, w - t, w + t)
    else:
        kept = tl.load(mask + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk, mask=inside, other=0) != 0

    tl.store(w_hat + o_n[:, None] * K + o_k[None, :], tl.where(kept, w, 0.0), mask=inside)
    if occupancy is not None:
        tl.store(occupancy + program, tl.sum(kept.to(tl.int32)))


def strides(matrix: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))


def threshold_strides(threshold: torch.Tensor | None, weight: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides of a threshold along N and K, and the rows and columns of W that share an element of it."""
    if threshold is None:
        return 0, 0, 1, 1
    n, k = weight.shape
    if threshold.dim() == 1:
        # One threshold for the matrix is a threshold a row at stride 0: no flag, no second kernel.
        return threshold.stride(0) if threshold.shape[0] == n else 0, 0, 1, 1
    return *strides(threshold), n // threshold.shape[0], k // threshold.shape[1]


def _launch(
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    kind: str,
    out_dtype: torch.dtype,
    occupancy: torch.Tensor | None,
) -> torch.Tensor:
    """Ŵ; and the tiles' counts where there is a tensor for them."""
    n, k = weight.shape
    w_hat = weight.new_empty((n, k), dtype=out_dtype)
    if n and k:
        with on_device_of(weight):
            _threshold_cast_kernel[(-(-n // TILE) * -(-k // TILE),)](
                w_hat, occupancy, weight, threshold, mask, n, k,
                *strides(weight), *threshold_strides(threshold, weight), *strides(mask),
                SOFT=kind == "soft", PER_BLOCK=threshold is not None and threshold.dim() == 2,
                TILE=TILE, num_warps=NUM_WARPS,
            )  # fmt: skip
    return w_hat


def _check_out_dtype(out_dtype: torch.dtype, backend: str) -> None:
    if out_dtype not in FLOATS:
        raise ValueError(
            f"threshold_cast: expected a floating-point out_dtype, got {out_dtype}; "
            f"pass the dtype of the product that reads w_hat"
        )
    check_triton_dtype("threshold_cast", "out_dtype", out_dtype, backend)


def cast_alone(
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    kind: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Ŵ of `threshold_cast` by its kernel, for callers that have checked the operands: one launch, nothing counted."""
    _check_out_dtype(out_dtype, "triton")
    require("threshold_cast", weight)
    return _launch(weight, threshold, mask, kind, out_dtype, None)


def threshold_cast(
    weight: torch.Tensor,
    threshold: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    kind: str,
    out_dtype: torch.dtype | None = None,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ŵ = sign(W) · relu(|W| − sigmoid(threshold)), or W where kept; in one pass over the weight.

    Comparisons and the sigmoid are in float32 on the master weight (float64 for float64 weights). Ŵ is
    exactly +0 wherever it is not kept, whatever W holds there. With T = 0 (kind "soft", threshold −inf) Ŵ is W,
    bit for bit, except that −0 becomes +0. A NaN weight is kept, except by a mask.

    Args:
        weight: `[N, K]`, float16/bfloat16/float32, float64 with the torch back end; any strides.
        threshold: `[1]`, `[N]` or `[R, C]` (R divides N, C divides K), float32: the logits of the cut-off for kind
            "soft", the cut-off itself for kinds "hard" and "step".
        mask: `[N, K]`, bool, True = kept; for kind "mask" and only there.
        kind: "soft", "hard", "step" or "mask".
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
        >>> from tritonsparse.kernels.weight.forward import threshold_cast
        >>> weight = torch.tensor([[0.75, -0.25, -1.0]])
        >>> threshold_cast(weight, torch.zeros(1), kind="soft")  # T = sigmoid(0) = 0.5
        (tensor([[ 0.2500,  0.0000, -0.5000]]), tensor(2), tensor([[2]], dtype=torch.int32))
    """
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    check_operands("threshold_cast", weight, threshold, {"mask": mask}, kind, backend)
    _check_out_dtype(out_dtype, backend)
    if backend == "torch":
        return threshold_cast_reference(weight, threshold, mask, kind, out_dtype)
    require("threshold_cast", weight)
    n, k = weight.shape
    occupancy = weight.new_empty((-(-n // TILE), -(-k // TILE)), dtype=torch.int32)
    w_hat = _launch(weight, threshold, mask, kind, out_dtype, occupancy)
    # Summing the tiles' counts costs the one small launch that zeroing a counter would, without its atomics.
    return w_hat, occupancy.sum(dtype=torch.int64), occupancy
