"""How four papers count: what sparse layers cost in forward, dX and dW, from the densities of the three passes.

With f = multiply-adds of the dense forward, f_in = the same at the input's positions, e = elementwise operations of
the layer, and d_f, d_x, d_w = the densities that the method reports (`Method.densities`):

    name         unit           forward      dX           dW         source
    autosparse   multiply-add   d_f f        d_x f        d_w f      AutoSparse, Tables 1-3; STR, section 4
    rigl         operation      2 d_f f      2 d_x f      2 d_w f    RigL, appendix H and its published code
    acdc         operation      2 d_f f + e  = forward    = forward  AC/DC, appendix C.2 as its published code has it
    swat         multiply-add   d_f f        d_x f_in     a f_in     SWAT, appendix A.3, equations 4-6

a is the density of the activations: what SWAT keeps of them, and 1/2 for every other layer of a sparse model ("default
activation sparsity"), layers that stayed dense among them; of the dense model that it is compared with, and of a layer
in a dense phase, 1. The mask of the weights does not enter equation 6. A layer without densities (the output head,
attention) is dense in all three passes otherwise. Norms, activations, biases and pools count in "acdc" only; the
optimizer and the choosing of masks nowhere.

Figures of different conventions do not compare: RigL at 80 % uniform costs 0.23 of dense by its own count and 0.33 by
SWAT's.

Differs from the published code in: AC/DC's counts zeros once an epoch, this whenever it is asked; it counts the rows
of a linear layer as one where the input has three dimensions, this counts each; weights that a dense phase leaves at
exactly 0 count as work here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..methods import Densities
from .counting import LayerCost

__all__ = ["CONVENTIONS", "DENSE", "Convention", "Costs", "Passes", "convention_named"]

DENSE = Densities(1.0, 1.0, 1.0, activations=1.0)
DEFAULT_ACTIVATION_DENSITY = 0.5
_DENSE_AMONG_SPARSE = Densities(1.0, 1.0, 1.0)

Costs = Mapping[str, int] | Mapping[str, LayerCost]


@dataclass(frozen=True)
class Passes:
    """What the three passes of one layer cost, in the unit of a convention."""

    forward: float
    grad_input: float
    grad_weight: float

    @property
    def training(self) -> float:
        """The three together."""
        return self.forward + self.grad_input + self.grad_weight

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward, self.grad_input + other.grad_input, self.grad_weight + other.grad_weight
        )

    def __mul__(self, factor: float) -> Passes:
        return Passes(factor * self.forward, factor * self.grad_input, factor * self.grad_weight)


@dataclass(frozen=True)
class Convention:
    """One way to count; see the table above.

    unit: "multiply-adds" or "operations", of which a multiply-add is two.
    counts: what is counted, for people.
    needs_costs: a layer's multiply-adds alone do not suffice, `layer_costs` does.
    """

    name: str
    unit: str
    counts: str
    needs_costs: bool
    count: Callable[[LayerCost, Densities], Passes]

    def costs(self, function: str, macs: Costs) -> dict[str, LayerCost]:
        """`macs` as costs; plain multiply-adds suffice where only they count.

        Raises:
            TypeError: this convention needs what plain multiply-adds do not tell.
        """
        plain = next((name for name, cost in macs.items() if isinstance(cost, int)), None)
        if self.needs_costs and plain is not None:
            raise TypeError(
                f"{function}: expected costs from layer_costs(model, ...) for the convention {self.name!r}, got a "
                f"plain number for {plain!r}; count with layer_costs, not with layer_macs"
            )
        return {name: LayerCost(cost, cost) if isinstance(cost, int) else cost for name, cost in macs.items()}

    def passes(self, macs: Costs, densities: Mapping[str, Densities]) -> dict[str, Passes]:
        """Name -> what its passes cost; a layer that `densities` lacks is dense."""
        costs = self.costs("passes", macs)
        other = _DENSE_AMONG_SPARSE if any(each != DENSE for each in densities.values()) else DENSE
        return {name: self.count(cost, densities.get(name, other)) for name, cost in costs.items()}

    def forward_fraction(self, macs: Costs, densities: Mapping[str, Densities]) -> float:
        """Forward cost over the dense one ("Test F")."""
        sparse, dense = self._totals(macs, densities)
        return sparse.forward / dense.forward

    def training_fraction(self, macs: Costs, densities: Mapping[str, Densities]) -> float:
        """Cost of a training step over the dense one ("Train F")."""
        sparse, dense = self._totals(macs, densities)
        return sparse.training / dense.training

    def _totals(self, macs: Costs, densities: Mapping[str, Densities]) -> tuple[Passes, Passes]:
        nothing = Passes(0.0, 0.0, 0.0)
        return sum(self.passes(macs, densities).values(), nothing), sum(self.passes(macs, {}).values(), nothing)


def _autosparse(cost: LayerCost, density: Densities) -> Passes:
    return Passes(density.forward * cost.macs, density.grad_input * cost.macs, density.grad_weight * cost.macs)


def _rigl(cost: LayerCost, density: Densities) -> Passes:
    return _autosparse(cost, density) * 2.0


def _acdc(cost: LayerCost, density: Densities) -> Passes:
    forward = 2.0 * density.forward * cost.macs + cost.elementwise
    return Passes(forward, forward, forward)


def _swat(cost: LayerCost, density: Densities) -> Passes:
    activations = DEFAULT_ACTIVATION_DENSITY if density.activations is None else density.activations
    return Passes(density.forward * cost.macs, density.grad_input * cost.input_macs, activations * cost.input_macs)


_WEIGHTS = "linear and convolution layers"

CONVENTIONS: dict[str, Convention] = {
    "autosparse": Convention("autosparse", "multiply-adds", _WEIGHTS, False, _autosparse),
    "rigl": Convention("rigl", "operations", f"{_WEIGHTS}, a multiply-add as two", False, _rigl),
    "acdc": Convention(
        "acdc",
        "operations",
        f"{_WEIGHTS} with biases, a multiply-add as two, batch norms, ReLU and pools; training is three forwards",
        True,
        _acdc,
    ),
    "swat": Convention(
        "swat",
        "multiply-adds",
        f"{_WEIGHTS}; backward at the input's positions, dW by the density of the activations",
        True,
        _swat,
    ),
}


def convention_named(function: str, name: str) -> Convention:
    """The convention of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in CONVENTIONS:
        raise ValueError(
            f"{function}: expected a FLOPs convention of {', '.join(CONVENTIONS)}, got {name!r}; choose one of them"
        )
    return CONVENTIONS[name]
