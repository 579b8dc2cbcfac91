"""The per-layer report: what is sparse, how much, at what threshold and cost, and what stayed dense and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .layers import SparseLayer
from .methods import Method
from .selection import Skip

__all__ = ["LayerRow", "Report", "make_report"]


@dataclass(frozen=True)
class LayerRow:
    """One sparsified layer. `threshold` is T = sigma(s); multiply-adds are of one dense forward."""

    name: str
    shape: tuple[int, ...]
    numel: int
    kept: int
    sparsity: float
    threshold: float | None
    alpha: float | None
    macs: int
    macs_kept: float
    view: str
    backend: str
    backend_reason: str


@dataclass(frozen=True)
class Report:
    """What `Sparsifier.report()` returns: print it, or take `to_json()`."""

    method: str
    step: int
    layers: list[LayerRow]
    skipped: list[Skip]

    @property
    def sparsity(self) -> float:
        """Zeros over all weights of the sparsified layers."""
        return 1.0 - sum(row.kept for row in self.layers) / sum(row.numel for row in self.layers)

    @property
    def macs_fraction(self) -> float:
        """Forward multiply-adds of the sparsified layers over their dense ones."""
        return sum(row.macs_kept for row in self.layers) / sum(row.macs for row in self.layers)

    def to_json(self) -> str:
        """The same as one JSON document."""
        return json.dumps({**dataclasses.asdict(self), "sparsity": self.sparsity, "macs_fraction": self.macs_fraction})

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.name) for row in self.layers))
        columns = f"{'shape':>13}  {'sparsity':>8}  {'threshold':>9}  {'MACs':>8}  {'of dense':>8}  back end"
        head = f"{'layer':<{width}}  {columns}"
        lines = [f"{self.method} at step {self.step}", head, "-" * len(head)]
        for row in self.layers:
            shape = "x".join(str(size) for size in row.shape)
            threshold = "-" if row.threshold is None else f"{row.threshold:.3g}"
            lines.append(
                f"{row.name:<{width}}  {shape:>13}  {row.sparsity:>8.2%}  {threshold:>9}  {_count(row.macs):>8}  "
                f"{row.kept / row.numel:>8.1%}  {row.backend}"
            )
        total = sum(row.macs for row in self.layers)
        weights = sum(row.numel for row in self.layers)
        lines.append("-" * len(head))
        lines.append(
            f"{f'{len(self.layers)} layers':<{width}}  {_count(weights):>13}  {self.sparsity:>8.2%}  {'':>9}  "
            f"{_count(total):>8}  {self.macs_fraction:>8.1%}"
        )
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
    macs: Mapping[str, int] | None,
) -> Report:
    """Read every layer once; see `Sparsifier.report`."""
    rows = []
    for name, layer in layers.items():
        numel, kept = layer.weight.numel(), layer.kept_count()
        dense = numel if macs is None else macs.get(name, 0)
        threshold = None if layer.threshold is None else float(torch.sigmoid(layer.threshold.detach()).mean())
        rows.append(
            LayerRow(
                name=name,
                shape=tuple(layer.weight.shape),
                numel=numel,
                kept=kept,
                sparsity=1.0 - kept / numel,
                threshold=threshold,
                alpha=None if layer.alpha is None else float(layer.alpha),
                macs=dense,
                macs_kept=dense * kept / numel,
                view=layer.kind,
                backend=layer.backend,
                backend_reason=layer.backend_reason,
            )
        )
    return Report(method.name, step, rows, list(skipped))


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return f"{number:.0f}"


def as_rows(report: Report) -> list[dict[str, Any]]:
    """The layers as plain dicts, for results files and plots."""
    return [dataclasses.asdict(row) for row in report.layers]
