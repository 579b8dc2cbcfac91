"""The per-layer report: what is sparse, in which sense, at what threshold and cost, and what stayed dense and why.

Three shares of the same weights stand side by side, because each is at most the one before and is taken for it:

    sparsity      weights that are zero
    in blocks     weights that lie in blocks of nothing but zeros
    exploitable   weights that the layer's back end leaves out of its products, which alone saves time; of the forward
                  alone under "semi_structured"
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .flops.conventions import Convention, Costs, convention_named
from .layers import SparseLayer
from .methods import Densities, Method
from .pattern import Block, Channel, Pattern, Unstructured
from .selection import Skip

__all__ = ["LayerRow", "Report", "as_rows", "block_sparsity", "cut_off", "make_report", "summary_line"]

DEFAULT_BLOCK = Block(64, 64)

# What each back end leaves out: most multiply by every element of S(W), zeros and all.
_SKIPS = {"torch": None, "triton": None, "fused": None, "block": "blocks", "semi_structured": "elements"}


@dataclass(frozen=True)
class LayerRow:
    """One sparsified layer.

    sparsity, block_sparsity, exploitable: fractions of its weights, as the module says.
    threshold: T = sigma(s) or t itself, the mean where a layer has several.
    macs, macs_kept: of one forward, dense and as the layer stands, in the unit of the report's convention.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    kept: int
    sparsity: float
    block_sparsity: float
    exploitable: float
    threshold: float | None
    alpha: float | None
    macs: float
    macs_kept: float
    view: str
    backend: str
    backend_reason: str


@dataclass(frozen=True)
class Report:
    """What `Sparsifier.report()` returns: print it, or take `to_json()`.

    block: rows x columns of the blocks of `block_sparsity`, 0 columns being a whole row. convention, unit: how
    `macs` were counted. statistics: `Method.statistics`. first_masks: by what they were chosen, if any.
    """

    method: str
    step: int
    block: tuple[int, int]
    convention: str
    unit: str
    layers: list[LayerRow]
    skipped: list[Skip]
    statistics: dict[str, float]
    first_masks: str = ""

    @property
    def sparsity(self) -> float:
        """Zeros over all weights of the sparsified layers."""
        return 1.0 - self._share([row.kept for row in self.layers])

    @property
    def block_sparsity(self) -> float:
        """Weights in blocks of zeros over all weights of the sparsified layers."""
        return self._share([row.block_sparsity * row.numel for row in self.layers])

    @property
    def exploitable(self) -> float:
        """Weights that the back ends leave out over all weights of the sparsified layers."""
        return self._share([row.exploitable * row.numel for row in self.layers])

    def _share(self, counts: list[Any]) -> float:
        return float(sum(counts) / sum(row.numel for row in self.layers))

    @property
    def macs_fraction(self) -> float:
        """Forward cost of the sparsified layers over their dense one, by the report's convention."""
        return sum(row.macs_kept for row in self.layers) / sum(row.macs for row in self.layers)

    def overall(self) -> dict[str, Any]:
        """What the report says of all layers together, for results files."""
        return {
            "sparsity": self.sparsity,
            "block_sparsity": self.block_sparsity,
            "exploitable": self.exploitable,
            "flops_convention": self.convention,
            "method_statistics": self.statistics,
        }

    def to_json(self) -> str:
        """The same as one JSON document."""
        names = ("sparsity", "block_sparsity", "exploitable", "macs_fraction")
        return json.dumps({**dataclasses.asdict(self), **{name: getattr(self, name) for name in names}})

    def __str__(self) -> str:
        width = max(len("layer"), len(_layers(len(self.layers))), *(len(row.name) for row in self.layers))
        label = "MACs" if self.unit == "multiply-adds" else "FLOPs"

        def line(*cells: str) -> str:
            sizes = (15, 8, 9, 11, 9, 8, 8)
            middle = "  ".join(f"{cell:>{size}}" for cell, size in zip(cells[1:8], sizes, strict=True))
            return f"{cells[0]:<{width}}  {middle}  {cells[8]}".rstrip()

        head = line(
            "layer", "shape", "sparsity", "in blocks", "exploitable", "threshold", label, "of dense", "back end"
        )
        first = f"; first masks: {self.first_masks}" if self.first_masks else ""
        lines = [f"{self.method} at step {self.step}{first}", head, "-" * len(head)]
        for row in self.layers:
            shape = "x".join(str(size) for size in row.shape)
            threshold = "-" if row.threshold is None else f"{row.threshold:.3g}"
            fraction = f"{row.macs_kept / row.macs:.1%}" if row.macs else "-"
            shares = (f"{row.sparsity:.2%}", f"{row.block_sparsity:.2%}", f"{row.exploitable:.2%}")
            lines.append(line(row.name, shape, *shares, threshold, _count(row.macs), fraction, row.backend))
        total, weights = sum(row.macs for row in self.layers), sum(row.numel for row in self.layers)
        shares = (f"{self.sparsity:.2%}", f"{self.block_sparsity:.2%}", f"{self.exploitable:.2%}")
        name = _layers(len(self.layers))
        lines.append("-" * len(head))
        lines.append(line(name, _count(weights), *shares, "", _count(total), f"{self.macs_fraction:.1%}", ""))
        rows, columns = self.block
        lines.append(f"in blocks: {f'{rows}x{columns}' if columns else 'whole rows'} of nothing but zeros")
        lines.append(f"{label}: one forward, by the convention {self.convention!r}")
        for reason in sorted({row.backend_reason for row in self.layers}):
            lines.append(f"back end: {reason}")
        groups: dict[str, list[Skip]] = {}
        for skip in self.skipped:
            groups.setdefault(skip.reason, []).append(skip)
        for reason, skips in groups.items():
            names = ", ".join(skip.name for skip in skips[:3]) + (", ..." if len(skips) > 3 else "")
            lines.append(f"stays dense, {reason}: {_count(sum(skip.numel for skip in skips))} weights ({names})")
        return "\n".join(lines)


