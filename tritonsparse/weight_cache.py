"""The effective weight of every sparse layer, written once a step instead of once a forward; owned by the Sparsifier.

    write       W_hat_l = S_l(W_l) into a buffer of layer l, all layers in one launch (kernels/weight/forward_many.py)
    backward    G_l <- m_l · G_l over the accumulated, reduced dense gradients (kernels/weight/backward_many.py)

A buffer is written at `attach`, after every real step, after `load_state_dict` of the Sparsifier or of the model, and
by `Sparsifier.refresh()`; never in a forward. Its address stays, so that CUDA graphs may hold it. A layer reads it only
if it is in the dtype of the product and, outside torch.compile, if weight, threshold and mask are those that were
written: an in-place edit moves their version, another tensor has another address, and the layer then builds its view
itself. An edit in place through `.data`, and a fused optimizer that is not attached, move nothing and need `refresh()`:
so a buffer is kept only where it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .kernels.weight.backward_many import backward_many
from .kernels.weight.forward_many import cast_many
from .kernels.weight.table import Viewed, ViewTable
from .layers import SparseLayer
from .layers.cache import Cache, versions_of

__all__ = ["WeightCache"]


class WeightCache:
    """The buffers and the tables of one model's sparse layers.

    Args:
        model: reloading its state dict rewrites the buffers.
        layers: name -> sparse layer. Those take part that multiply by their weight as it is stored, contiguously and
            without an exponent, and whose input is not packed, and with `defer` those that do not skip blocks; the
            others go on as without.
        dtype: of the effective weights; None keeps no buffers.
        defer: leave dense gradients to `backward`.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, SparseLayer], dtype: torch.dtype | None, defer: bool
    ) -> None:
        self.layers = [
            layer
            for layer in layers.values()
            if layer.caches
            and layer.exponent is None
            and (layer.sparse_input is None or layer.sparse_input.density == 1)
            and layer.weight.is_contiguous()
            # The product for the gradients of some blocks has multiplied them already.
            and not (defer and layer.backend.name == "block")
            # A threshold a column is not one that the tables describe.
            and not (layer.transposed and layer.threshold is not None and layer.threshold.dim() == 2)
        ]
        self.dtype = dtype
        self.defer = defer
        # One table for each back end and device among the layers: usually one.
        self._tables: list[tuple[list[SparseLayer], ViewTable]] = []
        self._signature: list[Any] = []
        self._handle = model.register_load_state_dict_post_hook(lambda module, keys: self.write())
        for layer in self.layers:
            layer.cache = Cache(defer=defer)
        self.write()

    def close(self) -> None:
        """Free the buffers; the layers build their views themselves again."""
        self._handle.remove()
        self._tables, self._signature = [], []
        for layer in self.layers:
            layer.cache = None

    @torch.no_grad()
    def write(self) -> None:
        """Write every buffer from the weights, thresholds and masks as they stand."""
        if self.dtype is None:
            return
        for layers, table in self._current():
            cast_many(table)
            for layer in layers:
                cache = layer.cache
                assert cache is not None and cache.w_hat is not None  # _current
                # A kernel's write is not seen by autograd, which must refuse a backward through an older weight.
                torch.autograd.graph.increment_version(cache.w_hat)
                cache.versions = versions_of(layer.weight, layer.threshold, layer.mask)

    @torch.no_grad()
    def backward(self) -> None:
        """Turn the dense gradients in `.grad` into those of weights and thresholds."""
        if not self.defer:
            return
        for layers, table in self._current():
            grads = [layer.weight.grad for layer in layers]
            # Those of a reducer's bucket are contiguous; of an unusual optimizer or hook, perhaps not.
            whole = [None if grad is None else grad.contiguous() for grad in grads]
            of_thresholds = backward_many(table, whole)
            for layer, grad, written, of_threshold in zip(layers, grads, whole, of_thresholds, strict=True):
                if grad is not None and written is not None and written is not grad:
                    grad.copy_(written)
                if of_threshold is not None and layer.threshold is not None and layer.threshold.grad is not None:
                    layer.threshold.grad.copy_(of_threshold)

    def _current(self) -> list[tuple[list[SparseLayer], ViewTable]]:
        """The tables of the views as they stand; made anew when a kind, a tensor or a device has changed."""
        # A layer copied or unpickled since has no cache.
        taking = [layer for layer in self.layers if layer.kind != "dense" and layer.cache is not None]
        members = [self._member(layer) for layer in taking]
        signature = [
            [layer.backend.name, member.view.kind, *map(_identity, (member.weight, *member.view[1:], member.w_hat))]
            for layer, member in zip(taking, members, strict=True)
        ]
        if signature != self._signature:
            groups: dict[tuple[str, torch.device], list[tuple[SparseLayer, Viewed]]] = {}
            for layer, member in zip(taking, members, strict=True):
                groups.setdefault((layer.backend.elementwise, layer.weight.device), []).append((layer, member))
            self._tables = [
                ([layer for layer, _ in group], ViewTable([member for _, member in group], backend))
                for (backend, _), group in groups.items()
            ]
            self._signature = signature
        return self._tables

    def _member(self, layer: SparseLayer) -> Viewed:
        """The layer's operands, with a buffer for its effective weight where one is kept."""
        cache, view = layer.cache, layer.view
        assert cache is not None  # _current
        if self.dtype is not None and (cache.w_hat is None or cache.w_hat.device != layer.weight.device):
            cache.w_hat = torch.empty_like(layer.weight, dtype=self.dtype)
        threshold = None if view.threshold is None else view.threshold.detach()
        return Viewed(layer.weight.detach(), view._replace(threshold=threshold), cache.w_hat)


def _identity(tensor: Any) -> Any:
    return None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape)
