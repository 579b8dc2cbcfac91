"""SWAT: the largest weights in forward and dX, the largest activations in dW, every weight trained.

Raihan and Aamodt, "Sparse Weight Activation Training", arXiv:2001.01969, Algorithm 1.

    forward   Y  = X W_hat,  W_hat = TopK(W)           X is dense
    saved     What and Xhat = TopK(X), compressed    (kernels/activation/linear.py, activation/conv2d.py)
    backward  dX = dY What
              dW = dY^T Xhat                         applied to every weight: alpha = 1
    distribution "uniform" (SWAT-U), "erk" (SWAT-ERK), "momentum" (SWAT-M): layer l keeps the share
              mean |momentum over its kept weights| / sum over layers  of all kept weights

The master weights stay dense; `finalize` prunes once. The activations of a layer are as sparse as its weights unless
`activation_sparsity` says otherwise; biases and norms are dense. With `refresh_every` P, cut-offs are exact on every
P-th step and reused between, on weights and on activations: a weight that crosses its layer's cut-off counts at once,
and how many are kept varies. Tell `Sparsifier.set_row_mask` of padding: its rows count for no cut-off.

Differs from the paper in:
- of weights exact counts and ties to the lowest index (units.py) on refresh steps. Of activations everything at or
  above the k-th value is kept, ties too, as the published code does of both.
- a cut-off is of elements: blocks, channels, N:M and structures are chosen exactly at every step, as the code does with
  its structures.
- the published code compresses nothing: it saves Xhat dense.
- cut-offs are refreshed by optimizer steps, in every layer; in the code by epoch, and in linear layers at every call.
- SWAT-M: a layer's share is bounded by its size, and what is beyond goes to the others in proportion to their shares;
  the code spreads it evenly in up to 1000 passes. Chosen anew on refresh steps, from "uniform" before the first.
- structure "channel" is the code's, one unit a 2-D kernel (filter, input channel), which is a single weight where
  kernels are 1 x 1; "filter" one unit a filter. Linear layers stay unstructured, as there.
- the first convolution is not left dense by itself: use `exclude`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..clock import Clock
from ..kernels.activation.cutoff import SCOPES
from ..layers import SparseLayer
from ..layers.sparse_input import SparseInput
from ..masks.distribution import DISTRIBUTIONS, Distribution, apportion, divide
from ..masks.topk import check_sparsity, kept_count, topk_mask
from ..masks.units import choose_masks, unit_count
from ..optimizer_state import momentum
from ..pattern import Pattern, Unstructured
from .base import Densities, Layers, MethodState
from .masked import MaskMethod

__all__ = ["SWAT"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SWAT(MaskMethod):
    """Sparse forward and backward passes over dense master weights.

    sparsity: of the weights, in [0, 1); 0 leaves every layer dense.
    activation_sparsity: of the inputs that dW is made of; None = each layer's weight sparsity.
    distribution: "uniform", "erk" or "momentum".
    structure: None = units of the pattern; "channel" or "filter" on convolutions.
    refresh_every: steps between exact choices of masks and cut-offs.
    activation_scope: what a cut-off is common to: "batch", "sample" or "plane".
    slack: room for packed activations over what their density needs; math.inf for all, without a host sync.
    """

    name: ClassVar[str] = "swat"
    infinite: ClassVar[tuple[str, ...]] = ("slack",)
    activation_sparsity: float | None = None
    distribution: Distribution = "uniform"
    structure: str | None = None
    refresh_every: int = 1
    activation_scope: str = "batch"
    slack: float = 1.25
    _warned: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _cutoffs: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    # Of the last refresh, by layer: what of W is kept, and the smallest magnitude among it.
    _sparsities: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    _weight_cutoffs: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_sparsity is not None:
            self.activation_sparsity = check_sparsity(self.name, self.activation_sparsity)
        if isinstance(self.distribution, str) and self.distribution not in (*DISTRIBUTIONS, "momentum"):
            raise ValueError(
                f"swat: expected distribution to be one of {', '.join(DISTRIBUTIONS)}, momentum, got "
                f"{self.distribution!r}"
            )
        for name, value, known in (
            ("structure", self.structure, (None, "channel", "filter")),
            ("activation_scope", self.activation_scope, SCOPES),
        ):
            if value not in known:
                raise ValueError(
                    f"swat: expected {name} to be one of {', '.join(map(str, known))}, got {value!r}; choose one"
                )
        if self.refresh_every < 1:
            raise ValueError(f"swat: expected refresh_every of at least 1, got {self.refresh_every}; correct it")
        if self.refresh_every > 1 and self.activation_scope != "batch":
            raise ValueError(
                f'swat: expected activation_scope "batch" with refresh_every above 1, got '
                f'"{self.activation_scope}"; the next batch has other samples'
            )
        if not self.slack >= 1.0:
            raise ValueError(f"swat: expected slack of at least 1, got {self.slack}; 1.25 leaves a quarter more room")

    @torch.no_grad()
    def setup(self, layers: Layers, clock: Clock, pattern: Pattern, seed: int) -> None:
        if self.structure is not None and not isinstance(pattern, Unstructured):
            raise ValueError(
                f'swat: expected pattern "unstructured" beside structure "{self.structure}", got "{pattern}"; '
                f"both name the units"
            )
        super().setup(layers, clock, pattern, seed)

    def first_masks(self, layers: Layers, clock: Clock) -> None:
        # Before the first step there is no momentum: layers share as with "uniform".
        sparsity = divide(self._settled, self.dims(layers), self.sparsity)
        for layer in layers.values():
            layer.alpha = layer.number(1.0)
            layer.sparse_input = SparseInput(
                scope=self.activation_scope, slack=self.slack, remembers=self.refresh_every > 1
            )
        self._refresh(layers, sparsity)

    def _refresh(self, layers: Layers, sparsity: Mapping[str, float]) -> None:
        """Choose masks exactly, and remember by what."""
        if masks := self.restored(layers):
            self.write(layers, masks)
        else:
            self._choose(layers, sparsity)
        for name, layer in layers.items():
            assert layer.mask is not None  # just written
            self._sparsities[name] = 1.0 - float(layer.mask.double().mean())
        if self.refresh_every > 1 and self._by_elements:
            for name, layer in layers.items():
                assert layer.mask is not None  # just written
                kept = layer.weight.detach().abs().masked_fill(~layer.mask, torch.inf)
                self._weight_cutoffs[name] = kept.amin().float()
        self._size_activations(layers)

    @property
    def _settled(self) -> Distribution:
        return "uniform" if self.distribution == "momentum" else self.distribution

    @property
    def _by_elements(self) -> bool:
        return self.structure is None and isinstance(self._pattern, Unstructured)

    def _reuse(self, layers: Layers) -> None:
        """Masks between refreshes: by the remembered cut-off, or of as many units."""
        if not self._by_elements:
            self._choose(layers, self._sparsities)
            return
        for name, layer in layers.items():
            assert layer.mask is not None  # written in setup
            above = layer.weight.detach().abs() >= self._weight_cutoffs[name].to(layer.weight.device)
            # A layer that would keep nothing keeps what it has: without asking the device.
            layer.mask.copy_(torch.where(above.any(), above, layer.mask))

    def _choose(self, layers: Layers, sparsity: Mapping[str, float]) -> None:
        scores = self.magnitudes(layers)
        if self.structure is None:
            self.write(layers, choose_masks(scores, dict(sparsity), self._pattern))
        else:
            self.write(
                layers, {name: self._structured(layer, scores[name], sparsity[name]) for name, layer in layers.items()}
            )

    def _size_activations(self, layers: Layers) -> None:
        for name, layer in layers.items():
            density = 1.0 - self._sparsities[name]
            if self.activation_sparsity is not None:
                density = 1.0 - self.activation_sparsity
            elif self.distribution == "uniform":
                density = 1.0 - self.sparsity
            _sparse_input(layer).density = density

    def _structured(self, layer: SparseLayer, score: Tensor, sparsity: float) -> Tensor:
        """Mask [N, K] by whole 2-D kernels or filters of a convolution."""
        if layer.weight.dim() != 4:
            return topk_mask(score, kept_count(score.numel(), sparsity))
        each = layer.weight.detach().abs()
        units = each.sum((2, 3), keepdim=True) if self.structure == "channel" else each.sum((1, 2, 3), keepdim=True)
        mask = topk_mask(units, kept_count(units.numel(), sparsity))
        return layer.oriented(mask.expand(layer.weight.shape))

    @torch.no_grad()
    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        for name, layer in layers.items():
            if _sparse_input(layer).take_overflow() and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "swat: a batch kept more of the input of %s than slack %g leaves room for; it was saved whole",
                    name,
                    self.slack,
                )
        if clock.step % self.refresh_every:
            for name, layer in layers.items():
                sparse = _sparse_input(layer)
                if sparse.cutoff is None and sparse.last_cutoff is not None:
                    sparse.cutoff = self._cutoffs[name] = sparse.last_cutoff
            self._reuse(layers)
            return
        sparsity = divide(self._settled, self.dims(layers), self.sparsity)
        if self.distribution == "momentum":
            sparsity = self._by_momentum(layers, optimizer)
        self._refresh(layers, sparsity)
        self._cutoffs.clear()
        for layer in layers.values():
            sparse = _sparse_input(layer)
            sparse.cutoff = sparse.last_cutoff = None

    def _by_momentum(self, layers: Layers, optimizer: Optimizer) -> dict[str, float]:
        """Sparsity of each layer from the mean |momentum| of its kept weights; what does not fit goes to the others."""
        means, room, size = {}, {}, {}
        momenta = {name: momentum(optimizer, layer.weight) for name, layer in layers.items()}
        if all(found is None for found in momenta.values()):
            raise ValueError(
                f"swat: expected an optimizer with momentum or Adam's averages for distribution "
                f'"momentum", got {type(optimizer).__name__}; use "uniform" or "erk"'
            )
        for name, layer in layers.items():
            found = momenta[name]
            assert layer.mask is not None  # written in setup
            # A layer that has had no gradient yet (LayerDrop, a frozen one) has a momentum of 0.
            means[name] = 0.0 if found is None else float(found.abs()[layer.mask].double().mean())
            units = layer.weight.numel() if self.structure else unit_count(self.shapes(layers)[name], self._pattern)
            room[name], size[name] = units, layer.weight.numel() // units
        total = sum(layer.weight.numel() for layer in layers.values())
        kept = apportion(kept_count(total, self.sparsity), means, room, size)
        return {name: 1.0 - kept[name] / room[name] for name in layers}

    def densities(self, layer: SparseLayer, kept: float) -> Densities:
        activations = 1.0 if layer.sparse_input is None else layer.sparse_input.density
        return Densities(kept, kept, activations, activations)

    def state_dict(self) -> MethodState:
        return {
            **{f"cutoffs/{name}": cutoff for name, cutoff in self._cutoffs.items()},
            **{f"weight_cutoffs/{name}": cutoff for name, cutoff in self._weight_cutoffs.items()},
            **{f"sparsities/{name}": sparsity for name, sparsity in self._sparsities.items()},
        }

    def load_state_dict(self, state: Mapping[str, float | int | Tensor]) -> None:
        def part(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self._cutoffs = part("cutoffs/")
        self._weight_cutoffs = part("weight_cutoffs/")
        self._sparsities = {name: float(value) for name, value in part("sparsities/").items()}

    def resume(self, layers: Layers) -> None:
        for name, layer in layers.items():
            cutoff = self._cutoffs.get(name)
            _sparse_input(layer).cutoff = None if cutoff is None else cutoff.to(layer.weight.device)
        self._size_activations(layers)


def _sparse_input(layer: SparseLayer) -> SparseInput:
    assert layer.sparse_input is not None  # given in setup
    return layer.sparse_input
