"""What the methods with stored masks share: the view, the pattern, and zeros that stay zero."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..clock import Clock
from ..held_zeros import HeldZeros
from ..masks.distribution import divide, given, overall
from ..masks.topk import check_sparsity
from ..masks.units import check_pattern, choose_masks, random_score
from ..pattern import NM, Block, Channel, Pattern, Unstructured
from .base import Layers, Method

__all__ = ["MaskMethod", "still", "write_masks"]

logger = logging.getLogger(__name__)


def write_masks(layers: Layers, masks: Mapping[str, Tensor]) -> None:
    """Make `masks` (bool [N, K]) the layers' views."""
    for name, layer in layers.items():
        layer.hide(layer.stored(masks[name]))


def still(layers: Layers, moving: Layers) -> int:
    """Weights that the masks keep of layers whose masks do not move."""
    return sum(int(layer.mask.sum()) for name, layer in layers.items() if name not in moving and layer.mask is not None)


@dataclass(kw_only=True)
class MaskMethod(Method):
    """Base of the methods that keep a mask a layer.

    sparsity: fraction of zeros, in [0, 1); 0 runs dense. A mapping from fnmatch patterns on layer names to fractions
        becomes the `distribution`, and this what it comes to over all layers.
    """

    patterns: ClassVar[tuple[type, ...]] = (Unstructured, Block, Channel, NM)
    sparsity: float
    # Whether every layer keeps the sparsity that its distribution gave it.
    keeps_distribution: ClassVar[bool] = True
    _pattern: Pattern = field(default_factory=Unstructured, init=False, repr=False, compare=False)
    _seed: int = field(default=0, init=False, repr=False, compare=False)
    _empty: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _zeros: HeldZeros = field(default_factory=HeldZeros, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, Mapping):
            if not self.keeps_distribution or not hasattr(self, "distribution"):
                raise ValueError(
                    f"{self.name}: expected one sparsity, which this method shares out over the layers itself, got "
                    f"{dict(self.sparsity)}; pass a number"
                )
            # By layer: what it is over all is known once the layers are (`settle`).
            setattr(self, "distribution", dict(self.sparsity))  # noqa: B010 - a field of subclasses
            divide(dict(self.sparsity), {}, 0.0)  # refuses what is no sparsity
            self.sparsity = max(self.sparsity.values(), default=0.0)
        self.sparsity = check_sparsity(self.name, self.sparsity)
        super().__post_init__()

    def settle(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        by_layer = getattr(self, "distribution", None)
        if isinstance(by_layer, Mapping):
            self.sparsity = check_sparsity(self.name, overall(shapes, given(by_layer, shapes)))

    def setup(self, layers: Layers, clock: Clock, pattern: Pattern, seed: int) -> None:
        check_pattern(self.name, {name: layer.unit_shape for name, layer in layers.items()}, pattern)
        by_layer = getattr(self, "distribution", None)
        if isinstance(pattern, NM) and isinstance(by_layer, Mapping) and len(set(by_layer.values()) - {0.0}) > 1:
            raise ValueError(
                f"{self.name}: expected one sparsity with pattern '{pattern}', got {dict(by_layer)}; leave layers out "
                f"that are to be dense"
            )
        if isinstance(pattern, NM) and self.sparsity and abs(self.sparsity - (1 - pattern.n / pattern.m)) > 1e-6:
            raise ValueError(
                f"{self.name}: expected sparsity {1 - pattern.n / pattern.m:g}, which pattern '{pattern}' has, got "
                f"{self.sparsity}; change one of them"
            )
        self._pattern, self._seed = pattern, seed
        if not self.idle:
            self.first_masks(layers, clock)
            for layer in layers.values():
                if layer.mask is None:
                    # Copies and averages made while the layer is dense follow it when it no longer is.
                    layer.mask = torch.ones_like(layer.weight, dtype=torch.bool)

    @property
    def idle(self) -> bool:
        return self.sparsity == 0.0

    def first_masks(self, layers: Layers, clock: Clock) -> None:
        """Write the first masks, of a sparsity above 0; further checks come before the first change."""

    def restored(self, layers: Layers) -> dict[str, Tensor] | None:
        """Masks of the saved run that is being loaded, [N, K] by layer: to write, and choose none."""
        if self.initial is None or self.initial.kind != "restored":
            return None
        return {
            name: layer.oriented(self.initial.masks[name].to(layer.weight.device)) for name, layer in layers.items()
        }

    def choose_first(
        self, layers: Layers, key: str, sparsity: Mapping[str, float], paper: str = "random"
    ) -> Mapping[str, Tensor]:
        """The masks to start from: bool [N, K] by layer; `key` seeds the random ones, `paper` says what None means."""
        kind, given = ("paper", None) if self.initial is None else (self.initial.kind, self.initial.masks)
        if given is not None:
            return {name: layer.oriented(given[name]) for name, layer in layers.items()}
        if (paper if kind == "paper" else kind) == "magnitude":
            scores: Mapping[str, Tensor] = self.magnitudes(layers)
        else:
            shapes = self.shapes(layers)
            scores = {name: random_score(shape, self._seed, key, name) for name, shape in shapes.items()}
        return choose_masks(scores, sparsity, self._pattern)

    def magnitudes(self, layers: Layers) -> dict[str, Tensor]:
        """|W| as [N, K] by layer."""
        return {name: layer.oriented(layer.weight.detach().abs()) for name, layer in layers.items()}

    def shapes(self, layers: Layers) -> dict[str, tuple[int, ...]]:
        """[N, K] by layer."""
        return {name: tuple(layer.oriented(layer.weight).shape) for name, layer in layers.items()}

    def dims(self, layers: Layers) -> dict[str, tuple[int, ...]]:
        """All dimensions of the weights, a convolution's kernel included: what ERK counts."""
        return {name: tuple(layer.weight.shape) for name, layer in layers.items()}

    def say_empty(self, layers: Layers, step: int) -> None:
        """Warn, once, of layers that a choice over all layers leaves without a weight."""
        layered = {name: layer.mask for name, layer in layers.items() if layer.mask is not None}
        kept = dict(zip(layered, torch.stack([mask.any().cpu() for mask in layered.values()]).tolist(), strict=True))
        names = [name for name, some in kept.items() if not some and name not in self._empty]
        self._empty.update(names)
        if names:
            logger.warning(
                "%s: step %d: no weight is kept in %s; nothing passes through a layer without weights (said once)",
                *(self.name, step, ", ".join(names)),
            )

    def moving(self, layers: Layers) -> Layers:
        """Those whose masks move: weights that do not train keep theirs, as what would grow in them stays 0."""
        return {name: layer for name, layer in layers.items() if layer.weight.requires_grad}

    def write(self, layers: Layers, masks: Mapping[str, Tensor]) -> None:
        """`write_masks`, for methods that look at what they write."""
        write_masks(layers, masks)

    def hold(self, layers: Layers, optimizer: Optimizer | None) -> None:
        """Zero weights outside the masks, and the optimizer's memory of them, which would revive them."""
        self._zeros.hold(layers, optimizer)

    def guard(self, layers: Layers, optimizer: Optimizer) -> None:
        self._zeros.guard(layers, optimizer)

    def forget(self) -> None:
        self._zeros.forget()
