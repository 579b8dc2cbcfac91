"""The op behind every sparse linear layer: Y = X S(W)^T + b, with the multiplier on dW.

    forward    What = S(W)                      [N, K]   threshold.py
               Y    = X What^T + b              [M, N]
    backward   dX   = dY What                   [M, K]
               G    = dY^T X                    [N, K]   the dense gradient of What
               dW   = m * G, and the threshold's gradient     threshold_backward.py
               db   = sum_M dY                  [N]

Called by `tritonsparse.layers`. W is the dense master and is only read; What is built in the dtype of the
matrix products, saved for the backward, and is the one tensor that a layer keeps beyond a dense layer's; where the
caller keeps it already (`w_hat`), the op builds and saves nothing.
By `backend`:

    "torch"     the references, and the vendor's products
    "triton"    What and m by a kernel each, the vendor's products between; where nothing will be differentiated, and
                for dW, inside the product where `plan.py` finds that faster
    "fused"     the view inside every product (masked_gemm.py, masked_grad.py); What is never built
"""

# M rows of x (tokens)   N output features   K input features

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._operands import check_estimator, check_input, check_operands, check_w_hat
from .masked_gemm import fused_grad_input, fused_linear
from .masked_grad import fused_grad_weight
from .plan import choose
from .threshold import threshold_cast, view_reference
from .threshold_backward import threshold_backward

__all__ = ["masked_linear"]


@torch.library.custom_op("tritonsparse::masked_linear", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    w_hat: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    out_dtype: torch.dtype,
    defer: bool,
    save_view: bool,
) -> tuple[Tensor, Tensor]:
    # grad_mask, alpha and defer are the backward's; they pass through here because autograd saves op inputs only.
    saved = None
    if w_hat is None and (
        backend == "fused" or (backend == "triton" and not save_view and _inside("forward", x, weight, threshold, kind))
    ):
        y = fused_linear(
            x.reshape(-1, x.shape[-1]), weight, bias, kind=kind, threshold=threshold, mask=mask,
            transposed=transposed, out_dtype=out_dtype, backend="triton",
        )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[-1]), weight.new_empty(0, dtype=out_dtype)
    if w_hat is None:
        w_hat = saved = _view(weight, threshold, mask, kind, out_dtype, backend)
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x, w_hat.t() if transposed else w_hat, bias)
    # An output must not alias an input, so a given view is saved as the input it is.
    return y, weight.new_empty(0, dtype=out_dtype) if saved is None or not save_view else saved


def _inside(op: str, x: Tensor, weight: Tensor, threshold: Tensor | None, kind: str) -> bool:
    """Whether the product of these operands is faster with the view inside."""
    if kind == "step" or (threshold is not None and threshold.dim() == 2) or not x.is_cuda:
        return False
    rows, (n, k) = x.numel() // max(1, x.shape[-1]), weight.shape
    return _planned(op, rows, n, k, x.dtype, kind, torch.cuda.get_device_name(x.device))


@functools.cache
def _planned(op: str, rows: int, n: int, k: int, dtype: torch.dtype, kind: str, device_name: str) -> bool:
    return choose(op, rows, n, k, dtype, kind, device_name).fused


def _view(
    weight: Tensor, threshold: Tensor | None, mask: Tensor | None, kind: str, out_dtype: torch.dtype, backend: str
) -> Tensor:
    if backend == "torch":
        return view_reference(weight, threshold, mask, kind, out_dtype)
    return threshold_cast(weight, threshold, mask, kind=kind, out_dtype=out_dtype, backend=backend)[0]


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    w_hat: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    out_dtype: torch.dtype,
    defer: bool,
    save_view: bool,
) -> tuple[Tensor, Tensor]:
    features = weight.shape[1] if transposed else weight.shape[0]
    builds = w_hat is None and save_view and backend != "fused"
    saved = weight.new_empty(weight.shape if builds else 0, dtype=out_dtype)
    return x.new_empty((*x.shape[:-1], features)), saved


