"""Figures that set several runs beside each other: their courses, and what their FLOPs bought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tritonsparse.eval import _drawing as draw
from tritonsparse.eval._drawing import History, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def runs_figure(runs: Mapping[str, History]) -> Figure:
    """The figure of `plot_runs`."""
    if not runs:
        raise ValueError("plot_runs: expected at least one run, got none; pass label -> history")
    for label, history in runs.items():
        draw.check_history(f"plot_runs (run {label!r})", history)
    panels = [
        panel
        for panel in (("loss", "Training loss", "loss [nats]"), ("sparsity", "Sparsity", draw.SPARSITY))
        if any(draw.has(history, panel[0]) for history in runs.values())
    ]
    if not panels:
        raise ValueError("plot_runs: expected loss or sparsity in a history, got neither; log at least the loss")
    smooth = False
    figure = draw.new_figure(6.6 * len(panels) + 1.4, 4.4)
    for i, (key, title, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for run, (name, history) in enumerate(runs.items()):
            if not draw.has(history, key):
                continue
            colour, dashes, _ = draw.style(run)
            points = draw.series(history, key)
            if key == "loss":
                smooth |= draw.smoothed(axes, *points, colour, label=name, dashes=dashes)
                continue
            # Runs often share a schedule: the first is drawn widest, so that equal curves all show.
            width = 1.5 + 2.5 * (len(runs) - 1 - run) / max(1, len(runs) - 1)
            axes.plot(*points, color=colour, linestyle=dashes, linewidth=width, label=name)
        title = f"{title} (bold: moving average)" if key == "loss" and smooth else title
        draw.label_axes(axes, title, "optimizer step", label)
        if key == "sparsity":
            axes.set_ylim(-0.02, 1.02)
    draw.shared_legend(figure)
    return figure


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
    conventions = sorted({str(run["flops_convention"]) for run in runs.values() if run.get("flops_convention")})
    if len(conventions) > 1:
        raise ValueError(
            f"plot_flops_quality: expected runs counted by one FLOPs convention, got {', '.join(conventions)}; "
            f"draw the runs of each by themselves"
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
            colour, _, marker = draw.style(run)
            axes.plot(
                values[key],
                values["quality"],
                linestyle="",
                marker=marker,
                markersize=9,
                color=colour,
                fillstyle=draw.fill(run),
                label=label,
            )
        cost = draw.flops_label(title.lower(), conventions[0] if conventions else None)
        draw.label_axes(axes, f"{quality_name} against {title.lower()} cost", cost, quality_name)
        axes.axvline(1.0, color="#B0B0B0", linewidth=1.0, zorder=0)
        axes.set_xlim(0.0, 1.05 * max(1.0, axes.dataLim.xmax))
        axes.margins(y=0.15)
    draw.shared_legend(figure)
    return figure
