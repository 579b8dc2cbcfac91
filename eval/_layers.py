"""Figures of sparsity layer by layer: zeros, zeros in whole blocks and what the back end skips; run beside run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tritonsparse.eval import _drawing as draw
from tritonsparse.eval._drawing import is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each at most the one before it, so narrower bars stand in wider ones.
_SHARES = (("sparsity", "zeros", 0.72), ("block_sparsity", "in blocks of zeros", 0.44), ("exploitable", "skipped", 0.2))


def layer_sparsity_figure(layers: Sequence[Mapping[str, Any]], *, title: str = "Sparsity by layer") -> Figure:
    """The figure of `plot_layer_sparsity`."""
    _check(layers)
    numel = np.array([layer["numel"] for layer in layers], dtype=float)
    shares = [share for share in _SHARES if all(is_number(layer.get(share[0])) for layer in layers)]

    figure = draw.new_figure(9.5, 1.4 + 0.21 * len(layers))
    axes = figure.add_subplot()
    rows = np.arange(len(layers))
    for number, (key, label, height) in enumerate(shares):
        values = np.array([layer[key] for layer in layers], dtype=float)
        overall = float((values * numel).sum() / numel.sum())
        colour = draw.COLOURS[(0, 2, 4)[number]]
        named = f"{label}: {overall:.3f} of all weights" if len(shares) > 1 else None
        axes.barh(rows, values, height=height, color=colour, label=named)
        if key == "sparsity":
            alone = None if named else f"all weights: {overall:.3f}"
            axes.axvline(overall, color=draw.COLOURS[1], linestyle="--", label=alone)
    axes.set_yticks(rows, [_name(layer) for layer in layers], fontsize=8)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(0.0, 1.0)
    for row, layer in enumerate(layers):
        text = f"{layer['sparsity']:.3f} of {draw.count(layer['numel'])}"
        axes.text(1.01, float(row), text, va="center", fontsize=8, color="#404040")
    draw.label_axes(axes, title, draw.SPARSITY, "layer, in the model's order")
    axes.grid(False, axis="y")
    figure.legend(loc="outside lower right", frameon=False, ncols=len(shares))
    return figure


def runs_layers_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """The figure of `plot_runs_layers`."""
    if not runs:
        raise ValueError("plot_runs_layers: expected at least one run, got none; pass label -> the report's layers")
    for layers in runs.values():
        _check(layers)
    # Layers of all runs, in the order of the first that has them.
    rows = {
        name: row for row, name in enumerate(dict.fromkeys(_name(each) for each in itertools.chain(*runs.values())))
    }
    figure = draw.new_figure(9.5, 1.6 + 0.21 * len(rows))
    axes = figure.add_subplot()
    for run, (label, layers) in enumerate(runs.items()):
        colour, _, marker = draw.style(run)
        axes.plot(
            [layer["sparsity"] for layer in layers],
            [rows[_name(layer)] for layer in layers],
            linestyle="",
            marker=marker,
            color=colour,
            fillstyle=draw.fill(run),
            label=label,
        )
    axes.set_yticks(list(rows.values()), list(rows), fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    draw.label_axes(axes, "Sparsity by layer", draw.SPARSITY, "layer, in the model's order")
    draw.shared_legend(figure)
    return figure


def _name(layer: Mapping[str, Any]) -> str:
    return str(layer.get("name", "unnamed"))


def _check(layers: Sequence[Mapping[str, Any]]) -> None:
    if not layers:
        raise ValueError("plot_layer_sparsity: expected at least one layer, got none; pass the report's layers")
    for layer in layers:
        for key, _, _ in _SHARES:
            given = layer.get(key) is not None or key == "sparsity"
            if given and (not is_number(layer.get(key)) or not 0.0 <= layer[key] <= 1.0):
                raise ValueError(
                    f"plot_layer_sparsity: expected {key} in [0, 1] for layer {layer.get('name')}, "
                    f"got {layer.get(key)}; pass a fraction, not percent"
                )
        if not is_number(layer.get("numel")) or layer["numel"] < 1:
            raise ValueError(
                f"plot_layer_sparsity: expected numel of at least 1 for layer {layer.get('name')}, "
                f"got {layer.get('numel')}; pass the number of its weights"
            )
