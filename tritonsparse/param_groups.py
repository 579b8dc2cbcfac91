"""Parameter groups: thresholds must never share weights' decay and learning rate by accident."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .layers import SparseLayer
from .methods import Method

__all__ = ["check_thresholds", "param_groups", "refuse_frozen"]


def param_groups(
    model: nn.Module, layers: Mapping[str, SparseLayer], method: Method, defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Groups "decay" (two dimensions and more), "no_decay" (biases, norms), "thresholds"; empty ones are left out."""
    thresholds = {id(layer.threshold): layer.threshold for layer in layers.values() if layer.threshold is not None}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [parameter for parameter in trainable if id(parameter) not in thresholds]
    groups: list[dict[str, Any]] = [
        {**defaults, "name": "decay", "params": [p for p in others if p.dim() >= 2]},
        {**defaults, "name": "no_decay", "params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    if thresholds:
        group: dict[str, Any] = {**defaults, "name": "thresholds", "params": list(thresholds.values())}
        scale = getattr(method, "threshold_lr_scale", 1.0)
        if scale != 1.0:
            if "lr" not in defaults:
                raise ValueError(
                    f"param_groups: expected lr= (threshold_lr_scale = {scale} is relative to it), got none; call "
                    f"param_groups(lr=...)"
                )
            group["lr"] = defaults["lr"] * scale
        if getattr(method, "threshold_weight_decay", None) is not None:
            # The method adds its own L2 gradient; the optimizer must not decay s a second time.
            group["weight_decay"] = 0.0
        groups.append(group)
    return [group for group in groups if group["params"]]


def refuse_frozen(function: str, layers: Mapping[str, SparseLayer], method: Method) -> None:
    """Refuse layers that were frozen since `sparsify` under a method that means their weights to train.

    Raises:
        ValueError: as said, naming the layer.
    """
    frozen = [name for name, layer in layers.items() if not layer.weight.requires_grad]
    if frozen and not method.takes_frozen:
        raise ValueError(
            f"{function}: expected weights that train under method {method.name!r}, got {frozen[0]} and "
            f"{len(frozen) - 1} more frozen; freeze them before sparsify, and they stay dense, or prune frozen weights "
            f"with 'static' or 'gmp'"
        )


def check_thresholds(function: str, layers: Mapping[str, SparseLayer], optimizer: Optimizer) -> None:
    """Refuse an optimizer that misses a threshold or holds one in a group with other parameters.

    Raises:
        ValueError: as said, naming the layer.
    """
    thresholds = {id(layer.threshold): name for name, layer in layers.items() if layer.threshold is not None}
    held: set[int] = set()
    for number, group in enumerate(optimizer.param_groups):
        here = {id(parameter) for parameter in group["params"]}
        found = here & thresholds.keys()
        if found and found != here:
            name = thresholds[next(iter(found))]
            raise ValueError(
                f"{function}: expected thresholds in a group of their own, got {name}.threshold in group {number} "
                f"among other parameters; build the optimizer from sparsifier.param_groups(...)"
            )
        held |= found
    if missing := [name for identity, name in thresholds.items() if identity not in held]:
        raise ValueError(
            f"{function}: expected every threshold in the optimizer, got none for {missing[0]} and "
            f"{len(missing) - 1} more; build the optimizer from sparsifier.param_groups(...)"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    training = [name for name, layer in layers.items() if layer.weight.requires_grad]
    if missing := [name for name in training if id(layers[name].weight) not in held]:
        raise ValueError(
            f"{function}: expected the optimizer to hold every sparse layer's weight, got none for {missing[0]} and "
            f"{len(missing) - 1} more of {len(training)}; attach the optimizer that trains this model, or all of them "
            f"as a list, or freeze the layer before sparsify"
        )