@torch.library.custom_op("tritonsparse::masked_linear_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    w_hat: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
    defer: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = grad_y.reshape(-1, grad_y.shape[-1])
    # Only the fused forward leaves nothing to multiply by.
    fused = w_hat.numel() != weight.numel()
    view: dict[str, Any] = {"kind": kind, "threshold": threshold, "mask": mask, "transposed": transposed}
    with torch.autocast(x.device.type, enabled=False):
        grad_x = x.new_empty(0)
        if need_x and fused:
            grad_x = fused_grad_input(rows, weight, **view, out_dtype=x.dtype, backend="triton").view(x.shape)
        elif need_x:
            grad_x = (rows @ (w_hat.t() if transposed else w_hat)).reshape(x.shape)
        if not need_weight:
            empty = weight.new_empty(0)
            return grad_x, empty, empty.clone()
        columns = x.reshape(-1, x.shape[-1])
        inside = fused or (backend == "triton" and _inside("grad_weight", x, weight, threshold, kind))
        if inside and not defer:
            grad_weight, grad_threshold = fused_grad_weight(
                rows, columns, weight, **view, grad_mask=grad_mask, alpha=alpha, backend="triton"
            )
            return grad_x, grad_weight, grad_threshold
        dense = columns.t() @ rows if transposed else rows.t() @ columns
    if defer:
        return grad_x, dense.to(weight.dtype), weight.new_zeros(0) if threshold is None else torch.zeros_like(threshold)
    grad_weight, grad_threshold = threshold_backward(
        dense, weight, threshold, mask, grad_mask, alpha, kind=kind, backend=_elementwise(backend)
    )
    return grad_x, grad_weight, grad_threshold


def _elementwise(backend: str) -> str:
    return "triton" if backend == "fused" else backend


@_backward_op.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    w_hat: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
    defer: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    if not need_weight:
        return grad_x, weight.new_empty(0), weight.new_empty(0)
    if threshold is None:
        return grad_x, weight.new_empty(weight.shape), weight.new_empty(0, dtype=torch.float32)
    return grad_x, weight.new_empty(weight.shape), threshold.new_empty(threshold.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, threshold, mask, grad_mask, alpha, w_hat, kind, transposed, backend, _, defer, _ = inputs
    ctx.save_for_backward(x, weight, output[1] if w_hat is None else w_hat, threshold, mask, grad_mask, alpha)
    ctx.kind, ctx.transposed, ctx.backend, ctx.defer = kind, transposed, backend, defer
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_w_hat: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, w_hat, threshold, mask, grad_mask, alpha = ctx.saved_tensors
    need_x, need_weight, need_bias, need_threshold = ctx.needs_input_grad[:4]
    if grad_y is None:
        grad_y = x.new_zeros((*x.shape[:-1], weight.shape[1] if ctx.transposed else weight.shape[0]))
    grad_x, grad_weight, grad_threshold = torch.ops.tritonsparse.masked_linear_backward(
        grad_y, x, weight, w_hat, threshold, mask, grad_mask, alpha,
        ctx.kind, ctx.transposed, ctx.backend, need_x, need_weight or need_threshold, ctx.defer,
    )  # fmt: skip
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype) if need_bias else None
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_bias,
        # DDP waits for every parameter: a threshold gets a gradient, zeros included, never None.
        grad_threshold if need_threshold else None,
        *[None] * 10,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str,
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
    grad_mask: Tensor | None = None,
    alpha: Tensor | None = None,
    w_hat: Tensor | None = None,
    transposed: bool = False,
    backend: str = "torch",
    out_dtype: torch.dtype | None = None,
    defer: bool = False,
) -> Tensor:
    """Y = x S(W)^T + bias through the view (kind, threshold, mask, grad_mask, alpha).

    Args:
        x: `[..., K]`, `out_dtype`; any strides.
        weight: `[N, K]` (`[K, N]` when `transposed`), float16/bfloat16/float32/float64: the dense master.
        bias: `[N]`, `out_dtype`, or None.
        kind: "soft" (What = sign(W) relu(|W| - sigma(s))), "hard" and "step" (W above the cut-off t), or "mask".
        threshold: "soft": the logits s; "hard" and "step": the cut-offs t; `[1]`, one per row of the stored weight
            or one per block, float32 (float64 beside a float64 weight).
        mask: "mask": bool, shape of `weight`, True = kept.
        grad_mask: bool, shape of `weight`, or None = everywhere: the set B outside which pruned weights get
            no gradient. Kept weights always get theirs.
        alpha: float32 scalar tensor, or None = 0: the gradient's multiplier on pruned weights.
        w_hat: What itself, shape of `weight`, `out_dtype`, if the caller keeps it; it is trusted.
        transposed: `weight` is stored `[K, N]`, as transformers' Conv1D does.
        backend: "torch" (any device), "triton" or "fused" (a GPU, or Triton's interpreter; head of this file).
            "fused" takes kinds "soft", "hard" and "mask", with a threshold for the matrix or a row.
        out_dtype: dtype of the matrix products and of Y; the weight's by default.
        defer: leave G itself in the weight's gradient, and zeros in the threshold's: the caller applies
            `threshold_backward` once to the sum over micro-batches and ranks, since it is linear in G.

    Returns:
        `[..., N]`, `out_dtype`; aliases nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, `kind`/`backend` is unknown, or they do not go
            together.
        RuntimeError: `backend` "triton" or "fused" where Triton cannot run.
    """
    out_dtype = out_dtype or weight.dtype
    masks = {"mask": mask, "grad_mask": grad_mask}
    check_operands("masked_linear", weight, threshold, masks, kind, _elementwise(backend))
    if backend == "fused" and (kind == "step" or (threshold is not None and threshold.dim() == 2)):
        raise ValueError(
            f'masked_linear: expected kind "soft", "hard" or "mask" and a threshold for the matrix or a row with '
            f'backend "fused", got {kind!r}; pass backend="triton"'
        )
    check_estimator("masked_linear", kind, grad_mask, alpha)
    check_w_hat("masked_linear", w_hat, weight, out_dtype)
    k = weight.shape[0] if transposed else weight.shape[1]
    check_input("masked_linear", x, k, out_dtype)
    view = (threshold, mask, grad_mask, alpha, w_hat)
    save_view = torch.is_grad_enabled()
    y, _ = _forward_op(x, weight, bias, *view, kind, transposed, backend, out_dtype, defer, save_view)
    return y
