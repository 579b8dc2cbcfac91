"""Pictures of runs: how training went, where the zeros are, what the FLOPs saved cost.

Each picture is two functions, `<name>_figure` that builds it and `plot_<name>` that writes it as PNG. Nothing
here touches pyplot, so no display, no global state and no figure that lives on after its file is written.

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

from tritonsparse.eval import _drawing as draw
from tritonsparse.eval._comparison import flops_quality_figure, runs_figure
from tritonsparse.eval._drawing import History, is_number
from tritonsparse.eval._layers import layer_sparsity_figure, runs_layers_figure
from tritonsparse.eval._phases import has_phases, mask_change_figure
from tritonsparse.eval.command_line import TEXT, Parser, one_line
from tritonsparse.eval.output_files import refuse_unwritable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One panel for each: key of a history entry, key of its values per layer ("" = none), title, label of the y axis.
_PANELS = (
    ("loss", "", "Training loss", "loss [nats]"),
    ("sparsity", "layer_sparsity", "Sparsity", draw.SPARSITY),
    ("alpha", "", "Gradient annealing", "alpha (scale of pruned gradients)"),
    ("", "thresholds", "Learned thresholds", "threshold (weight magnitude)"),
    ("learning_rate", "", "Learning rate", "learning rate"),
    ("train_flops_fraction", "", "Training cost so far", draw.flops_label("training")),
)
_FRACTIONS = ("sparsity", "train_flops_fraction")
_QUALITIES = {"bleu": "BLEU", "perplexity": "perplexity", "top1": "top-1 accuracy"}  # keys of all_results.json
_DRAWN = tuple(key for panel in _PANELS for key in panel[:2] if key)


def plot_training(
    history: History, path: str | os.PathLike[str], *, title: str | None = None, convention: str | None = None
) -> Path:
    """Writes the course of one run: a panel for each quantity that its history has.

    Args:
        history: one mapping for each logging step, with `step` and any of `loss`, `sparsity`, `alpha`,
            `learning_rate`, `train_flops_fraction`, `thresholds` and `layer_sparsity` (layer name -> number).
        path: the PNG file; folders on the way are made.
        title: what stands over the panels, such as the run's name.
        convention: by which the FLOPs were counted, for the axis.

    Raises:
        ValueError: nothing to draw.
    """
    return draw.save(training_figure(history, title=title, convention=convention), path)


def training_figure(history: History, *, title: str | None = None, convention: str | None = None) -> Figure:
    """The figure of `plot_training`."""
    draw.check_history("plot_training", history)
    panels = [panel for panel in _PANELS if draw.has(history, panel[0]) or draw.has(history, panel[1])]
    if not panels:
        raise ValueError(
            f"plot_training: expected entries with any of {', '.join(_DRAWN)}, "
            f"got only {', '.join(sorted(history[0]))}; log at least the loss"
        )
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = draw.new_figure(7.0 * columns, 3.5 * rows)
    if title:
        figure.suptitle(title)
    for i, (key, per_layer, heading, label) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        overall = draw.has(history, key)
        layers = draw.has(history, per_layer)
        if layers:
            draw.layers(axes, *draw.layer_series(history, per_layer), with_mean=not overall)
        if overall and layers:
            axes.plot(*draw.series(history, key), color="black", linewidth=2.0, label="all layers")
        elif key == "loss":
            if draw.smoothed(axes, *draw.series(history, key), draw.COLOURS[0]):
                heading = f"{heading} (bold: moving average)"
        elif overall:
            axes.plot(*draw.series(history, key), color=draw.COLOURS[0], linewidth=1.8)
        label = draw.flops_label("training", convention) if key == "train_flops_fraction" else label
        draw.label_axes(axes, heading, "optimizer step", label)
        if key in _FRACTIONS:
            axes.set_ylim(-0.02, 1.02)
        if layers:
            draw.legend_below(axes)
    return figure


def plot_layer_sparsity(
    layers: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str = "Sparsity by layer"
) -> Path:
    """Writes one bar for each layer, in the model's order from top to bottom.

    Args:
        layers: mappings with `name`, `sparsity` in [0, 1] and `numel`, the number of weights; with `block_sparsity`
            and `exploitable` in all of them, bars for these stand within.
        path: the PNG file; folders on the way are made.
        title: what stands over the bars.

    Raises:
        ValueError: no layer, or a sparsity outside [0, 1].
    """
    return draw.save(layer_sparsity_figure(layers, title=title), path)


def plot_runs_layers(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]) -> Path:
    """Writes where several runs have their zeros: a row for each layer, a marker for each run.

    Args:
        runs: label -> layers, as for `plot_layer_sparsity`.
        path: the PNG file; folders on the way are made.

    Raises:
        ValueError: no run, one without layers, or a sparsity outside [0, 1].
    """
    return draw.save(runs_layers_figure(runs), path)


def plot_runs(runs: Mapping[str, History], path: str | os.PathLike[str]) -> Path:
    """Writes loss and sparsity of several runs over each other.

    Args:
        runs: label -> history, as for `plot_training`.
        path: the PNG file; folders on the way are made.

    Raises:
        ValueError: no run, or one without history.
    """
    return draw.save(runs_figure(runs), path)


def plot_flops_quality(
    runs: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str], *, quality_name: str = "BLEU"
) -> Path:
    """Writes quality against the cost of training and of inference, one marker for each run.

    Args:
        runs: label -> `quality`, `sparsity`, and `train_flops_fraction` or `test_flops_fraction` or both,
            as fractions of the dense model's; `flops_convention` where it is known.
        path: the PNG file; folders on the way are made.
        quality_name: what `quality` is, for the axis.

    Raises:
        ValueError: no run with a quality and a cost, or costs of different conventions, which do not compare.
    """
    return draw.save(flops_quality_figure(runs, quality_name=quality_name), path)


def plot_mask_change(runs: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Writes how much the mask changed from one sparse phase to the next, and how many weights a dense phase left at 0.

    Args:
        runs: label -> the method's `statistics`, "mask change at step N" and "dead at step N" -> fraction.
        path: the PNG file; folders on the way are made.

    Raises:
        ValueError: no such statistics in any run.
    """
    return draw.save(mask_change_figure(runs), path)


