"""Which mask a run starts from, for methods that start from one.

"random"      as RigL, SET and their kin draw theirs
"magnitude"   the largest weights of every layer, by the method's distribution
"zeros"       every weight but the zeros that are there, exactly
tensors       given, by layer
None          the zeros that are there, where they are at least the sparsity asked for; else by magnitude where the
              model was loaded from a checkpoint, whose weights a random mask would destroy; else as the method's
              paper has it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import SparseLayer
from .methods import Method
from .methods.gmp import SLACK

__all__ = ["CHOICES", "Initial", "InitialMask", "resolve"]

CHOICES = ("magnitude", "random", "zeros")
InitialMask = str | Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Initial:
    """kind: "random", "magnitude", "zeros", "given", "paper" or, of a saved run, "restored". why: for the report.

    masks: bool, as the weights are stored, by layer, where they are known.
    """

    kind: str
    why: str
    masks: Mapping[str, Tensor] | None = None

    def __str__(self) -> str:
        return f"{self.kind} ({self.why})" if self.why else self.kind


@torch.no_grad()
def resolve(asked: InitialMask, model: nn.Module, method: Method, layers: Mapping[str, SparseLayer]) -> Initial | None:
    """What `method` starts from; None where it starts from no mask.

    Raises:
        ValueError: an unknown choice, masks that do not fit the layers, zeros that the pattern cannot hold, or a method
            that starts from no mask.
    """
    if not method.starts_from_mask or method.idle:
        if asked is not None:
            raise ValueError(
                f"sparsify: expected no initial_mask for method {method.name!r}, which starts from none, got "
                f"{asked if isinstance(asked, str) else 'tensors'!r}; leave it out"
            )
        return None
    if isinstance(asked, Mapping):
        return Initial("given", "", {name: _fitting(name, layer, asked) for name, layer in _all(layers, asked).items()})
    if asked == "zeros":
        return Initial("zeros", "asked for", {name: _own_zeros(name, layer) for name, layer in layers.items()})
    if asked is not None:
        if asked not in CHOICES:
            raise ValueError(
                f"sparsify: expected initial_mask among {', '.join(CHOICES)} or masks by layer, got {asked!r}; choose "
                f"one"
            )
        return Initial(asked, "asked for")
    total = sum(layer.weight.numel() for layer in layers.values())
    share = sum(int((layer.weight == 0).sum()) for layer in layers.values()) / total
    if share >= float(getattr(method, "sparsity", 1.0)) - SLACK:
        masks = {name: layer.nonzero_units() for name, layer in layers.items()}
        found = {name: mask for name, mask in masks.items() if mask is not None}
        if len(found) == len(masks):
            return Initial("zeros", f"the model's own, {share:.1%}", found)
    path: Any = getattr(model, "name_or_path", "")
    return Initial("magnitude", f"loaded from {path}") if path else Initial("paper", "")


def _all(layers: Mapping[str, SparseLayer], asked: Mapping[str, Tensor]) -> Mapping[str, SparseLayer]:
    if odd := sorted(asked.keys() ^ layers.keys()):
        raise ValueError(
            f"sparsify: expected an initial mask for each of the {len(layers)} sparse layers, got "
            f"{'one for' if odd[0] in asked else 'none for'} {odd[0]!r}; give every layer its mask"
        )
    return layers


def _fitting(name: str, layer: SparseLayer, asked: Mapping[str, Tensor]) -> Tensor:
    mask = asked[name]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != layer.weight.shape:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"sparsify: expected a bool mask of shape {list(layer.weight.shape)} for {name!r}, got {got}; give it as "
            f"the weight is stored"
        )
    mask = mask.to(layer.weight.device)
    units = layer.units_of(mask)
    if units is None or not torch.equal(units, mask):
        raise ValueError(
            f"sparsify: expected an initial mask of pattern '{layer.pattern}' for {name!r}, got one that keeps parts "
            f"of its units; keep or prune each whole"
        )
    return mask


def _own_zeros(name: str, layer: SparseLayer) -> Tensor:
    mask = layer.nonzero_units()
    if mask is None:
        raise ValueError(
            f"sparsify: expected zeros of pattern '{layer.pattern}' in {name!r} for initial_mask=\"zeros\", got groups "
            f'with more weights; use "magnitude"'
        )
    return mask
