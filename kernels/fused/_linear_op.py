"""`masked_linear` as registered ops, forward and backward: one node each for compilers, tracers and transforms.

`linear.py` computes; what is here says so to `torch.library`. Schemas are flat and results are tensors, so a
result that was not asked for is an empty tensor. The forward also returns What where it built one to be saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["register"]

CustomOp = Callable[..., Any]


def register(
    forward: Callable[..., tuple[Tensor, Tensor | None]],
    gradients: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> tuple[CustomOp, CustomOp]:
    """Register both ops, once.

    Args:
        forward: Y, and What where it is to be saved, of the operands of `tritonsparse::masked_linear`.
        gradients: those of x, the weight and the threshold, of the operands of `tritonsparse::masked_linear_backward`.
        setup_context: what autograd calls after the forward op.
        backward: what it calls in the backward.
    """

    @torch.library.custom_op("tritonsparse::masked_linear", mutates_args=())
    def forward_op(
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
        y, saved = forward(
            x, weight, bias, threshold, mask, grad_mask, alpha, w_hat,
            kind, transposed, backend, out_dtype, defer, save_view,
        )  # fmt: skip
        # An output must not alias an input, so a given view is saved as the input it is.
        return y, weight.new_empty(0, dtype=out_dtype) if saved is None else saved

    @forward_op.register_fake
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
    def backward_op(
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_x, grad_weight, grad_threshold = gradients(
            grad_y, x, weight, w_hat, threshold, mask, grad_mask, alpha,
            kind, transposed, backend, need_x, need_weight, defer,
        )  # fmt: skip
        return (
            x.new_empty(0) if grad_x is None else grad_x,
            weight.new_empty(0) if grad_weight is None else grad_weight,
            weight.new_empty(0) if grad_threshold is None else grad_threshold,
        )

    @backward_op.register_fake
    def _(
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_x = x.new_empty(x.shape if need_x else 0)
        if need_weight and threshold is not None:
            return grad_x, weight.new_empty(weight.shape), threshold.new_empty(threshold.shape)
        return grad_x, weight.new_empty(weight.shape if need_weight else 0), weight.new_empty(0)

    forward_op.register_autograd(backward, setup_context=setup_context)
    return forward_op, backward_op
