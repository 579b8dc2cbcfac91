"""Ŵ of every sparse layer, written once a step instead of once a forward; owned by the Sparsifier.

    write       Ŵ_l = S_l(W_l) into a buffer of layer l, all layers in one launch (kernels/weight/forward_many.py)
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
from torch import Tensor, nn

from .kernels.weight.backward_many import backward_many
from .kernels.weight.forward_many import cast_many
from .kernels.weight.table import View, ViewTable
from .layers import SparseLayer, view_versions

__all__ = ["ViewCache"]


class ViewCache:
    """The buffers and the tables of one model's sparse layers.

    Args:
        model: reloading its state dict rewrites the buffers.
        layers: name -> sparse layer. Those take part that multiply by their weight as it is stored, contiguously and
            without an exponent, and whose input is not packed, and with `defer` those that do not skip blocks; the
            others go on as without.
        dtype: of Ŵ; None keeps no buffers.
        defer: leave dense gradients to `backward`.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, SparseLayer], dtype: torch.dtype | None, defer: bool
    ) -> None:
        self.layers = [
            layer
            for layer in layers.values()
            if layer.caches_view
            and layer.exponent is None
            and layer.activation_density is None
            and layer.weight.is_contiguous()
            # The product for the gradients of some blocks has multiplied them already.
            and not (defer and layer.backend == "block")
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
            layer.defer = defer
        self.write()

    def close(self) -> None:
        """Free the buffers; the layers build their views themselves again."""
        self._handle.remove()
        self._tables, self._signature = [], []
        for layer in self.layers:
            layer.w_hat, layer.w_hat_versions, layer.defer = None, (), False

    @torch.no_grad()
    def write(self) -> None:
        """Write every buffer from the weights, thresholds and masks as they stand."""
        if self.dtype is None:
            return
        for layers, table in self._current():
            cast_many(table)
            for layer in layers:
                assert layer.w_hat is not None  # _current
                # A kernel's write is not seen by autograd, which must refuse a backward through an older view.
                torch.autograd.graph.increment_version(layer.w_hat)
                layer.w_hat_versions = view_versions(layer)

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
                if layer.threshold is not None and layer.threshold.grad is not None:
                    layer.threshold.grad.copy_(of_threshold)

    def _current(self) -> list[tuple[list[SparseLayer], ViewTable]]:
        """The tables of the views as they stand; made anew when a kind, a tensor or a device has changed."""
        taking = [layer for layer in self.layers if layer.kind != "dense"]
        if self.dtype is not None:
            for layer in taking:
                if layer.w_hat is None or layer.w_hat.device != layer.weight.device:
                    layer.w_hat = torch.empty_like(layer.weight, dtype=self.dtype)
        signature = [
            (
                layer.kind,
                layer.backend,
                *(
                    None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape)
                    for tensor in _operands(layer)
                ),
            )
            for layer in taking
        ]
        if signature != self._signature:
            groups: dict[tuple[str, torch.device], list[SparseLayer]] = {}
            for layer in taking:
                backend = "torch" if layer.backend == "torch" else "triton"
                groups.setdefault((backend, layer.weight.device), []).append(layer)
            self._tables = [
                (members, ViewTable([View(member.kind, *_operands(member)) for member in members], backend))
                for (backend, _), members in groups.items()
            ]
            self._signature = signature
        return self._tables


def _operands(
    layer: SparseLayer,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    threshold = None if layer.threshold is None else layer.threshold.detach()
    return layer.weight.detach(), threshold, layer.mask, layer.grad_mask, layer.alpha, layer.w_hat
