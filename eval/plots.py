"""Pictures of runs: how training went, where the zeros are, what the FLOPs saved cost.

Each picture is two functions, `<name>_figure` that builds it and `plot_<name>` that writes it as PNG. Nothing here
touches pyplot, so no display, no global state and no figure that lives on after its file is written.

As a program it draws everything that `all_results.json` of one or more runs allows:

    python -m tritonsparse.eval.plots RUN_DIR [RUN_DIR ...] --output DIR
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritonsparse.eval import _drawing as draw
from tritonsparse.eval._drawing import History, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One panel for each: key of a history entry, key of its values per layer, title, label of the y axis.
_PANELS = (
    ("loss", None, "Training loss", "loss [nats]"),
    ("sparsity", "layer_sparsity", "Sparsity", "fraction of weights that are 0"),
    ("alpha", None, "Gradient annealing", "alpha (gradient scale of pruned weights)"),
    (None, "thresholds", "Learned thresholds", "threshold (weight magnitude)"),
    ("learning_rate", None, "Learning rate", "learning rate"),
    ("train_flops_fraction", None, "Training cost so far", "training FLOPs (fraction of dense)"),
)
_FRACTIONS = ("sparsity", "train_flops_fraction")
_DRAWN = tuple(key for panel in _PANELS for key in panel[:2] if key is not None)


def plot_training(history: History, path: str | os.PathLike[str]) -> Path:
    """Writes the course of one run: a panel for each quantity that its history has.

    Args:
        history: one mapping for each logging step, with `step` and any of `loss`, `sparsity`, `alpha`,
            `learning_rate`, `train_flops_fraction`, `thresholds` and `layer_sparsity` (layer name -> number).
        path: the PNG file; folders on the way are made.

    Raises:
        ValueError: nothing to draw.
    """
    return draw.save(training_figure(history), path)


def training_figure(history: History) -> Figure:
    """The figure of `plot_training`."""
    _check_history("plot_training", history)
    panels = [panel for panel in _PANELS if draw.has(history, panel[0]) or draw.has(history, panel[1])]
    if not panels:
        raise ValueError(
            f"plot_training: expected entries with any of {', '.join(_DRAWN)}, "
            f"got only {', '.join(sorted(history[0]))}; log at least the loss"
        )
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = draw.new_figure(7.0 * columns, 3.5 * rows)
    for i, (key, per_layer, title, label) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        overall = draw.has(history, key)
        layers = draw.has(history, per_layer)
        if layers:
            draw.layers(axes, *draw.layer_series(history, per_layer), with_mean=not overall)
        if overall and layers:
            axes.plot(*draw.series(history, key), color="black", linewidth=2.0, label="all layers")
        elif overall:
            draw.smoothed(axes, *draw.series(history, key), draw.COLOURS[0], label=None)
        draw.label_axes(axes, title, "optimizer step", label)
        if key in _FRACTIONS:
            axes.set_ylim(-0.02, 1.02)
        if layers:
            draw.legend_below(axes)
    return figure


def plot_layer_sparsity(layers: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Writes one bar for each layer, in the model's order from top to bottom.

    Args:
        layers: mappings with `name`, `sparsity` in [0, 1] and `numel`, the number of weights.
        path: the PNG file; folders on the way are made.

    Raises:
        ValueError: no layer, or a sparsity outside [0, 1].
    """
    return draw.save(layer_sparsity_figure(layers), path)


