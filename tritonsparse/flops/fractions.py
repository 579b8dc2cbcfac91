"""FLOPs of a sparse run as shares of a dense one, by a paper's convention (`flops_conventions`), from counted zeros.

    costs = layer_costs(model, **batch)                       # dense, of one forward (`flops_counting`)
    forward_fraction(sparsifier, costs)                       # "Test F"
    meter = TrainingMeter(sparsifier, costs, convention="swat")
    meter.update()                                            # "Train F", whenever densities are to be counted

Densities are those of the views; what a method's dX and dW need is the method's to say (`Method.densities`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

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
    # Kinds of the views that the last step was taken with.
    trained_kinds: dict[str, str]

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
    """FLOPs of the last training step, or of the first one to come, over dense ("Train F" of one step).

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
    """What forward, dX and dW of each layer cost in that step, in the convention's unit; arguments as there."""
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
    kept = kept_counts(sparsifier) if kept is None else kept
    densities = {}
    for name, layer in sparsifier.layers.items():
        kind = sparsifier.trained_kinds.get(name, layer.kind)
        if kind == "dense":
            activations = 1.0 if layer.sparse_input is None else layer.sparse_input.density
            packed = None if activations == 1 else Densities(1.0, 1.0, activations, activations=activations)
            densities[name] = packed or DENSE
            continue
        share = kept[name] / layer.dense_shape.numel()
        if layer.kind != kind and layer.mask is not None:
            # A sparse phase has just ended: the weights are dense again, the step was not.
            share = float(layer.mask.float().mean())
        densities[name] = sparsifier.method.densities(layer, share)
    return densities


class TrainingMeter:
    """Training FLOPs of a run over those of a dense run of the same length ("Train F"), and what each layer spent.

    Densities change from step to step; they are counted whenever `update` is called, and each count stands
    for the steps since the one before.

    Attributes:
        layers: name -> the three passes summed over the steps, in the convention's unit, as if every step were the
            forward that `macs` was counted on.

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

    def update(self, kept: Mapping[str, int] | None = None) -> float:
        """Count now (`kept`: `kept_counts`, where known); returns the fraction over the steps so far, 1.0 at first."""
        since = self.sparsifier.step - self.steps
        if since > 0:
            passes = self.convention.passes(self.costs, _training_densities(self.sparsifier, kept))
            self.layers = {name: self.layers[name] + each * since for name, each in passes.items()}
            self.spent += since * sum(each.training for each in passes.values()) / self.dense
            self.steps = self.sparsifier.step
        return self.spent / self.steps if self.steps else 1.0

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
        """Restore `state_dict`.

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
