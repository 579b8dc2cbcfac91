"""What the library knows of optimizers: where their state lives, and how to keep pruned weights out of it.

Momentum and Adam's averages revive a pruned weight: masking its gradient alone moves it at the next step.
So a method that prunes for good also clears the state of the pruned positions. It touches what it knows:

    MOMENTS         averages of gradients, of the weight's shape: 0 where pruned, 0 after a reset
    WEIGHTS         averages of weights: 0 where pruned, left alone by a reset
    8-bit codes     bitsandbytes' `state1` and `state2`: the code of 0, in the tables of the same state

Other state of a weight's shape is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "Together", "check_elementwise", "check_stepping", "clear_state", "gradient_scale", "is_real_step", "learning_rate",
    "map_state", "momentum", "reset_state", "together", "unwrap",
]  # fmt: skip

# Of torch, transformers, apex, timm, bitsandbytes (in 32 bits too), schedule-free and Lion.
MOMENTS = {
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "exp_avg_diff", "neg_pre_grad"),
    *("square_avg", "grad_avg", "acc_delta", "sum", "prev", "state1", "state2", "max_exp_avg"),
    # Adafactor's, of rows and columns.
    *("row_var", "col_var", "variance", "exp_avg_sq_row", "exp_avg_sq_col"),
}
# Those of MOMENTS that are averages of the gradient itself.
MOMENTA = {"momentum_buffer", "exp_avg", "exp_avg_diff", "state1", "grad_avg"}
WEIGHTS = {"z", "ax", "slow_buffer"}

# Their update of an element reads nothing of other elements, so that a part of a parameter can be updated alone.
ELEMENTWISE = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax),
    *(torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.ASGD),
)


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper (or the optimizer itself).

    Raises:
        TypeError: it is no `torch.optim.Optimizer`.
        ValueError: DeepSpeed's, which steps the inner one several times a step, on flat copies of the weights.
    """
    while True:
        if any("deepspeed" in cls.__module__ for cls in type(optimizer).__mro__):
            raise ValueError(
                f"attach: expected an optimizer that steps the model's own parameters once a step, got DeepSpeed's "
                f"{type(optimizer).__name__}, which steps flat copies of them; train with DDP"
            )
        if (inner := getattr(optimizer, "optimizer", None)) is None:
            break
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach: expected a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the optimizer that "
            f"was built from sparsifier.param_groups()"
        )
    return optimizer


class Together:
    """Several optimizers that train one model, as far as we ask them: their groups, and their state by parameter."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        self.state = _States(self.parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]


class _States:
    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts

    def get(self, parameter: Tensor, default: Any = None) -> Any:
        return next((part.state[parameter] for part in self.parts if parameter in part.state), default)

    def values(self) -> Iterator[Any]:
        for part in self.parts:
            yield from part.state.values()


def together(function: str, optimizers: Sequence[Optimizer]) -> Optimizer:
    """One optimizer as it is, several as one.

    Raises:
        ValueError: there is none, or two hold the same parameter.
    """
    if not optimizers:
        raise ValueError(f"{function}: expected an optimizer, got an empty list; pass those that train the model")
    held = [id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]]
    if len(held) != len(set(held)):
        raise ValueError(
            f"{function}: expected every parameter in one optimizer, got one in two; give it to one of them"
        )
    return optimizers[0] if len(optimizers) == 1 else cast(Optimizer, Together(optimizers))


def check_stepping(function: str, optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers whose step is several evaluations, between which they move all weights along one line.

    Raises:
        ValueError: torch's LBFGS, or a subclass.
    """
    for each in optimizers:
        if isinstance(each, torch.optim.LBFGS):
            raise ValueError(
                f"{function}: expected an optimizer that evaluates its closure once a step, got {type(each).__name__}, "
                f"whose line search and memory know nothing of masks and thresholds; train with SGD or AdamW"
            )


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
    """Forget, at the positions `where`, what the optimizer remembers of the parameter's elements.

    Args:
        optimizer: any optimizer that keeps its per-element state in tensors of the parameter's shape under known names
            (SGD, Adam, AdamW, RMSprop, Adagrad, NAdam...); state of other shapes is left alone.
        parameter: the parameter as the optimizer holds it.
        where: bool, shape of `parameter`, True where the state is cleared.

    Raises:
        RuntimeError: state of the parameter's shape that is not known; nothing has been changed then.
    """
    state = optimizer.state.get(parameter, {})
    for key, value in _per_element(optimizer, state, parameter):
        value.masked_fill_(where, _zero_of(state, key, value))


def _per_element(optimizer: Optimizer, state: Mapping[str, Any], parameter: Tensor) -> list[tuple[str, Tensor]]:
    """State tensors of the parameter's shape; step sizes, which are no memory of the gradient's direction, left out."""
    found = []
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != parameter.shape or value.dim() == 0:
            continue
        if key == "step_size":
            continue
        known = key in MOMENTS | WEIGHTS and value.is_floating_point()
        if not known and not (value.dtype == torch.uint8 and _table(state, key) is not None):
            raise RuntimeError(
                f"attach: expected an optimizer whose state is known to hold averages of gradients, got {key!r} of "
                f"{value.dtype} in {type(optimizer).__name__}; use an optimizer of torch's, or a method that keeps no "
                f"zeros in the weights (autosparse, str, topkast, swat)"
            )
        found.append((key, value))
    return found


def _table(state: Mapping[str, Any], key: str) -> Tensor | None:
    """The values of an 8-bit state's 256 codes."""
    table = state.get(key.replace("state", "qmap")) if key in ("state1", "state2") else None
    return table if isinstance(table, Tensor) and table.numel() == 256 else None


def _zero_of(state: Mapping[str, Any], key: str, value: Tensor) -> float:
    if value.dtype != torch.uint8:
        return 0.0
    table = _table(state, key)
    assert table is not None  # _per_element
    return int(table.abs().argmin())


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
def reset_state(optimizer: Optimizer, momentum_only: bool = False) -> None:
    """Start every moment anew: 0 (NAdam's product of momenta 1, Adagrad's sum its first value), step counts included.

    `momentum_only` leaves all but running averages of gradients as they are. Else with the counts, because Adam's bias
    correction is what makes the first step after moments of 0 one of about the learning rate; kept counts would make it
    lr (1 - beta1) / sqrt(1 - beta2), three times that.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            _per_element(optimizer, state, parameter)  # refuses what is not known
            for key, value in list(state.items()):
                if momentum_only and key not in MOMENTA:
                    continue
                if key in MOMENTS and isinstance(value, Tensor):
                    value.fill_(_zero_of(state, key, value) + _first(group, key))
                elif key == "step":
                    state[key] = value.zero_() if isinstance(value, Tensor) else 0
                elif key == "mu_product":
                    state[key] = value.fill_(1.0) if isinstance(value, Tensor) else 1.0


def _first(group: Mapping[str, Any], key: str) -> float:
    """What a moment starts from: 0, but for Adagrad's sum."""
    return float(group.get("initial_accumulator_value", 0.0)) if key == "sum" else 0.0


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