def make_report(
    method: Method,
    layers: Mapping[str, SparseLayer],
    skipped: Iterable[Skip],
    step: int,
    macs: Costs | None,
    pattern: Pattern | None = None,
    convention: str = "autosparse",
) -> Report:
    """Read every layer once; see `Sparsifier.report`."""
    rule = convention_named("report", convention)
    if macs is None:
        macs = {name: layer.dense_shape.numel() for name, layer in layers.items()}
    if not isinstance(macs, Mapping):
        raise TypeError(f"report: expected costs by layer name, got {type(macs).__name__}; pass flops.layer_costs(...)")
    costs = rule.costs("report", {name: cost for name, cost in macs.items() if name in layers})  # type: ignore[arg-type]
    if not any(cost.macs for cost in costs.values()):
        raise ValueError(
            f"report: expected the multiply-adds of at least one sparse layer (such as {next(iter(layers))}), got "
            f"{', '.join(list(macs)[:3]) or 'no layer'}; count the model that was sparsified, with flops.layer_costs"
        )
    block = _block(pattern or Unstructured())
    rows = [_row(name, layer, costs.get(name), rule, block) for name, layer in layers.items()]
    first = str(method.initial or "")
    return Report(method.name, step, block, rule.name, rule.unit, rows, list(skipped), method.statistics(), first)


