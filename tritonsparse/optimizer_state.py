"""What the library knows of optimizers: where their state lives, and how to keep pruned weights out of it.

Momentum and Adam's averages revive a pruned weight: masking its gradient alone moves it at the next step.
So a method that prunes for good also clears the state of the pruned positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["clear_state", "gradient_scale", "is_real_step", "learning_rate", "momentum", "reset_state", "unwrap"]


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper (or the optimizer itself).

    Raises:
        TypeError: it is no `torch.optim.Optimizer`.
    """
    while not isinstance(inner := getattr(optimizer, "optimizer", None), type(None)):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach: expected a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the optimizer that "
            f"was built from sparsifier.param_groups()"
        )
    return optimizer


def is_real_step(optimizer: Optimizer) -> bool:
    """False inside a fused optimizer's step that a GradScaler told to skip: the hooks fire all the same."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is None or not bool(found_inf)


def gradient_scale(optimizer: Optimizer) -> Tensor | None:
    """The loss scale that `.grad` still carries inside a fused optimizer's step; None when unscaled."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None


@torch.no_grad()
def clear_state(optimizer: Optimizer, parameter: Tensor, where: Tensor) -> None:
    """Zero, at the positions `where`, every state tensor that has the parameter's shape.

    Args:
        optimizer: any optimizer that keeps its per-element state in tensors of the parameter's shape
            (SGD, Adam, AdamW, RMSprop, Adagrad, NAdam...); state of other shapes is left alone.
        parameter: the parameter as the optimizer holds it.
        where: bool, shape of `parameter`, True where the state is cleared.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(where, 0.0)


@torch.no_grad()
def reset_state(optimizer: Optimizer) -> None:
    """Start every moment anew: all state tensors become 0 (NAdam's product of momenta 1), step counts included.

    With the counts, because Adam's bias correction is what makes the first step after moments of 0 one of about
    the learning rate; kept counts would make it lr (1 - beta1) / sqrt(1 - beta2), three times that.
    """
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.fill_(1.0 if key == "mu_product" else 0.0)
            elif key == "step":
                state[key] = 0


def momentum(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """The optimizer's running direction of `parameter`: SGD's buffer, m / (sqrt(v) + 1e-8) of Adam's kin.

    Returns:
        A tensor of the parameter's shape (SGD's is the optimizer's own), or None where there is none: an optimizer
        without momentum, or a parameter that has had no gradient yet.
    """
    state = optimizer.state.get(parameter, {})
    for first in ("momentum_buffer", "exp_avg"):
        value = state.get(first)
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            second = state.get("exp_avg_sq")
            if first == "exp_avg" and isinstance(second, Tensor) and second.shape == parameter.shape:
                return value / (second.sqrt() + 1e-8)
            return value
    return None


def learning_rate(optimizer: Optimizer, parameter: Tensor) -> float | Tensor:
    """The present learning rate of the group that holds `parameter`; 0.0 where none does (a frozen weight)."""
    for group in optimizer.param_groups:
        if any(held is parameter for held in group["params"]):
            rate: float | Tensor = group["lr"]
            return rate
    return 0.0
