"""FLOPs of a sparse run as shares of a dense one, by a paper's convention (`flops_conventions`), from counted zeros.

    costs = layer_costs(model, **batch)                       # dense, of one forward (`flops_counting`)
    forward_fraction(sparsifier, costs)                       # "Test F"
    meter = TrainingMeter(sparsifier, costs, convention="swat")
    meter.update()                                            # "Train F" of the steps so far

Inference costs what is not zero. Training costs what the views keep: a mask's weights, zeros that have just grown among
them; of thresholds, the weights that pass. What dX and dW need is the method's to say (`Method.densities`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from ..layers import SparseLayer
from ..methods import Densities, Method
from .conventions import CONVENTIONS, DENSE, Convention, Costs, Passes, convention_named
from .counting import LayerCost, layer_costs, layer_macs

__all__ = [
    "CONVENTIONS",
    "Convention",
    "LayerCost",
    "Passes",
    "TrainingMeter",
    "forward_fraction",
    "kept_counts",
    "layer_costs",
    "layer_macs",
    "training_fraction",
    "training_passes",
]


class Sparsified(Protocol):
    """What is read of a `tritonsparse.Sparsifier`."""

    layers: dict[str, SparseLayer]
    method: Method
    # Told of every step before it moves anything.
    meters: WeakSet[Any]

    @property
    def step(self) -> int: ...


def kept_counts(sparsifier: Sparsified) -> dict[str, int]:
    """Weights that are not zero, by layer name. Reads every layer and waits for the device: count once, pass it on."""
    return {name: layer.kept_count() for name, layer in sparsifier.layers.items()}


def forward_fraction(
    sparsifier: Sparsified,
    macs: Costs | None = None,
    *,
    convention: str = "autosparse",
    kept: Mapping[str, int] | None = None,
) -> float:
    """Forward FLOPs of the model as it stands over its dense ones ("Test F").

    Args:
        macs: `layer_costs` or, for "autosparse" and "rigl", `layer_macs`; dense layers in it (the output head) count in
            full. Without it the sparsified layers count `weight.numel()` each.
        convention: one of `CONVENTIONS`.
        kept: `kept_counts`, where they are known already.

    Raises:
        ValueError: an unknown convention, or costs that have none of the sparse layers.
        TypeError: the convention needs `layer_costs`.
    """
    rule = convention_named("forward_fraction", convention)
    costs = _costs("forward_fraction", sparsifier, macs, rule)
    kept = kept_counts(sparsifier) if kept is None else kept
    densities = {}
    for name, layer in sparsifier.layers.items():
        share = kept[name] / layer.dense_shape.numel()
        densities[name] = Densities(share, share, share)
    return rule.forward_fraction(costs, densities)


def training_fraction(
    sparsifier: Sparsified,
    macs: Costs | None = None,
    *,
    convention: str = "autosparse",
    kept: Mapping[str, int] | None = None,
) -> float:
    """FLOPs of a training step through the views as they stand, over dense ("Train F" of one step).

    Arguments and errors as for `forward_fraction`.
    """
    rule = convention_named("training_fraction", convention)
    costs = _costs("training_fraction", sparsifier, macs, rule)
    return rule.training_fraction(costs, _training_densities(sparsifier, kept))


def training_passes(
    sparsifier: Sparsified,
    macs: Costs | None = None,
    *,
    convention: str = "autosparse",
    kept: Mapping[str, int] | None = None,
) -> dict[str, Passes]:
    """What forward, dX and dW of each layer cost in such a step, in the convention's unit; arguments as there."""
    rule = convention_named("training_passes", convention)
    costs = _costs("training_passes", sparsifier, macs, rule)
    return rule.passes(costs, _training_densities(sparsifier, kept))


def _costs(function: str, sparsifier: Sparsified, macs: Costs | None, rule: Convention) -> dict[str, LayerCost]:
    layers = sparsifier.layers
    if macs is None:
        macs = {name: layer.dense_shape.numel() for name, layer in layers.items()}
    costs = rule.costs(function, macs)
    if not any(name in layers and cost.macs for name, cost in costs.items()):
        raise ValueError(
            f"{function}: expected the cost of at least one sparse layer (such as {next(iter(layers))}), got "
            f"{', '.join(list(costs)[:3]) or 'no layer'}; count the model that was sparsified, with layer_costs"
        )
    return costs


def _training_densities(sparsifier: Sparsified, kept: Mapping[str, int] | None) -> dict[str, Densities]:
    return _Window.open(sparsifier, kept).densities()


@dataclass(frozen=True)
class _Window:
    """Steps whose views are alike: what they were, and what passed the thresholds when they began.

    fixed: densities of dense layers and of masks. passing: of other layers, the share of their weights.
    """

    signature: _Signature
    method: Method
    layers: Mapping[str, SparseLayer]
    fixed: dict[str, Densities]
    passing: dict[str, float]

    @classmethod
    def open(cls, sparsifier: Sparsified, kept: Mapping[str, int] | None) -> _Window:
        """kept: weights that are not zero, by layer, where they are known."""
        layers, method = sparsifier.layers, sparsifier.method
        # The method's own numbers change after a step: those of this moment are billed.
        method = copy.copy(method)
        masked = {name: layer.mask for name, layer in layers.items() if layer.kind == "mask" and layer.mask is not None}
        device = next((mask.device for mask in masked.values()), None)
        # The host waits once, not at every layer.
        counts = torch.stack([mask.sum().to(device) for mask in masked.values()]).tolist() if masked else []
        fixed = {}
        for name, count in zip(masked, counts, strict=True):
            fixed[name] = method.densities(layers[name], count / layers[name].dense_shape.numel())
        fixed |= {name: _dense(layer) for name, layer in layers.items() if layer.kind == "dense"}
        passing = {name: layer for name, layer in layers.items() if name not in fixed}
        shares = {
            name: (layer.kept_count() if kept is None else kept[name]) / layer.dense_shape.numel()
            for name, layer in passing.items()
        }
        return cls(_Signature.of(sparsifier), method, layers, fixed, shares)

    def densities(self, passing: Mapping[str, float] | None = None) -> dict[str, Densities]:
        """Of its steps, at whose end `passing` passed: their mean is taken as that of begin and end."""
        ends = self.passing if passing is None else passing
        found = {
            name: self.method.densities(self.layers[name], (share + ends.get(name, share)) / 2)
            for name, share in self.passing.items()
        }
        return self.fixed | found