def _row(name: str, layer: SparseLayer, cost: Any, rule: Convention, block: tuple[int, int]) -> LayerRow:
    numel = layer.dense_shape.numel()
    kept, in_blocks = numel, 0.0
    # A dense view keeps every weight, whichever are zero.
    if layer.kind != "dense":
        zero = layer.effective_weight() == 0
        kept, in_blocks = numel - int(zero.sum()), block_sparsity(layer.oriented(zero), block)
    share = kept / numel
    counted = {name: cost} if cost is not None else {}
    densities = {name: Densities(share, share, share)}
    dense = sum((each.forward for each in rule.passes(counted, {}).values()), 0.0)
    sparse = sum((each.forward for each in rule.passes(counted, densities).values()), 0.0)
    return LayerRow(
        name=name,
        shape=tuple(layer.dense_shape),
        numel=numel,
        kept=kept,
        sparsity=1.0 - share,
        block_sparsity=in_blocks,
        exploitable=_exploitable(layer, 1.0 - share, in_blocks),
        threshold=cut_off(layer),
        alpha=None if layer.alpha is None else float(layer.alpha),
        macs=dense,
        macs_kept=sparse,
        view=layer.kind,
        backend=layer.backend.name,
        backend_reason=layer.backend.reason,
    )


def _exploitable(layer: SparseLayer, sparsity: float, in_blocks: float) -> float:
    skips = _SKIPS[layer.backend.name] if layer.kind != "dense" else None
    return {"blocks": in_blocks, "elements": sparsity, None: 0.0}[skips]


def cut_off(layer: SparseLayer) -> float | None:
    """The magnitude below which weights are pruned, the mean where the layer has several; None without a threshold.

    Waits for the device.
    """
    if layer.threshold is None:
        return None
    threshold = layer.threshold.detach()
    # Cut-offs themselves, or their logits.
    return float((threshold if layer.kind in ("hard", "step") else torch.sigmoid(threshold)).mean())


def _block(pattern: Pattern) -> tuple[int, int]:
    """The pattern's own block; 64 x 64, a tile of a product, for patterns without one."""
    if isinstance(pattern, Channel):
        return 1, 0
    block = pattern if isinstance(pattern, Block) else DEFAULT_BLOCK
    return block.rows, block.columns


def block_sparsity(zero: Tensor, block: tuple[int, int]) -> float:
    """Share of the elements of a weight that lie in blocks of nothing but zeros.

    Args:
        zero: bool [N, K], True where the weight is zero.
        block: rows and columns; 0 columns: a whole row. At the edges, blocks are what is left of them.
    """
    n, k = zero.shape
    rows, columns = min(block[0], n), min(block[1] or k, k)
    right, below = -k % columns, -n % rows
    grid = pad(zero, (0, right, 0, below), value=True).unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    empty = grid.all(dim=3).all(dim=1)
    # Elements that each block really has.
    heights = torch.full((empty.shape[0],), rows, device=zero.device)
    widths = torch.full((empty.shape[1],), columns, device=zero.device)
    heights[-1] -= below
    widths[-1] -= right
    return int((empty * heights[:, None] * widths).sum()) / (n * k)


def _layers(number: int) -> str:
    return f"{number} layer" if number == 1 else f"{number} layers"


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return f"{number:.0f}"


def summary_line(
    model: nn.Module,
    method: Method,
    layers: Mapping[str, SparseLayer],
    skipped: Iterable[Skip],
    tables: Mapping[str, Tensor],
    table_sparsity: float,
) -> str:
    """What was converted, and what was not and why, in one line; `tables` are the sparse embeddings."""
    weights = sum(layer.dense_shape.numel() for layer in layers.values())
    unstored = weights - sum(layer.weight.numel() for layer in layers.values())
    total = sum(parameter.numel() for parameter in model.parameters()) + unstored
    reasons: dict[str, int] = {}
    for skip in skipped:
        reasons[skip.reason] = reasons.get(skip.reason, 0) + 1
    embeddings = ""
    if tables:
        count = sum(table.numel() for table in tables.values())
        embeddings = f"; {count:,} weights of embeddings at {table_sparsity:.0%} in sparse phases"
    first = f"; first masks: {method.initial}" if method.initial else ""
    named = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
    return (
        f"tritonsparse: {method.name} on {_layers(len(layers))}, {weights:,} weights ({weights / total:.1%} of the "
        f"model); skipped: {named}{embeddings}{first}"
    )


def as_rows(report: Report) -> list[dict[str, Any]]:
    """The layers as plain dicts, for results files and plots."""
    return [dataclasses.asdict(row) for row in report.layers]