def parser() -> Parser:
    """The options; `main` reads them."""
    result = Parser("eval.plots", __doc__)
    result.add_argument("run", type=TEXT, nargs="+", metavar="RUN_DIR", help="folder with an all_results.json")
    result.add_argument("--output", type=TEXT, required=True, metavar="DIR", help="folder for the PNG files")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the all_results.json of one or more runs allows, as PNG files in one folder."""
    return one_line(lambda: _report(parser().parse_args(arguments)))


def _report(options: argparse.Namespace) -> int:
    refuse_unwritable("plots", "--output", options.output, folder=True)
    for path in _draw_all({path: _read_run(path) for path in options.run}, Path(options.output)):
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
            file, convention = folder / f"training_{name}.png", result.get("flops_convention")
            written.append(plot_training(result["history"], file, title=label, convention=convention))
        if result.get("layers"):
            file = folder / f"layer_sparsity_{name}.png"
            written.append(plot_layer_sparsity(result["layers"], file, title=f"Sparsity by layer: {label}"))
    histories = {label: result["history"] for label, result in runs.items() if result.get("history")}
    if len(histories) > 1:
        written.append(plot_runs(histories, folder / "runs.png"))
    layers = {label: result["layers"] for label, result in runs.items() if result.get("layers")}
    if len(layers) > 1:
        written.append(plot_runs_layers(layers, folder / "layers.png"))
    for key, quality in _QUALITIES.items():
        costs = {label: {**result, "quality": result[key]} for label, result in runs.items() if key in result}
        if any(_has_cost(cost) for cost in costs.values()):
            file = folder / f"flops_quality{'' if key == 'bleu' else '_' + key}.png"
            written.append(plot_flops_quality(costs, file, quality_name=quality))
    statistics = {label: result["method_statistics"] for label, result in runs.items() if _has_phases(result)}
    if statistics:
        written.append(plot_mask_change(statistics, folder / "mask_change.png"))
    if not written:
        raise ValueError(
            f"plots: expected history or layers in {', '.join(results)}, got none; "
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
        raise ValueError(f"plots: expected a JSON object in {file}, got {type(results).__name__}; check the file")
    for key in ("history", "layers"):
        entries = results.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"plots: expected {key} in {file} to be a list of objects; check the file")
    return results


def _has_cost(run: Mapping[str, Any]) -> bool:
    fractions = (run.get("train_flops_fraction"), run.get("test_flops_fraction"))
    return is_number(run.get("quality")) and any(is_number(fraction) for fraction in fractions)


def _has_phases(run: Mapping[str, Any]) -> bool:
    statistics = run.get("method_statistics")
    return isinstance(statistics, Mapping) and has_phases(statistics)


if __name__ == "__main__":
    sys.exit(main())
