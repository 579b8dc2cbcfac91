"""What one forward of a model costs when nothing in it is sparse, counted on real or meta inputs.

    Linear, Conv1D    rows x weights                       (a row: one token, one sample)
    Conv1d/2d/3d      output positions x weights           (padding counts; groups are in the weight's shape)
    attention         B H Lq Lk (Dqk + Dv)                 (a causal mask does not halve it)
    embedding         elements looked up                   (no multiply-add at all; counted where asked for)

Weights count where a module of these classes is called; weights that a model multiplies by in another way (fused
experts, `nn.MultiheadAttention`) are not seen. torch's FlopCounterMode has neither the CPU's fused attention nor the
input positions of a convolution, and sees no difference between a weight and an activation, so it is not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

__all__ = ["LayerCost", "layer_costs", "layer_macs"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WEIGHTED = (nn.Linear, Conv1D, *_CONVOLUTIONS)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS = {1: (nn.MaxPool1d, nn.AvgPool1d), 2: (nn.MaxPool2d, nn.AvgPool2d), 3: (nn.MaxPool3d, nn.AvgPool3d)}
_ATTENTION = "{}/attention"  # no module has a slash in its name


@dataclass(frozen=True)
class LayerCost:
    """Dense cost of one layer in one forward.

    macs: multiply-adds, at the positions of the output.
    input_macs: the same at the positions of the input; another number for convolutions with a stride or without
        padding only.
    elementwise: additions of a bias, and what batch norms (2 an element), ReLU (1) and pools (window) do.
    """

    macs: int
    input_macs: int
    elementwise: int = 0

    def __add__(self, other: LayerCost) -> LayerCost:
        return LayerCost(
            self.macs + other.macs, self.input_macs + other.input_macs, self.elementwise + other.elementwise
        )


@torch.no_grad()
def layer_costs(
    model: nn.Module, *args: Any, attention: bool = False, embeddings: bool = False, **kwargs: Any
) -> dict[str, LayerCost]:
    """Dense costs of one forward, by module name.

    Args:
        model: any module; run once in its current mode as `model(*args, **kwargs)`, without gradients. A model on
            the meta device is counted without computing anything.
        attention: count products of activations with each other too (scaled_dot_product_attention, and matmul,
            bmm, einsum of eager attention), as "<innermost module>/attention".
        embeddings: count each element that an `nn.Embedding` looks up as one multiply-add.

    Returns:
        name -> cost, summed over the calls; modules that never ran are left out.

    Raises:
        ValueError: `attention` is asked for and the model's implementation of it is a kernel of its own, which
            cannot be seen into.
    """
    if attention:
        _refuse_opaque_attention(model)
    costs: dict[str, LayerCost] = {}
    running: list[tuple[str, bool]] = []
    handles = []

    def add(name: str, cost: LayerCost) -> None:
        costs[name] = costs.get(name, LayerCost(0, 0)) + cost

    for name, module in model.named_modules():
        weighted = isinstance(module, _WEIGHTED)

        def enter(module: nn.Module, inputs: Any, name: str = name, weighted: bool = weighted) -> None:
            running.append((name, weighted))

        def leave(module: nn.Module, inputs: Any, named: Any, output: Any, name: str = name) -> None:
            running.pop()
            x, y = _tensor((*inputs, *named.values())), _tensor(output)
            if x is not None and y is not None:
                cost = _cost(module, x, y, embeddings)
                if cost is not None:
                    add(name, cost)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        if attention:
            with _Products(model, running, add):
                model(*args, **kwargs)
        else:
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return costs


def layer_macs(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """The multiply-adds of `layer_costs`, by module name; arguments as there."""
    return {name: cost.macs for name, cost in layer_costs(model, *args, **kwargs).items() if cost.macs}


def _tensor(values: Any) -> Tensor | None:
    """The tensor itself, or the first among several values."""
    if isinstance(values, tuple | list):
        return next((value for value in values if isinstance(value, Tensor)), None)
    return values if isinstance(values, Tensor) else None


def _cost(module: nn.Module, x: Tensor, output: Tensor, embeddings: bool) -> LayerCost | None:
    if isinstance(module, nn.Linear | Conv1D):
        features = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
        macs = output.numel() * features
        return LayerCost(macs, macs, 0 if module.bias is None else output.numel())
    if isinstance(module, _CONVOLUTIONS):
        weights = module.weight.numel()
        outputs, inputs = output.numel() // module.out_channels, x.numel() // module.in_channels
        return LayerCost(outputs * weights, inputs * weights, 0 if module.bias is None else output.numel())
    if isinstance(module, nn.Embedding):
        return LayerCost(output.numel(), output.numel()) if embeddings else None
    if isinstance(module, _NORMS):
        return LayerCost(0, 0, 2 * x.numel())
    if isinstance(module, nn.ReLU):
        return LayerCost(0, 0, x.numel())
    for dimensions, classes in _POOLS.items():
        if isinstance(module, classes):
            size: Any = module.kernel_size
            window = size**dimensions if isinstance(size, int) else math.prod(size)
            return LayerCost(0, 0, window * output.numel())
    return None


def _refuse_opaque_attention(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in (None, "eager", "sdpa"):
        raise ValueError(
            f"layer_costs: expected attention by 'sdpa' or 'eager', got {implementation!r}, which cannot be counted; "
            f"call model.set_attn_implementation('sdpa') before"
        )


class _Products(TorchDispatchMode):
    """Sees every product that runs outside the counted layers, and counts those in which no weight takes part."""

    def __init__(self, model: nn.Module, running: list[tuple[str, bool]], add: Any) -> None:
        super().__init__()
        self.running, self.add = running, add
        # A storage is the one thing that a weight shares with its views and transposes.
        held = (*model.parameters(), *model.buffers())
        self.weights = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not any(weighted for _, weighted in self.running):
            macs = self._macs(str(func.overloadpacket).removeprefix("aten."), args, kwargs)
            if macs:
                name = self.running[-1][0] if self.running else ""
                self.add(_ATTENTION.format(name), LayerCost(macs, macs))
        return func(*args, **kwargs)

    def _macs(self, operation: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        if operation.startswith("_scaled_dot_product_") and not operation.endswith("_backward"):
            query, key, value = (*args, *kwargs.values())[:3]
            batch, heads, length, width = query.shape
            return int(batch * heads * length * key.shape[-2] * (width + value.shape[-1]))
        if operation in ("mm", "bmm"):
            left, right = args[:2]
        elif operation in ("addmm", "baddbmm"):
            left, right = args[1:3]
        else:
            return 0
        if {left.untyped_storage()._cdata, right.untyped_storage()._cdata} & self.weights:
            return 0
        return int(left.numel() * right.shape[-1])
