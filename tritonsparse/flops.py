"""Multiply-adds: of a layer's dense forward, counted on real inputs, and the share of them a sparse run needs.

Convention (AutoSparse and STR, "Train F" and "Test F"): multiply-adds of the sparsified layers plus, where
given, of the dense ones; forward, dX and dW count alike; no norms, activations, attention products or
embeddings; activation sparsity is not counted. Per step, as fractions of dense training:

    dense (1 + 1 + 1)/3    alpha = 0: (d + d + d)/3    alpha > 0: (d + d + |B|/n)/3
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from .sparsifier import Sparsifier

__all__ = ["TrainingMeter", "forward_fraction", "layer_macs"]


@torch.no_grad()
def layer_macs(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Dense multiply-adds of one forward, by name of the linear layer.

    Args:
        model: any module; run once in its current mode as `model(*args, **kwargs)`, without gradients.

    Returns:
        name -> rows x in_features x out_features, summed over the calls; layers that never ran are left out.
    """
    counts: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            features = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
            counts[name] = counts.get(name, 0) + inputs[0].numel() // features * weight.numel()

        handles.append(module.register_forward_hook(count))
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def forward_fraction(sparsifier: Sparsifier, macs: Mapping[str, int] | None = None) -> float:
    """Forward multiply-adds of the model as it stands over its dense ones ("Test F").

    `macs` may hold dense layers too (the output head); they count in full. Without it the sparsified layers
    count `weight.numel()` each.
    """
    macs = macs or {name: layer.weight.numel() for name, layer in sparsifier.layers.items()}
    sparse = sum(
        count * _density(sparsifier, name) if name in sparsifier.layers else count for name, count in macs.items()
    )
    return sparse / sum(macs.values())


def training_fraction(sparsifier: Sparsifier, macs: Mapping[str, int] | None = None) -> float:
    """Multiply-adds of the last training step, or of the first one to come, over dense ("Train F" of one step)."""
    macs = macs or {name: layer.weight.numel() for name, layer in sparsifier.layers.items()}
    sparse = 0.0
    for name, count in macs.items():
        layer = sparsifier.layers.get(name)
        kind = "dense" if layer is None else sparsifier.trained_kinds.get(name, layer.kind)
        if layer is None or kind == "dense":
            sparse += count
            continue
        density = _density(sparsifier, name)
        if layer.kind != kind and layer.mask is not None:
            # A sparse phase has just ended: the weights are dense again, the step was not.
            density = float(layer.mask.float().mean())
        sparse += count * sparsifier.method.densities(layer, density).training
    return sparse / sum(macs.values())


def _density(sparsifier: Sparsifier, name: str) -> float:
    layer = sparsifier.layers[name]
    return layer.kept_count() / layer.weight.numel()


class TrainingMeter:
    """Training multiply-adds of a run over those of a dense run of the same length ("Train F").

    Densities change from step to step; they are counted whenever `update` is called, and each count stands
    for the steps since the one before.
    """

    def __init__(self, sparsifier: Sparsifier, macs: Mapping[str, int] | None = None) -> None:
        self.sparsifier = sparsifier
        self.macs = None if macs is None else dict(macs)
        self.spent = 0.0
        self.steps = 0

    def update(self) -> float:
        """Count now; returns the fraction over the steps so far (1.0 before the first)."""
        since = self.sparsifier.step - self.steps
        if since > 0:
            self.spent += since * training_fraction(self.sparsifier, self.macs)
            self.steps = self.sparsifier.step
        return self.spent / self.steps if self.steps else 1.0

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"spent": self.spent, "steps": self.steps}

    def load_state_dict(self, saved: Mapping[str, float]) -> None:
        """Restore `state_dict`."""
        self.spent, self.steps = float(saved["spent"]), int(saved["steps"])
