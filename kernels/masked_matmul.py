"""The op behind every sparse linear layer: Y = X S(W)^T + b, with the multiplier on dW.

    forward    What = S(W)                      [N, K]   soft threshold or mask (threshold.py)
               Y    = X What^T + b              [M, N]
    backward   dX   = dY What                   [M, K]
               G    = dY^T X                    [N, K]   the dense gradient of What
               dW   = m * G                     [N, K]   m: 1 kept, alpha pruned, 0 outside B
               ds   = -sigma'(s) sum(sign(W) m G)        soft only (AutoSparse, eqs. 6-8, arXiv:2304.06941)
               db   = sum_M dY                  [N]

Called by `tritonsparse.layers`. W is the dense master and is only read; What is built in the dtype of the
matrix products, saved for the backward, and is the one tensor that a layer keeps beyond a dense layer's.
The products are the vendor's; the elementwise halves are `threshold.py`'s, by `backend`.
"""

# M rows of x (tokens)   N output features   K input features

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._operands import check_operands
from .threshold import threshold_backward, threshold_cast, view_reference

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
    kind: str,
    transposed: bool,
    backend: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    # grad_mask and alpha are the backward's; they pass through here because autograd saves op inputs only.
    if backend == "torch":
        w_hat = view_reference(weight, threshold, mask, kind, out_dtype)
    else:
        w_hat = threshold_cast(weight, threshold, mask, kind=kind, out_dtype=out_dtype, backend=backend)[0]
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x, w_hat.t() if transposed else w_hat, bias)
    return y, w_hat


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    features = weight.shape[1] if transposed else weight.shape[0]
    return x.new_empty((*x.shape[:-1], features)), weight.new_empty(weight.shape, dtype=out_dtype)


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
) -> tuple[Tensor, Tensor, Tensor]:
    rows = grad_y.reshape(-1, grad_y.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        grad_x = x.new_empty(0)
        if need_x:
            grad_x = (rows @ (w_hat.t() if transposed else w_hat)).reshape(x.shape)
        if not need_weight:
            empty = weight.new_empty(0)
            return grad_x, empty, empty.clone()
        columns = x.reshape(-1, x.shape[-1])
        dense = columns.t() @ rows if transposed else rows.t() @ columns
    grad_weight, grad_threshold = threshold_backward(
        dense, weight, threshold, mask, grad_mask, alpha, kind=kind, backend=backend
    )
    return grad_x, grad_weight, grad_threshold


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
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    if not need_weight:
        return grad_x, weight.new_empty(0), weight.new_empty(0)
    if threshold is None:
        return grad_x, weight.new_empty(weight.shape), weight.new_empty(0, dtype=torch.float32)
    return grad_x, weight.new_empty(weight.shape), threshold.new_empty(threshold.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, threshold, mask, grad_mask, alpha, kind, transposed, backend, _ = inputs
    ctx.save_for_backward(x, weight, output[1], threshold, mask, grad_mask, alpha)
    ctx.kind, ctx.transposed, ctx.backend = kind, transposed, backend
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_w_hat: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, w_hat, threshold, mask, grad_mask, alpha = ctx.saved_tensors
    need_x, need_weight, need_bias, need_threshold = ctx.needs_input_grad[:4]
    if grad_y is None:
        grad_y = x.new_zeros((*x.shape[:-1], weight.shape[1] if ctx.transposed else weight.shape[0]))
    grad_x, grad_weight, grad_threshold = torch.ops.tritonsparse.masked_linear_backward(
        grad_y, x, weight, w_hat, threshold, mask, grad_mask, alpha,
        ctx.kind, ctx.transposed, ctx.backend, need_x, need_weight or need_threshold,
    )  # fmt: skip
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype) if need_bias else None
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_bias,
        # DDP waits for every parameter: a threshold gets a gradient, zeros included, never None.
        grad_threshold if need_threshold else None,
        *[None] * 7,
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
    transposed: bool = False,
    backend: str = "torch",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Y = x S(W)^T + bias through the view (kind, threshold, mask, grad_mask, alpha).

    Args:
        x: `[..., K]`, `out_dtype`; any strides.
        weight: `[N, K]` (`[K, N]` when `transposed`), float16/bfloat16/float32/float64: the dense master.
        bias: `[N]`, `out_dtype`, or None.
        kind: "soft" (What = sign(W) relu(|W| - sigma(s))) or "mask" (What = W on the mask).
        threshold: "soft": the logits s, `[1]` or `[N]`, float32 (float64 beside a float64 weight).
        mask: "mask": bool, shape of `weight`, True = kept.
        grad_mask: bool, shape of `weight`, or None = everywhere: the set B outside which pruned weights get
            no gradient. Kept weights always get theirs.
        alpha: float32 scalar tensor, or None = 0: the gradient's multiplier on pruned weights.
        transposed: `weight` is stored `[K, N]`, as transformers' Conv1D does.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or Triton's interpreter).
        out_dtype: dtype of the matrix products and of Y; the weight's by default.

    Returns:
        `[..., N]`, `out_dtype`; aliases nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or `kind`/`backend` is unknown.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    out_dtype = out_dtype or weight.dtype
    check_operands("masked_linear", weight, threshold, {"mask": mask, "grad_mask": grad_mask}, kind, backend)
    k = weight.shape[0] if transposed else weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"masked_linear: expected x of shape [..., {k}] (the weight's input features), got "
            f"{list(x.shape)}; check the layer's input"
        )
    if x.dtype != out_dtype:
        raise ValueError(
            f"masked_linear: expected x in {out_dtype} (the weight's dtype outside autocast), got {x.dtype}; "
            f"cast x or run under torch.autocast"
        )
    y, _ = _forward_op(x, weight, bias, threshold, mask, grad_mask, alpha, kind, transposed, backend, out_dtype)
    return y