def layer_sparsity_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure of `plot_layer_sparsity`."""
    if not layers:
        raise ValueError(
            "plot_layer_sparsity: expected at least one layer, got none; pass the report's layers"
        )
    for layer in layers:
        if not is_number(layer.get("sparsity")) or not 0.0 <= layer["sparsity"] <= 1.0:
            raise ValueError(
                f"plot_layer_sparsity: expected sparsity in [0, 1] for layer {layer.get('name')}, "
                f"got {layer.get('sparsity')}; pass a fraction, not percent"
            )
        if not is_number(layer.get("numel")) or layer["numel"] < 1:
            raise ValueError(
                f"plot_layer_sparsity: expected numel of at least 1 for layer {layer.get('name')}, "
                f"got {layer.get('numel')}; pass the number of its weights"
            )
    sparsity = np.array([layer["sparsity"] for layer in layers], dtype=float)
    numel = np.array([layer["numel"] for layer in layers], dtype=float)
    overall = float((sparsity * numel).sum() / numel.sum())

    figure = draw.new_figure(9.5, 1.4 + 0.21 * len(layers))
    axes = figure.add_subplot()
    rows = np.arange(len(layers))
    axes.barh(rows, sparsity, height=0.72, color=draw.COLOURS[0])
    axes.axvline(overall, color=draw.COLOURS[1], linestyle="--", label=f"all weights: {overall:.3f}")
    axes.set_yticks(rows, [str(layer.get("name", "unnamed")) for layer in layers], fontsize=8)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(0.0, 1.0)
    for row, value, count in zip(rows, sparsity, numel, strict=True):
        axes.text(1.01, row, f"{value:.3f} of {draw.count(count)}", va="center", fontsize=8, color="#404040")
    draw.label_axes(
        axes, "Sparsity by layer", "fraction of weights that are 0", "layer, in the model's order"
    )
    axes.grid(False, axis="y")
    figure.legend(loc="outside lower right", frameon=False)
    return figure


def plot_runs(runs: Mapping[str, History], path: str | os.PathLike[str]) -> Path:
    """Writes loss and sparsity of several runs over each other.

    Args:
        runs: label -> history, as for `plot_training`.
        path: the PNG file; folders on the way are made.

    Raises:
        ValueError: no run, or one without history.
    """
    return draw.save(runs_figure(runs), path)


def runs_figure(runs: Mapping[str, History]) -> Figure:
    """The figure of `plot_runs`."""
    if not runs:
        raise ValueError("plot_runs: expected at least one run, got none; pass label -> history")
    for label, history in runs.items():
        _check_history(f"plot_runs (run {label!r})", history)
    panels = [panel for panel in _PANELS[:2] if any(draw.has(history, panel[0]) for history in runs.values())]
    if not panels:
        raise ValueError(
            "plot_runs: expected loss or sparsity in a history, got neither; log at least the loss"
        )
    figure = draw.new_figure(6.6 * len(panels) + 1.4, 4.4)
    for i, (key, _, title, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for run, (name, history) in enumerate(runs.items()):
            if not draw.has(history, key):
                continue
            colour, dashes, _ = draw.style(run)
            draw.smoothed(axes, *draw.series(history, key), colour, label=name, dashes=dashes)
        draw.label_axes(axes, title, "optimizer step", label)
        if key == "sparsity":
            axes.set_ylim(-0.02, 1.02)
    draw.shared_legend(figure)
    return figure


def plot_flops_quality(
    runs: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str], *, quality_name: str = "BLEU"
) -> Path:
    """Writes quality against the cost of training and of inference, one marker for each run.

    Args:
        runs: label -> `quality`, `sparsity`, and `train_flops_fraction` or `test_flops_fraction` or both,
            as fractions of the dense model's.
        path: the PNG file; folders on the way are made.
        quality_name: what `quality` is, for the axis.

    Raises:
        ValueError: no run with a quality and a cost.
    """
    return draw.save(flops_quality_figure(runs, quality_name=quality_name), path)


def flops_quality_figure(runs: Mapping[str, Mapping[str, Any]], *, quality_name: str = "BLEU") -> Figure:
    """The figure of `plot_flops_quality`."""
    panels = [
        (key, title)
        for key, title in (("train_flops_fraction", "Training"), ("test_flops_fraction", "Inference"))
        if any(is_number(run.get(key)) and is_number(run.get("quality")) for run in runs.values())
    ]
    if not panels:
        raise ValueError(
            f"plot_flops_quality: expected a run with quality and a FLOPs fraction, got {len(runs)} without; "
            "pass quality with train_flops_fraction or test_flops_fraction"
        )
    figure = draw.new_figure(5.2 * len(panels) + 2.4, 4.4)
    first: Axes | None = None
    for i, (key, title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1, sharey=first)
        first = first or axes
        for run, (name, values) in enumerate(runs.items()):
            if not (is_number(values.get(key)) and is_number(values.get("quality"))):
                continue
            sparsity = values.get("sparsity")
            label = f"{name} (sparsity {sparsity:.2f})" if is_number(sparsity) else name
            colour, dashes, marker = draw.style(run)
            face = colour if dashes == "-" else "none"  # beyond one palette the markers turn hollow
            axes.plot(
                values[key],
                values["quality"],
                linestyle="",
                marker=marker,
                markersize=9,
                color=colour,
                markerfacecolor=face,
                label=label,
            )
        cost = f"{title.lower()} FLOPs (fraction of dense)"
        draw.label_axes(axes, f"{quality_name} against {title.lower()} cost", cost, quality_name)
        axes.axvline(1.0, color="#B0B0B0", linewidth=1.0, zorder=0)
        axes.set_xlim(left=0.0)
        axes.margins(y=0.15)
    draw.shared_legend(figure)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the all_results.json of one or more runs allows, as PNG files in one folder."""
    parser = argparse.ArgumentParser(prog="python -m tritonsparse.eval.plots", description=main.__doc__)
    parser.add_argument("run", nargs="+", metavar="RUN_DIR", help="folder with an all_results.json")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the PNG files")
    options = parser.parse_args(arguments)
    try:
        written = _draw_all({path: _read_run(path) for path in options.run}, Path(options.output))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


