"""W = theta |theta|^(a-1): the weight of PowerPropagation, with its exact gradient.

    forward    W      = theta |theta|^(a-1)                  sign(theta) |theta|^a
    backward   dtheta = a |theta|^(a-1) dW                   0 at theta = 0 for a > 1

Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation", arXiv:2110.00296, eqs. (1)-(2).
Sparse layers compute their effective weight from this W. It is an op because autograd of the formula computes 0 * inf =
NaN at theta = 0 for a < 2. It is plain PyTorch on every device: elementwise, and a small share of a layer's work.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._eager import is_eager

__all__ = ["power", "power_reference", "root"]


def power_reference(theta: Tensor, exponent: float) -> Tensor:
    """theta |theta|^(a-1), in theta's dtype."""
    return theta * theta.abs().pow(exponent - 1.0)


_forward_op = torch.library.custom_op("tritonsparse::power", power_reference, mutates_args=())


@_forward_op.register_fake
def _(theta: Tensor, exponent: float) -> Tensor:
    return torch.empty_like(theta)


def _gradient(grad: Tensor, theta: Tensor, exponent: float) -> Tensor:
    # |theta|^(a-1) is finite everywhere for a >= 1; no division by theta, so no NaN where it is 0.
    return theta.abs().pow(exponent - 1.0).mul_(exponent).mul_(grad)


_backward_op = torch.library.custom_op("tritonsparse::power_backward", _gradient, mutates_args=())


@_backward_op.register_fake
def _(grad: Tensor, theta: Tensor, exponent: float) -> Tensor:
    return torch.empty_like(theta)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    theta, exponent = inputs
    ctx.save_for_backward(theta)
    ctx.exponent = exponent


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (theta,) = ctx.saved_tensors
    # The op has no derivative: under create_graph it is in the graph, so that asking for one is an error.
    gradient = _gradient if is_eager(grad, theta) and not torch.is_grad_enabled() else _backward_op
    return gradient(grad, theta, ctx.exponent), None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Power(torch.autograd.Function):
    """The op as eager code runs it (`_eager.py`)."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, exponent: float) -> Tensor:
        weight = power_reference(theta, exponent)
        _setup_context(ctx, (theta, exponent), weight)
        return weight

    backward = staticmethod(_backward)


def power(theta: Tensor, exponent: float) -> Tensor:
    """theta |theta|^(a-1), differentiable once.

    Args:
        theta: any shape and strides, float16/bfloat16/float32/float64.
        exponent: a, at least 1; 1 is the identity.

    Returns:
        Shape, dtype and device of `theta`; newly allocated.

    Raises:
        ValueError: the exponent is below 1 or not finite, or `theta` is not floating point.
    """
    if not 1.0 <= exponent < math.inf:
        raise ValueError(f"power: expected an exponent of at least 1, got {exponent}; 2 is the paper's usual choice")
    if not theta.is_floating_point():
        raise ValueError(f"power: expected a floating-point theta, got {theta.dtype}; convert it")
    if not is_eager(theta, theta):
        return _forward_op(theta, float(exponent))
    return _Power.apply(theta, float(exponent)) if torch.is_grad_enabled() else power_reference(theta, float(exponent))


@torch.no_grad()
def root(weight: Tensor, exponent: float) -> Tensor:
    """The theta that `power` maps to `weight`, to rounding: sign(W) |W|^(1/a)."""
    return weight.sign() * weight.abs().pow(1.0 / exponent)
