"""Training on the kept blocks alone, for as long as the topology stays: weights, gradients and optimizer state packed.

A step is that of the dense storage, for what methods zero outside their masks after every step does not exist here: the
same products, the same elementwise update, the same bits in float32 on a CPU where blocks are multiples of 16. Three
things may differ in the last place: the products of a `Conv1D`, whose dense weight lies transposed in memory; a sum
over a whole tensor, such as a gradient's norm; and under autocast dW, which is summed in float32 here and rounded to
the low precision there.

When the topology stays is the method's to say (`Method.frozen_topology`); the Sparsifier follows it. How a layer is
packed: `layers/compact.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .clock import Clock
from .layers import SparseLayer
from .layers.compact import CompactLayer, compact, expand
from .methods import Method
from .optimizer_state import Together, check_elementwise, map_state
from .pattern import Block, Pattern

__all__ = ["Compaction"]


class Compaction:
    """Packs the layers of one Sparsifier while its method's topology stays.

    Args:
        layers, method, clock, pattern: the Sparsifier's own.
    """

    def __init__(self, layers: Mapping[str, SparseLayer], method: Method, clock: Clock, pattern: Pattern) -> None:
        self.layers, self.method, self.clock, self.pattern = layers, method, clock, pattern
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []

    def start(self, optimizer: Optimizer | None, *, cached: bool) -> None:
        """Pack now and after every step, where the method allows; raises as `Sparsifier.compact` says."""
        if optimizer is None:
            raise RuntimeError("compact: expected an attached optimizer, got none; call attach(optimizer) first")
        if dist.is_available() and dist.is_initialized():
            raise RuntimeError(
                "compact: expected a single process, got an initialised process group: DistributedDataParallel reduces "
                "gradients in buckets of the size that the weights had; train in dense storage there"
            )
        if cached:
            raise ValueError(
                "compact: expected an optimizer attached without cache_dtype and defer, got cached views or deferred "
                "multipliers of dense weights; attach without them"
            )
        if not isinstance(self.pattern, Block):
            raise ValueError(
                f"compact: expected a pattern of blocks, got '{self.pattern}'; sparsify with pattern='block:32' or "
                f"another size"
            )
        if self.method.idle or self.method.frozen_topology(self.clock) is None:
            raise ValueError(
                f"compact: expected a method whose topology stays for a while, got {self.method.name!r} as it is "
                f"configured, which needs pruned weights at every step; train in dense storage"
            )
        if isinstance(optimizer, Together):
            raise ValueError(
                f"compact: expected one optimizer, got {len(optimizer.parts)}; train in dense storage with several"
            )
        check_elementwise("compact", optimizer)
        for name, layer in self.layers.items():
            choice = layer.backend.asked
            if choice not in ("auto", "torch") and (self.pattern.rows % 16 or self.pattern.columns % 16):
                raise ValueError(
                    f"compact: expected blocks with sides that are multiples of 16 for backend={choice!r}, got "
                    f"'{self.pattern}' on {name}; use backend='auto' or 'torch', or such blocks"
                )
        self._pack(optimizer)
        if self._optimizer is None:
            self._handles = [
                optimizer.register_state_dict_post_hook(self._as_dense),
                optimizer.register_load_state_dict_pre_hook(self._refuse_load),
            ]
        self._optimizer = optimizer

    def stop(self) -> None:
        """Dense storage, for good."""
        if self._optimizer is not None:
            self._unpack(self._optimizer)
            self._optimizer = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_hook(self) -> None:
        """A step is taken and `after_step` comes: what it will change, or the coming step needs, is dense again."""
        if self._optimizer is not None and not self.method.frozen_topology(self.clock):
            self._unpack(self._optimizer)

    def after_hook(self) -> None:
        """`after_step` has run."""
        if self._optimizer is not None:
            self._pack(self._optimizer)

    def refuse_load(self) -> None:
        """Refuse to put the tensors of a checkpoint where packed ones are."""
        if any(layer.compacted for layer in self.layers.values()):
            raise RuntimeError(
                "load_state_dict: expected weights in dense storage, got packed blocks; call expand() before and "
                "compact() after"
            )

    def _refuse_load(self, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        self.refuse_load()

    @torch.no_grad()
    def _as_dense(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state dict as it would be in dense storage; its own state stays as it is."""
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        packed = {id(layer.weight): layer for layer in self.layers.values() if isinstance(layer, CompactLayer)}
        state = dict(saved["state"])
        for parameter, key in zip(held, keys, strict=True):
            if (layer := packed.get(id(parameter))) is not None and key in state:
                state[key] = {
                    name: layer.unpacked(value)
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                    else value
                    for name, value in state[key].items()
                }
        return {**saved, "state": state}

    @torch.no_grad()
    def _pack(self, optimizer: Optimizer) -> None:
        """Pack every layer of kind "mask" if the topology stays; all checks come before the first change."""
        if not self.method.frozen_topology(self.clock):
            return
        chosen = {name: layer for name, layer in self.layers.items() if layer.kind == "mask" and not layer.compacted}
        for name, layer in chosen.items():
            _check_layer(name, layer, optimizer)
        for layer in chosen.values():
            compact(layer, partial(map_state, "compact", optimizer))

    @torch.no_grad()
    def _unpack(self, optimizer: Optimizer) -> None:
        for layer in self.layers.values():
            if isinstance(layer, CompactLayer):
                expand(layer, partial(map_state, "expand", optimizer))


def _check_layer(name: str, layer: SparseLayer, optimizer: Optimizer) -> None:
    assert layer.mask is not None  # kind "mask"
    what = None
    if layer.grad_mask is not None or (layer.alpha is not None and bool(layer.alpha > 0)):
        what = "gradients of pruned weights (grad_mask, alpha > 0)"
    elif layer.exponent is not None:
        what = "a view of a power of the weight"
    elif layer.sparse_input is not None and layer.sparse_input.density < 1:
        what = "packed activations"
    if what is not None:
        raise ValueError(
            f"compact: expected a layer that only its mask makes sparse, got {what} on {name}; expand() it"
        )
    map_state("compact", optimizer, layer.weight, None)
    if bool((layer.weight * ~layer.mask).any()):
        raise RuntimeError(
            f"compact: expected zeros outside the mask of {name}, got weights that would be lost; take a step first, "
            f"after which methods with masks write their zeros"
        )