def _draw_all(results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    methods = Counter(str(result.get("method", "run")) for result in results.values())
    runs: dict[str, Mapping[str, Any]] = {}
    for path, result in results.items():
        method = str(result.get("method", "run"))
        runs[method if methods[method] == 1 else f"{method} ({path})"] = result
    written: list[Path] = []
    for label, result in runs.items():
        name = re.sub(r"[^\w.-]+", "_", label).strip("_")
        if result.get("history"):
            written.append(plot_training(result["history"], folder / f"training_{name}.png"))
        if result.get("layers"):
            written.append(plot_layer_sparsity(result["layers"], folder / f"layer_sparsity_{name}.png"))
    histories = {label: result["history"] for label, result in runs.items() if result.get("history")}
    if len(histories) > 1:
        written.append(plot_runs(histories, folder / "runs.png"))
    costs = {label: {**result, "quality": result.get("bleu")} for label, result in runs.items()}
    if any(_has_cost(cost) for cost in costs.values()):
        written.append(plot_flops_quality(costs, folder / "flops_quality.png"))
    if not written:
        raise ValueError(
            f"plots: expected history, layers or bleu with FLOPs fractions in {', '.join(results)}, got none; "
            "let the training program finish first"
        )
    return written


def _read_run(path: str) -> dict[str, Any]:
    file = Path(path) / "all_results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"plots: expected a run folder with all_results.json, got {path} ({reason}); "
            "give the --output_dir of a training program"
        ) from error
    if not isinstance(results, dict):
        raise ValueError(
            f"plots: expected a JSON object in {file}, got {type(results).__name__}; check the file"
        )
    return results


def _has_cost(run: Mapping[str, Any]) -> bool:
    fractions = (run.get("train_flops_fraction"), run.get("test_flops_fraction"))
    return is_number(run.get("quality")) and any(is_number(fraction) for fraction in fractions)


def _check_history(function: str, history: History) -> None:
    if not history:
        raise ValueError(f"{function}: expected at least one history entry, got none; log at least one step")
    for i, entry in enumerate(history):
        if not isinstance(entry, Mapping) or not is_number(entry.get("step")):
            raise ValueError(
                f"{function}: expected a step in entry {i}, got {entry!r}; log step with each entry"
            )


if __name__ == "__main__":
    sys.exit(main())
