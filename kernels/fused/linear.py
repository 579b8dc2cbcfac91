"""The op behind every sparse linear layer: Y = X S(W)^T + b, with the multiplier on dW.

    forward    What = S(W)                      [N, K]   weight/forward.py
               Y    = X What^T + b              [M, N]
    backward   dX   = dY What                   [M, K]
               G    = dY^T X                    [N, K]   the dense gradient of What
               dW   = m * G, and the threshold's gradient     weight/backward.py
               db   = sum_M dY                  [N]

Called by `tritonsparse.layers`. W is the dense master and is only read; What is built in the dtype of the
matrix products, saved for the backward, and is the one tensor that a layer keeps beyond a dense layer's; where the
caller keeps it already (`w_hat`), the op builds and saves nothing.
By `backend`:

    "torch"     the references, and the vendor's products
    "triton"    What and m by a kernel each, the vendor's products between; where nothing will be differentiated, and
                for dW, inside the product where `plan.py` finds that faster
    "fused"     the view inside every product (gemm.py, grad.py); What is never built
"""

# M rows of x (tokens)   N output features   K input features

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._eager import as_dtype, is_eager, outside_autocast
from .._operands import check_estimator, check_input, check_operands, check_w_hat
from ..plan import choose
from ..weight.backward import gradients_alone
from ..weight.forward import cast_alone, view_reference
from ._linear_op import register
from .gemm import fused_grad_input, fused_linear
from .grad import fused_grad_weight

__all__ = ["masked_linear"]


def _forward(
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
) -> tuple[Tensor, Tensor | None]:
    """Y, and What where it was built to be saved; grad_mask, alpha and defer are for the backward."""
    saved = None
    if w_hat is None and (
        backend == "fused" or (backend == "triton" and not save_view and _inside("forward", x, weight, threshold, kind))
    ):
        y = fused_linear(
            x.reshape(-1, x.shape[-1]), weight, bias, kind=kind, threshold=threshold, mask=mask,
            transposed=transposed, out_dtype=out_dtype, backend="triton",
        )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[-1]), None
    if w_hat is None:
        w_hat = _view(weight, threshold, mask, kind, out_dtype, backend)
        saved = w_hat if save_view else None
    with outside_autocast(x, bias):
        y = F.linear(x, w_hat.t() if transposed else w_hat, bias)
    return y, saved


def _inside(op: str, x: Tensor, weight: Tensor, threshold: Tensor | None, kind: str) -> bool:
    """Whether the product of these operands is faster with the view inside."""
    if not x.is_cuda or kind == "step" or (threshold is not None and threshold.dim() == 2):
        return False
    n, k = weight.shape
    return _planned(op, x.numel() // max(1, x.shape[-1]), n, k, x.dtype, kind, x.device)


@functools.cache
def _planned(op: str, rows: int, n: int, k: int, dtype: torch.dtype, kind: str, device: torch.device) -> bool:
    return choose(op, rows, n, k, dtype, kind, torch.cuda.get_device_name(device)).fused


def _view(
    weight: Tensor, threshold: Tensor | None, mask: Tensor | None, kind: str, out_dtype: torch.dtype, backend: str
) -> Tensor:
    if backend == "torch":
        return view_reference(weight, threshold, mask, kind, out_dtype)
    return cast_alone(weight, threshold, mask, kind, out_dtype)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    w_hat: Tensor | None,
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, the weight and the threshold."""
    rows = _matrix(grad_y)
    # Only the fused forward leaves nothing to multiply by.
    fused = w_hat is None or w_hat.numel() != weight.numel()
    grad_x = None
    with outside_autocast(x):
        if need_x and fused:
            grad_x = fused_grad_input(
                rows, weight, kind=kind, threshold=threshold, mask=mask, transposed=transposed,
                out_dtype=x.dtype, backend="triton",
            ).view(x.shape)  # fmt: skip
        elif need_x:
            assert w_hat is not None  # not fused
            grad_x = torch.mm(rows, w_hat.t() if transposed else w_hat)
            grad_x = grad_x if x.dim() == 2 else grad_x.reshape(x.shape)
        if not need_weight:
            return grad_x, None, None
        columns = _matrix(x)
        inside = fused or (backend == "triton" and _inside("grad_weight", x, weight, threshold, kind))
        if inside and not defer:
            grad_weight, of_threshold = fused_grad_weight(
                rows, columns, weight, kind=kind, threshold=threshold, mask=mask, grad_mask=grad_mask, alpha=alpha,
                transposed=transposed, backend="triton",
            )  # fmt: skip
            return grad_x, grad_weight, None if threshold is None else of_threshold
        dense = torch.mm(columns.t(), rows) if transposed else torch.mm(rows.t(), columns)
    if defer:
        return grad_x, as_dtype(dense, weight.dtype), None if threshold is None else torch.zeros_like(threshold)
    return grad_x, *gradients_alone(dense, weight, threshold, mask, grad_mask, alpha, kind, _elementwise(backend))


def _elementwise(backend: str) -> str:
    return "triton" if backend == "fused" else backend


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    x, weight, bias, threshold, mask, grad_mask, alpha, w_hat, kind, transposed, backend, _, defer, _ = inputs
    ctx.save_for_backward(x, weight, output[1] if w_hat is None else w_hat, threshold, mask, grad_mask, alpha)
    ctx.how = kind, transposed, backend, defer, None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_w_hat: Tensor | None = None) -> tuple[Tensor | None, ...]:
    x, weight, w_hat, threshold, mask, grad_mask, alpha = ctx.saved_tensors
    kind, transposed, backend, defer, bias_dtype = ctx.how
    need_x, need_weight, need_bias, need_threshold = ctx.needs_input_grad[:4]
    if grad_y is None:
        grad_y = x.new_zeros((*x.shape[:-1], weight.shape[1] if transposed else weight.shape[0]))
    # The op has no derivative: under create_graph it is in the graph, so that asking for one is an error.
    gradients = _gradients if is_eager(grad_y, weight) and not torch.is_grad_enabled() else _backward_op
    grad_x, grad_weight, grad_threshold = gradients(
        grad_y, x, weight, w_hat, threshold, mask, grad_mask, alpha,
        kind, transposed, backend, need_x, need_weight or need_threshold, defer,
    )  # fmt: skip
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        as_dtype(_matrix(grad_y).sum(0), bias_dtype) if need_bias else None,
        # DDP waits for every parameter: a threshold gets a gradient, zeros included, never None.
        grad_threshold if need_threshold else None,
        *[None] * 10,
    )


class _MaskedLinear(torch.autograd.Function):
    """The op as eager code runs it (`_eager.py`); what gets no gradient is one argument, for each costs time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        threshold: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        inputs = (x, weight, bias, threshold, *rest)
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_y)[:5]


_forward_op, _backward_op = register(_forward, _gradients, _setup_context, _backward)


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
    check_input("masked_linear", x, weight.shape[0 if transposed else 1], out_dtype)
    save_view = torch.is_grad_enabled()
    rest = (mask, grad_mask, alpha, w_hat, kind, transposed, backend, out_dtype, defer, save_view)
    if not is_eager(x, weight):
        return _forward_op(x, weight, bias, threshold, *rest)[0]
    if not save_view:
        return _forward(x, weight, bias, threshold, *rest)[0]
    return _MaskedLinear.apply(x, weight, bias, threshold, rest)
