"""S(W) as an op with a gradient: what a layer computes with whose product is not a matrix product of ours.

    forward    What = S(W)                  [N, K]   threshold or mask (forward.py)
    backward   dW = m * G                   [N, K]   G = dL/dWhat (backward.py)
               ds = -sigma'(s) sum(sign(W) m G)      kind "soft" (AutoSparse, eqs. 6-8, arXiv:2304.06941)

Called by the convolution layer: autograd carries What through the vendor's convolution, whose backward gives dX from
What and the dense G, which the op's own backward multiplies. W is the dense master and is only read. The op saves W,
not What; the convolution saves What.
"""

# N rows of the weight (output channels)   K columns (input channels times kernel positions)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._eager import is_eager
from .._operands import check_estimator, check_operands
from .backward import gradients_alone, threshold_backward
from .forward import cast_alone, view_reference

__all__ = ["masked_weight"]


def _forward(
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    kind: str,
    backend: str,
    out_dtype: torch.dtype,
) -> Tensor:
    # grad_mask and alpha are the backward's; they pass through here because autograd saves op inputs only.
    if backend == "torch":
        return view_reference(weight, threshold, mask, kind, out_dtype)
    return cast_alone(weight, threshold, mask, kind, out_dtype)


_forward_op = torch.library.custom_op("tritonsparse::masked_weight", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    kind: str,
    backend: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=out_dtype)


@torch.library.custom_op("tritonsparse::masked_weight_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    kind: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return threshold_backward(grad, weight, threshold, mask, grad_mask, alpha, kind=kind, backend=backend)


@_backward_op.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    kind: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if threshold is None:
        return weight.new_empty(weight.shape), weight.new_empty(0, dtype=torch.float32)
    return weight.new_empty(weight.shape), threshold.new_empty(threshold.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, threshold, mask, grad_mask, alpha, kind, backend, _ = inputs
    ctx.save_for_backward(weight, threshold, mask, grad_mask, alpha)
    ctx.kind, ctx.backend = kind, backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, threshold, mask, grad_mask, alpha = ctx.saved_tensors
    # The op has no derivative: under create_graph it is in the graph, so that asking for one is an error.
    gradients = gradients_alone if is_eager(grad, weight) and not torch.is_grad_enabled() else _backward_op
    grad_weight, grad_threshold = gradients(grad, weight, threshold, mask, grad_mask, alpha, ctx.kind, ctx.backend)
    need_weight, need_threshold = ctx.needs_input_grad[:2]
    return grad_weight if need_weight else None, grad_threshold if need_threshold else None, *[None] * 6


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _MaskedWeight(torch.autograd.Function):
    """The op as eager code runs it (`_eager.py`); what gets no gradient is one argument, for each costs time."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor | None, rest: tuple[Any, ...]) -> Tensor:
        inputs = (weight, threshold, *rest)
        w_hat = _forward(*inputs)
        _setup_context(ctx, inputs, w_hat)
        return w_hat

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad)[:3]


def masked_weight(
    weight: Tensor,
    *,
    kind: str,
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
    grad_mask: Tensor | None = None,
    alpha: Tensor | None = None,
    backend: str = "torch",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """S(W) through the view (kind, threshold, mask, grad_mask, alpha), differentiable in W and the threshold.

    Args:
        weight: `[N, K]`, float16/bfloat16/float32/float64, any strides: the dense master.
        kind: "soft", "hard", "step" or "mask", as `threshold_cast` has them.
        threshold: all but "mask": `[1]`, `[N]` or one a block, float32 (float64 beside a float64 weight).
        mask: "mask": bool `[N, K]`, True = kept.
        grad_mask: bool `[N, K]`, or None = everywhere: the set B outside which pruned weights get no gradient.
            Kept weights always get theirs.
        alpha: float32 scalar tensor, or None = 0: the gradient's multiplier on pruned weights.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or Triton's interpreter).
        out_dtype: dtype of S(W), that of the product which reads it; the weight's by default.

    Returns:
        `[N, K]`, `out_dtype`, contiguous, newly allocated; exact zeros where pruned.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or `kind`/`backend` is unknown.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    check_operands("masked_weight", weight, threshold, {"mask": mask, "grad_mask": grad_mask}, kind, backend)
    check_estimator("masked_weight", kind, grad_mask, alpha)
    rest = (mask, grad_mask, alpha, kind, backend, out_dtype or weight.dtype)
    if not is_eager(weight, weight):
        return _forward_op(weight, threshold, *rest)
    if not torch.is_grad_enabled():
        return _forward(weight, threshold, *rest)
    return _MaskedWeight.apply(weight, threshold, rest)
