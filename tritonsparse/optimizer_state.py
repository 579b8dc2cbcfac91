"""What the library knows of optimizers: where their state lives, and how to keep pruned weights out of it.

Momentum and Adam's averages revive a pruned weight: masking its gradient alone moves it at the next step.
So a method that prunes for good also clears the state of the pruned positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "check_elementwise", "clear_state", "gradient_scale", "is_real_step", "learning_rate", "map_state", "momentum",
    "reset_state", "unwrap",
]  # fmt: skip

# Their update of an element reads nothing of other elements, so that a part of a parameter can be updated alone.
ELEMENTWISE = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax),
    *(torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.ASGD),
)


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


def check_elementwise(function: str, optimizer: Optimizer) -> None:
    """Refuse an optimizer that is not known to update each element by itself.

    Raises:
        ValueError: its class is none of torch's elementwise ones; a subclass may do anything.
    """
    if type(optimizer) not in ELEMENTWISE:
        known = ", ".join(cls.__name__ for cls in ELEMENTWISE)
        raise ValueError(
            f"{function}: expected an optimizer whose update is elementwise ({known}), got {type(optimizer).__name__}; "
            f"use one of them, or train in dense storage"
        )


@torch.no_grad()
def map_state(
    function: str, optimizer: Optimizer, parameter: Tensor, change: Callable[[Tensor], Tensor] | None
) -> None:
    """Replace every state tensor of the parameter's shape by `change` of it; None only checks. Counts stay.

    Raises:
        ValueError: a state of the parameter that is neither of its shape nor one number; nothing has been changed then.
    """
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        of_shape = isinstance(value, Tensor) and value.shape == parameter.shape
        number = value is None or isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
        if not of_shape and not number:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{function}: expected state of the parameter's shape {list(parameter.shape)} or single numbers, got "
                f"{key!r} of {got} in {type(optimizer).__name__}; train in dense storage with it"
            )
    if change is not None:
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = change(value)


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
