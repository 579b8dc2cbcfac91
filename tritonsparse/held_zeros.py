"""Weights outside a stored mask, and the optimizer's memory of them, stay 0: written where they may have moved.

After every step W = 0 outside the mask, and every state tensor of W's shape too. Writing these zeros moves 29 bytes a
weight under Adam, in four launches a layer. They need no writing where all of this holds:

- they were known after the step before, and nothing has written to weight, mask or state since: version counters and
  addresses show it;
- the optimizer is one of `PRESERVING`: its update of an element is 0 where weight, gradient and state are;
- the gradient is 0 outside the mask. `guard` makes it so, whoever made the gradient: 9 bytes a weight, and on a GPU one
  launch for all layers.

A write through `.data` moves no counter; `Sparsifier.refresh()` after one lets the next step write all zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .kernels import _triton
from .kernels.threshold_backward_many import backward_many
from .kernels.view_table import View, ViewTable
from .layers import SparseLayer
from .optimizer_state import clear_state

__all__ = ["HeldZeros"]

PRESERVING = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop),
)


class HeldZeros:
    """What is known of the zeros of a model's layers."""

    def __init__(self) -> None:
        # By layer: what its counters were when its zeros were known last.
        self._known: dict[str, tuple[Any, ...]] = {}
        # Layers whose zeros outlast the step under way, with the counters of their masks.
        self._guarded: dict[str, tuple[Any, ...]] = {}
        self._table: ViewTable | None = None
        self._tabled: tuple[Any, ...] = ()

    def forget(self) -> None:
        """Write all zeros at the next `hold`."""
        self._known, self._guarded = {}, {}

    @torch.no_grad()
    def guard(self, layers: Mapping[str, SparseLayer], optimizer: Optimizer) -> None:
        """Where zeros are known, mask the gradient, so that they outlast the step. Called just before it."""
        self._guarded = {}
        if _preserves(optimizer):
            self._guarded = {
                name: _counters(layers[name].mask)
                for name, known in self._known.items()
                if layers[name].kind == "mask" and known == _seen(layers[name], optimizer)
            }
            self._mask_gradients([layers[name] for name in self._guarded])
        # What is not guarded moves, and under a fused optimizer no counter tells.
        self._known = {name: self._known[name] for name in self._guarded}

    @torch.no_grad()
    def hold(self, layers: Mapping[str, SparseLayer], optimizer: Optimizer | None) -> None:
        """Zero weights outside the masks, and the optimizer's memory of them, which would revive them.

        Args:
            layers: with stored masks; packed ones have nothing outside theirs.
            optimizer: None before there is one.
        """
        for name, layer in layers.items():
            if layer.compacted:
                self._known.pop(name, None)
                continue
            assert layer.mask is not None  # written by the method
            if self._guarded.get(name) != _counters(layer.mask):
                pruned = ~layer.mask
                layer.weight.masked_fill_(pruned, 0.0)
                if optimizer is not None:
                    clear_state(optimizer, layer.weight, pruned)
            if optimizer is None:
                # What its memory holds is left as it is.
                self._known.pop(name, None)
            else:
                self._known[name] = _seen(layer, optimizer)
        self._guarded = {}

    def _mask_gradients(self, layers: Sequence[SparseLayer]) -> None:
        """Zero the gradients outside the masks: on a GPU in one launch, those of whole matrices."""
        tabled = []
        for layer in layers:
            weight, mask, grad = layer.weight, layer.mask, layer.weight.grad
            if grad is None:
                continue
            assert mask is not None  # kind "mask"
            plain = grad.dtype == weight.dtype and grad.is_contiguous() and weight.is_contiguous()
            if _triton.AVAILABLE and weight.is_cuda and weight.dim() == 2 and plain and mask.is_contiguous():
                tabled.append(layer)
            else:
                grad.masked_fill_(~mask, 0.0)
        if not tabled:
            return
        signature = tuple(_counters(layer.mask)[0][1] for layer in tabled)
        if self._table is None or signature != self._tabled:
            self._table = ViewTable(
                [View("mask", layer.weight.detach(), mask=layer.mask) for layer in tabled], "triton"
            )
            self._tabled = signature
        backward_many(self._table, [layer.weight.grad for layer in tabled])


def _preserves(optimizer: Optimizer) -> bool:
    # Without eps the update of Adam and its kin is 0 / 0.
    return type(optimizer) in PRESERVING and all(group.get("eps", 1.0) > 0 for group in optimizer.param_groups)


def _counters(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What a write to the tensors moves, or another tensor in their place."""
    return tuple(None if each is None else (each._version, each.data_ptr()) for each in tensors)


def _seen(layer: SparseLayer, optimizer: Optimizer) -> tuple[Any, ...]:
    """The counters of weight, mask and the optimizer's state of the weight's shape."""
    state = optimizer.state.get(layer.weight, {}).values()
    held = [value for value in state if isinstance(value, Tensor) and value.shape == layer.weight.shape]
    return _counters(layer.weight, layer.mask, *held)
