"""The effective weight as an op with a gradient: what every product of a sparse layer multiplies by.

    forward    Ŵ  = S(W)                         [N, K]   forward.py, or the buffer that the Sparsifier keeps
    backward   dW = m G                          [N, K]   G = dL/dŴ, dense, from the product's own backward
               ds = -sigma'(s) sum(sign(W) m G)           kind "soft" (AutoSparse, eqs. 6-8, arXiv:2304.06941)

Any product can follow: `F.linear`, `F.conv2d`, a 2:4 product, one that keeps its input packed. The product saves Ŵ and
gives G; this op saves W, which the model holds anyway.
"""

# N rows of the weight (output features)   K columns (input features, or input channels times kernel positions)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._eager import as_dtype, is_eager
from .._operands import check_out_dtype, refuse
from .backward import gradient
from .forward import cast
from .view import View, check_view

__all__ = ["effective_weight"]


def _forward(
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    kind: str,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    # grad_mask and alpha are the backward's; they pass through here because autograd saves op inputs only.
    return cast("effective_weight", weight, View(kind, threshold, mask, grad_mask, alpha), dtype, backend)


_forward_op = torch.library.custom_op("tritonsparse::effective_weight", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    kind: str,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


@torch.library.custom_op("tritonsparse::effective_weight_backward", mutates_args=())
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
    grad_weight, of_threshold = gradient(grad, weight, View(kind, threshold, mask, grad_mask, alpha), backend)
    # A schema has no optional results.
    return grad_weight, weight.new_zeros(0, dtype=torch.float32) if of_threshold is None else of_threshold


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
    if is_eager(grad, weight) and not torch.is_grad_enabled():
        view = View(ctx.kind, threshold, mask, grad_mask, alpha)
        grad_weight, of_threshold = gradient(grad, weight, view, ctx.backend)
    else:
        # The op has no derivative: under create_graph it is in the graph, so that asking for one is an error.
        grad_weight, of_threshold = _backward_op(grad, weight, threshold, mask, grad_mask, alpha, ctx.kind, ctx.backend)
    need_weight, need_threshold = ctx.needs_input_grad[:2]
    # DDP waits for every parameter: a threshold gets a gradient, zeros included, never None.
    return grad_weight if need_weight else None, of_threshold if need_threshold else None, *[None] * 6


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _setup_deferred(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.dtype = inputs[0].dtype


@once_differentiable
def _backward_deferred(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (threshold,) = ctx.saved_tensors
    need_weight, need_threshold = ctx.needs_input_grad[:2]
    of_weight = as_dtype(grad, ctx.dtype) if need_weight else None
    return of_weight, torch.zeros_like(threshold) if need_threshold else None, None


class _EffectiveWeight(torch.autograd.Function):
    """The op as eager code runs it (`_eager.py`); what gets no gradient is one argument, for each costs time."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, threshold: Tensor | None, rest: tuple[Any, ...], cached: Tensor | None
    ) -> Tensor:
        inputs = (weight, threshold, *rest)
        w_hat = _forward(*inputs) if cached is None else cached.detach()
        _setup_context(ctx, inputs, w_hat)
        return w_hat

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad)[:4]


class _Deferred(torch.autograd.Function):
    """Ŵ with the dense gradient G, which the caller multiplies once a step."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor | None, w_hat: Tensor) -> Tensor:
        _setup_deferred(ctx, (weight, threshold), w_hat)
        return w_hat.detach()

    backward = staticmethod(_backward_deferred)  # type: ignore[assignment]  # its decorator narrows it


# The same for what reads programs: in the form that its transforms understand, which takes two hundred calls more.
class _TracedCached(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        threshold: Tensor | None,
        mask: Tensor | None,
        grad_mask: Tensor | None,
        alpha: Tensor | None,
        kind: str,
        backend: str,
        cached: Tensor,
    ) -> Tensor:
        return cached.detach()

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


class _TracedDeferred(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, threshold: Tensor | None, w_hat: Tensor) -> Tensor:
        return w_hat.detach()

    setup_context = staticmethod(_setup_deferred)
    backward = staticmethod(_backward_deferred)  # type: ignore[assignment]  # its decorator narrows it


def effective_weight(
    weight: Tensor,
    view: View,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "torch",
    cached: Tensor | None = None,
    defer: bool = False,
) -> Tensor:
    """S(W), differentiable in W and the view's threshold.

    Args:
        weight: `[N, K]`, float16/bfloat16/float32/float64, any strides: the dense master.
        view: of this weight (`view.py`).
        dtype: of S(W), that of the product which reads it; the weight's by default.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or Triton's interpreter).
        cached: S(W) itself, shape of `weight`, in `dtype`, if the caller keeps it; it is trusted, and what is returned
            shares its memory.
        defer: leave G itself in the weight's gradient, and zeros in the threshold's: the caller applies
            `threshold_backward` once to the sum over micro-batches and ranks, since it is linear in G.

    Returns:
        `[N, K]`, `dtype`; exact zeros where pruned. Contiguous and newly allocated unless `cached` is given.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the kind or the back end is unknown.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    dtype = dtype or weight.dtype
    check_view("effective_weight", weight, view, backend)
    check_out_dtype("effective_weight", "dtype", dtype, backend)
    kind, threshold, mask, grad_mask, alpha = view
    if cached is not None and not (
        cached.shape == weight.shape and cached.dtype == dtype and cached.device == weight.device
    ):
        refuse(
            "effective_weight",
            f"cached to be {dtype} {list(weight.shape)} on {weight.device}",
            cached,
            "leave it out, and the op builds it",
        )
    eager = is_eager(weight, weight)
    if defer:
        if cached is None:
            forward_view = View(kind, None if threshold is None else threshold.detach(), mask)
            cached = effective_weight(weight.detach(), forward_view, dtype=dtype, backend=backend)
        return (_Deferred if eager else _TracedDeferred).apply(weight, threshold, cached)
    rest = (mask, grad_mask, alpha, kind, backend, dtype)
    if not eager:
        if cached is None:
            return _forward_op(weight, threshold, *rest)
        return _TracedCached.apply(weight, threshold, *rest[:-1], cached)
    if not torch.is_grad_enabled():
        return _forward(weight, threshold, *rest) if cached is None else cached
    return _EffectiveWeight.apply(weight, threshold, rest, cached)
