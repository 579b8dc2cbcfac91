"""Modules whose weight other code reads instead of calling them: a sparse forward of theirs would never run.

    nn.MultiheadAttention        hands its projections to one function
    self.<child>.weight          in the code of the parent's class: WavLM's attention, Mamba's kernels, Falcon-Mamba's
                                 dt_proj. It may call the child elsewhere (Bloom does, but in one configuration):
                                 `include` then takes it
    nn.TransformerEncoderLayer   in evaluation, a fused kernel takes the children's weights: `no_fast_path` ends that

What is read in another way is found at the first step: a layer that nothing has called by then is named
(`check_called`).
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from .layers import SparseLayer

__all__ = ["Reader", "check_called", "no_fast_path", "weight_readers"]

_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\s*=[^=])(?!\.(?:data|device|dtype|shape|size|requires_grad))")
_CALL = re.compile(r"\bself\.(\w+)\(")


class Reader(NamedTuple):
    """A class that reads a child's weight, and whether it also calls the child."""

    name: str
    calls: bool


def weight_readers(model: nn.Module) -> dict[str, Reader]:
    """Dotted name of every module whose weight is read by another -> who reads it."""
    found: dict[str, Reader] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            reader = Reader("nn.MultiheadAttention", False)
            found |= {prefix + child: reader for child, _ in module.named_modules() if child}
        for child, calls in _read_by(type(module)).items():  # type: ignore[arg-type]  # a class is hashable
            if child in module._modules:
                found.setdefault(prefix + child, Reader(type(module).__name__, calls))
    return found


@cache
def _read_by(cls: type) -> dict[str, bool]:
    """Attributes whose `.weight` the methods of a class read, initialising ones aside -> whether one calls them."""
    read: set[str] = set()
    called: set[str] = set()
    for owner in cls.__mro__:
        if owner.__module__.startswith("torch.") or owner is object:
            break
        for key, method in vars(owner).items():
            if key in ("__init__", "reset_parameters", "init_weights", "_init_weights", "tie_weights"):
                continue
            function = inspect.unwrap(getattr(method, "__func__", method)) if callable(method) else None
            if inspect.isfunction(function):
                try:
                    source = inspect.getsource(function)
                except (OSError, TypeError):
                    continue  # made at run time: the first step tells
                read.update(_READ.findall(source))
                called.update(_CALL.findall(source))
    return {name: name in called for name in read}


def no_fast_path(model: nn.Module, names: Iterable[str]) -> None:
    """Have every `nn.TransformerEncoderLayer` that holds one of the named modules call its children."""
    for prefix, module in model.named_modules():
        inside = any(name.startswith(f"{prefix}." if prefix else "") for name in names)
        if isinstance(module, nn.TransformerEncoderLayer) and inside:
            # What torch asks before it takes the fused kernel: neither relu nor gelu.
            module.activation_relu_or_gelu = 0


@torch.no_grad()
def check_called(function: str, layers: Mapping[str, SparseLayer]) -> None:
    """Warn, when the first gradients are there, of layers whose weight was read without calling them.

    Such a layer has not been called and has gradients that its view would not give. Compiled code notes no call; where
    its gradients cannot tell, as under a method with dense ones, nothing is said.
    """
    compiled = not any(layer.called for layer in layers.values())
    names = []
    for name, layer in layers.items():
        if layer.called or not layer.weight.requires_grad:
            continue
        passed_by = _passed_by(layer)
        if passed_by or (passed_by is None and not compiled):
            names.append(name)
    if names:
        warnings.warn(
            f"{function}: expected every sparse layer to be called, got no call of {names[0]} and {len(names) - 1} "
            f"more in the first step; where the model reads their weights itself it sees the dense ones, and finalize "
            f"would change it. Exclude them: exclude={names[:5]}",
            stacklevel=3,
        )


def _passed_by(layer: SparseLayer) -> bool | None:
    """Whether the gradients are other than the layer's forward would have made them; None = they cannot tell."""
    grad = layer.weight.grad
    if layer.kind == "dense":
        return False
    if layer.threshold is not None:
        return grad is not None and layer.threshold.grad is None
    if grad is None or layer.mask is None or layer.compacted:
        return None
    dense = layer.alpha is not None and layer.grad_mask is None and bool(layer.alpha)
    outside = ~(layer.mask if layer.grad_mask is None else layer.mask | layer.grad_mask)
    return None if dense or not outside.any() else bool(grad[outside].any())