def _dense(layer: SparseLayer) -> Densities:
    activations = 1.0 if layer.sparse_input is None else layer.sparse_input.density
    return DENSE if activations == 1 else Densities(1.0, 1.0, activations, activations=activations)


@dataclass(frozen=True)
class _Signature:
    """What the views of a step are known by, without a look at the device: their masks, held so that none is taken for
    another one in its place, and all else."""

    masks: list[Tensor | None]
    rest: tuple[Any, ...]

    @classmethod
    def of(cls, sparsifier: Sparsified) -> _Signature:
        layers = sparsifier.layers.values()
        masks = [mask for layer in layers for mask in (layer.mask, layer.grad_mask)]
        versions = (None if mask is None else mask._version for mask in masks)
        packed = (1.0 if layer.sparse_input is None else layer.sparse_input.density for layer in layers)
        return cls(masks, (sparsifier.method.cost_state(), *(layer.kind for layer in layers), *versions, *packed))

    def is_still(self, other: _Signature) -> bool:
        return self.rest == other.rest and all(a is b for a, b in zip(self.masks, other.masks, strict=True))


class TrainingMeter:
    """Training FLOPs of a run over those of a dense run of the same length ("Train F"), and what each layer spent.

    The Sparsifier tells it of every step before the step moves anything, so each is billed by the views that it saw:
    those of masks exactly, also where they change between two calls of `update`. What passes a threshold drifts; it
    is counted when `update` is called and when a phase changes, and taken to have drifted evenly in between.

    Attributes:
        layers: name -> the three passes summed over the steps, in the convention's unit, as if every step were the
            forward that `macs` was counted on.
        steps: how many steps were billed: those since it was made, or resumed.

    Raises:
        ValueError, TypeError: as `forward_fraction`.
    """

    def __init__(self, sparsifier: Sparsified, macs: Costs | None = None, *, convention: str = "autosparse") -> None:
        self.sparsifier = sparsifier
        self.convention = convention_named("TrainingMeter", convention)
        self.costs = _costs("TrainingMeter", sparsifier, macs, self.convention)
        self.dense = sum((passes.training for passes in self.convention.passes(self.costs, {}).values()), 0.0)
        self.layers = dict.fromkeys(self.costs, Passes(0.0, 0.0, 0.0))
        self.spent = 0.0
        self.steps = 0
        self._upto = sparsifier.step
        self._window = _Window.open(sparsifier, None)
        sparsifier.meters.add(self)

    def before_step(self) -> None:
        """A step is about to move weights: bill what came before, if its views were others."""
        if not self._window.signature.is_still(_Signature.of(self.sparsifier)):
            self._bill(None)

    def update(self, kept: Mapping[str, int] | None = None) -> float:
        """Count now (`kept`: `kept_counts`, where known); returns the fraction over the steps so far, 1.0 at first."""
        self._bill(kept)
        return self.spent / self.steps if self.steps else 1.0

    def _bill(self, kept: Mapping[str, int] | None) -> None:
        window, since = self._window, self.sparsifier.step - self._upto
        self._window = _Window.open(self.sparsifier, kept)
        self._upto = self.sparsifier.step
        if since > 0:
            passes = self.convention.passes(self.costs, window.densities(self._window.passing))
            self.layers = {name: self.layers[name] + each * since for name, each in passes.items()}
            self.spent += since * sum(each.training for each in passes.values()) / self.dense
            self.steps += since

    def totals(self) -> Passes:
        """Forward, dX and dW summed over layers and steps."""
        return sum(self.layers.values(), Passes(0.0, 0.0, 0.0))

    def overall(self) -> dict[str, Any]:
        """Counts now; the fraction, and the three passes of each layer and of all of them, for results files."""
        fraction = self.update()
        total = dataclasses.asdict(self.totals())
        layers = {name: dataclasses.asdict(each) for name, each in self.layers.items()}
        return {
            "train_flops_fraction": fraction,
            "train_flops": {"unit": self.convention.unit, "steps": self.steps, **total, "layers": layers},
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and names."""
        layers = {name: [each.forward, each.grad_input, each.grad_weight] for name, each in self.layers.items()}
        return {"spent": self.spent, "steps": self.steps, "convention": self.convention.name, "layers": layers}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore `state_dict`, after the Sparsifier's own.

        Raises:
            ValueError: it was counted by another convention or over other layers.
        """
        found = (saved.get("convention"), set(saved.get("layers", ())))
        if found != (self.convention.name, set(self.layers)):
            raise ValueError(
                f"TrainingMeter: expected a state counted by {self.convention.name!r} over {len(self.layers)} layers, "
                f"got {found[0]!r} over {len(found[1])} layers; resume with the convention and the model of the run"
            )
        self.spent, self.steps = float(saved["spent"]), int(saved["steps"])
        self.layers = {name: Passes(*map(float, saved["layers"][name])) for name in self.layers}
        self._upto = self.sparsifier.step
        self._window = _Window.open(self.sparsifier, None)
