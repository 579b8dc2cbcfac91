"""What the pictures show, and what they refuse."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn

import tritonsparse as ts
from tritonsparse.eval import plots
from tritonsparse.eval.twin_plot import plot_twins, twins_figure
from tritonsparse.methods import ACDC, Phases


def history(steps: int = 20, layers: int = 3) -> list[dict[str, Any]]:
    names = [f"encoder.layers.{i}.fc1" for i in range(layers)]
    return [{
        "step": 10 * (i + 1), "loss": 3.0 + math.exp(-i / 5), "sparsity": 0.9 * i / steps,
        "alpha": 0.75 * (1 - i / steps), "learning_rate": 1e-3, "train_flops_fraction": 1 - 0.5 * i / steps,
        "thresholds": {name: 0.01 * (i + j) for j, name in enumerate(names)},
        "layer_sparsity": {name: 0.8 * i / steps for name in names},
    } for i in range(steps)]  # fmt: skip


def layers(count: int = 4) -> list[dict[str, Any]]:
    return [{"name": f"layer.{i}", "sparsity": i / count, "numel": 1000 * (i + 1)} for i in range(count)]


def panels(figure: Figure) -> dict[str, Any]:
    """Axes with a title by that title, which leaves out colour bars."""
    return {title: axes for axes in figure.axes if (title := axes.get_title(loc="left"))}


def texts(labels: Any) -> list[str]:
    return [text.get_text() for text in labels]


def legend(figure: Figure) -> list[str]:
    return texts(figure.legends[0].get_texts())


def curve(line: Any) -> tuple[list[float], list[float]]:
    return line.get_xdata().tolist(), line.get_ydata().tolist()


def distinct(lines: Any, *properties: str) -> int:
    """How many of the lines differ in one of the properties."""
    return len({tuple(getattr(line, f"get_{name}")() for name in properties) for line in lines})


A, B, C = ({"name": name, "sparsity": sparsity, "numel": 4} for name, sparsity in (("a", 0.25), ("b", 0.5), ("c", 1.0)))
COST = {"quality": 1.0, "train_flops_fraction": 0.5}
EVALUATIONS = [
    {"epoch": epoch, "phase": phase, "perplexity": 100.0 - 10 * epoch}
    for epoch, phase in enumerate(("dense", "dense", "sparse", "dense", "sparse"))
]


def twins(evaluations: list[dict[str, Any]]) -> Any:
    return twins_figure(evaluations, key="perplexity", label="validation perplexity").axes[0]


def test_each_quantity_in_the_history_has_its_panel_and_curves_are_its_numbers() -> None:
    drawn = panels(plots.training_figure(history(), convention="swat"))
    assert {title: axes.get_ylabel() for title, axes in drawn.items()} == {
        "Training loss": "loss [nats]", "Sparsity": "fraction of weights that are 0",
        "Gradient annealing": "alpha (scale of pruned gradients)",
        "Learned thresholds": "threshold (weight magnitude)", "Learning rate": "learning rate",
        "Training cost so far": "training FLOPs (fraction of dense, counted as swat)",
    }  # fmt: skip
    assert {axes.get_xlabel() for axes in drawn.values()} == {"optimizer step"}
    (line,) = drawn["Training loss"].lines
    assert curve(line) == ([row["step"] for row in history()], [row["loss"] for row in history()])
    # What the history lacks has no panel; entries without a value are left out of its curve.
    lone = panels(plots.training_figure([{"step": 1, "loss": 1.0, "alpha": None, "thresholds": {}}]))
    assert list(lone) == ["Training loss"]
    mixed = [{"step": 1, "loss": 2.0}, {"step": 2, "sparsity": 0.5}, {"step": 3, "loss": float("nan")}]
    assert curve(panels(plots.training_figure(mixed))["Training loss"].lines[0]) == ([1], [2.0])


def test_a_noisy_loss_gets_a_moving_average_that_keeps_its_level_and_sparsity_none() -> None:
    flat = [{"step": i, "loss": 4.0 + (-1) ** i, "sparsity": 0.9 * (i // 100 % 2)} for i in range(1000)]
    drawn = panels(plots.training_figure(flat))
    raw, mean = drawn["Training loss (bold: moving average)"].lines
    assert curve(raw)[1] == [entry["loss"] for entry in flat]
    # 21 points in a window leave one alternation: 1/21 off the level; 11 at the very ends: 1/11
    assert np.abs(mean.get_ydata() - 4.0).max() <= 1 / 11 + 1e-9
    # Its jumps are real.
    assert [set(line.get_ydata()) for line in drawn["Sparsity"].lines] == [{0.0, 0.9}]


def test_few_layers_are_named_and_averaged_and_many_coloured_by_depth() -> None:
    few = panels(plots.training_figure(history(layers=3)))["Learned thresholds"]
    assert texts(few.get_legend().get_texts()) == [*(f"encoder.layers.{i}.fc1" for i in range(3)), "mean of layers"]
    # thresholds of step i are 0.01 * (i, i + 1, i + 2)
    assert few.lines[-1].get_ydata() == pytest.approx([0.01 * (i + 1) for i in range(20)])
    figure = plots.training_figure(history(layers=36))
    many, bars = panels(figure)["Learned thresholds"], [each for each in figure.axes if not each.get_title(loc="left")]
    assert distinct(many.lines[:-1], "color") == 36 and texts(many.get_legend().get_texts()) == ["mean of layers"]
    assert texts(bars[0].get_yticklabels()) == ["first layer", "last layer"]
    # A layer that joins late is drawn from there.
    late = [{"step": 1, "thresholds": {"a": 1.0}}, {"step": 2, "thresholds": {"a": 1.0, "b": 3.0}}]
    a, b, mean = (curve(line)[1] for line in panels(plots.training_figure(late))["Learned thresholds"].lines)
    assert (a, np.isnan(b).tolist(), mean) == ([1.0, 1.0], [True, False], [1.0, 2.0])


def test_bars_stand_in_the_models_order_with_sparsity_and_size() -> None:
    figure = plots.layer_sparsity_figure(layers(100))
    (axes,) = figure.axes
    assert texts(axes.get_yticklabels()) == [f"layer.{i}" for i in range(100)] and axes.yaxis_inverted()
    assert [bar.get_width() for bar in axes.patches] == [i / 100 for i in range(100)]
    assert axes.texts[50].get_text() == "0.500 of 51k"
    # 12 points of height for each layer: enough for its name in 8 points
    assert figure.get_figheight() * 72 / 100 > 12
    # Layers weigh by their size: (0.5 * 4 + 1.0 * 12) / 16 = 0.875
    assert legend(plots.layer_sparsity_figure([B, {**C, "numel": 12}])) == ["all weights: 0.875"]
    # Zeros in blocks and what is skipped stand within the bars.
    shares = [("0", 0.8, 0.5, 0.0, 100), ("1", 0.4, 0.1, 0.0, 300)]
    keys = ("name", "sparsity", "block_sparsity", "exploitable", "numel")
    figure = plots.layer_sparsity_figure([dict(zip(keys, each, strict=True)) for each in shares])
    containers = figure.axes[0].containers
    assert [[bar.get_width() for bar in bars] for bars in containers] == [[0.8, 0.4], [0.5, 0.1], [0.0, 0.0]]
    heights = [bars[0].get_height() for bars in containers]
    assert heights == sorted(heights, reverse=True)
    # 100 and 300 weights: (0.8 + 3 x 0.4)/4, (0.5 + 3 x 0.1)/4
    parts = {"zeros": "0.500", "in blocks of zeros": "0.200", "skipped": "0.000"}
    assert legend(figure) == [f"{part}: {share} of all weights" for part, share in parts.items()]


def test_several_runs_share_panels_rows_and_a_legend_and_are_told_apart() -> None:
    figure = plots.runs_layers_figure({"acdc": [A, B], "dense": [B, C]})
    (axes,) = figure.axes
    assert texts(axes.get_yticklabels()) == ["a", "b", "c"] and axes.yaxis_inverted()
    assert [curve(line) for line in axes.lines] == [([0.25, 0.5], [0, 1]), ([0.5, 1.0], [1, 2])]
    assert legend(figure) == ["acdc", "dense"]
    figure = plots.runs_figure({"acdc": history(), "dense": history()})
    assert list(panels(figure)) == ["Training loss", "Sparsity"] and legend(figure) == ["acdc", "dense"]
    # Equal curves of two runs both show.
    first, second = panels(figure)["Sparsity"].lines
    assert first.get_linewidth() > second.get_linewidth()
    twenty = panels(plots.runs_figure({f"run {i}": history() for i in range(20)}))["Training loss"].lines
    assert distinct(twenty, "color", "linestyle") == 20


def test_quality_stands_against_both_costs() -> None:
    figure = plots.flops_quality_figure({
        "acdc": {"quality": 26.4, "train_flops_fraction": 0.6, "test_flops_fraction": 0.2, "sparsity": 0.9},
        "dense": {"quality": 26.6, "train_flops_fraction": 1.0},
        "failed": {"quality": None, "train_flops_fraction": 0.4},
    }, quality_name="accuracy")  # fmt: skip
    drawn = panels(figure)
    assert list(drawn) == ["accuracy against training cost", "accuracy against inference cost"]
    training = drawn["accuracy against training cost"]
    assert (training.get_xlabel(), training.get_ylabel()) == ("training FLOPs (fraction of dense)", "accuracy")
    assert legend(figure) == ["acdc (sparsity 0.90)", "dense"]
    # A cost above dense stays in the picture, which names the convention.
    (axes,) = plots.flops_quality_figure({"a": {**COST, "train_flops_fraction": 1.7, "flops_convention": "swat"}}).axes
    assert axes.get_xlim()[1] > 1.7 and axes.get_xlabel() == "training FLOPs (fraction of dense, counted as swat)"
    (axes,) = plots.flops_quality_figure({f"run {i}": COST for i in range(28)}).axes
    lines = [line for line in axes.get_lines() if str(line.get_label()).startswith("run ")]
    assert distinct(lines, "color", "marker", "fillstyle") == 28


def test_evaluations_stand_at_their_epochs_and_bear_the_mark_of_their_phase() -> None:
    axes = twins(EVALUATIONS)
    line, dense, sparse = ([list(each.get_xdata()), list(each.get_ydata())] for each in axes.lines)
    assert line == [[1, 2, 3, 4, 5], [100, 90, 80, 70, 60]] and (dense[0], sparse[0]) == ([1, 2, 4], [3, 5])
    assert texts(axes.get_legend().get_texts()) == ["dense model", "sparse model"] and len(axes.patches) == 2
    assert (axes.get_yscale(), axes.get_ylabel()) == ("linear", "validation perplexity")
    # A fall over magnitudes.
    assert twins([{**EVALUATIONS[0], "perplexity": 5000.0}, EVALUATIONS[1]]).get_yscale() == "log"


def test_the_mask_change_is_drawn_in_the_order_of_phases_also_of_a_real_run() -> None:
    statistics = {"mask change at step 1000": 0.1, "mask change at step 200": 0.3, "dead at step 200": 0.02}
    figure = plots.mask_change_figure({"acdc": statistics, "gmp": {}})
    assert list(panels(figure)) == ["Mask change between phases", "Weights still zero after a dense phase"]
    assert [curve(axes.lines[0]) for axes in figure.axes] == [([200, 1000], [0.3, 0.1]), ([200], [0.02])]
    assert legend(figure) == ["acdc"] and figure.axes[0].get_ylim()[0] == 0.0
    # That of a real run can be drawn.
    model, phases = nn.Linear(8, 8), Phases([(0, "sparse"), (1, "dense"), (2, "sparse")], 3)
    sparsifier = ts.sparsify(model, ACDC(sparsity=0.5, phases=phases), steps_per_epoch=2, total_steps=6)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.5))
    sparsifier.attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    statistics = sparsifier.report().overall()["method_statistics"]
    (line,) = panels(plots.mask_change_figure({"acdc": statistics}))["Mask change between phases"].lines
    assert curve(line) == ([4], [statistics["mask change at step 4"]])


@pytest.mark.parametrize(
    ("plot", "data"),
    [
        (plots.plot_training, history()),
        (plots.plot_layer_sparsity, layers()),
        (plots.plot_runs, {"acdc": history(), "dense": history()}),
        (plots.plot_runs_layers, {"acdc": layers(), "dense": layers(3)}),
        (plots.plot_flops_quality, {"acdc": {"quality": 26.4, "train_flops_fraction": 0.6}}),
        (plots.plot_mask_change, {"acdc": {"mask change at step 10": 0.2}}),
        # What is not finite is left out.
        (lambda *given: plot_twins(*given, key="perplexity", label="p"),
         [{**EVALUATIONS[0], "perplexity": math.inf}, *EVALUATIONS[1:]]),
    ],
)  # fmt: skip
def test_a_plot_is_one_png_that_needs_no_pyplot(tmp_path: Path, monkeypatch: Any, plot: Any, data: Any) -> None:
    monkeypatch.delattr("matplotlib.pyplot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    path = plot(data, tmp_path / "new" / "picture.png")
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 150
    assert 0.001 < (pixels[..., :3] < 0.9).any(axis=-1).mean() < 0.9


LAYER = {"name": "a", "sparsity": 0.9, "numel": 1}
OTHER_COSTS = {"a": {**COST, "flops_convention": "swat"}, "b": {**COST, "flops_convention": "rigl"}}


@pytest.mark.parametrize(
    ("figure", "data", "remedy"),
    [
        (plots.training_figure, [], "got none; log at least one step"),
        (plots.training_figure, [{"loss": 1.0}], "step in entry 0, .*; log step with each entry"),
        (plots.training_figure, [{"step": 1}], "got only step; log at least the loss"),
        (plots.layer_sparsity_figure, [], "got none; pass the report's layers"),
        (plots.layer_sparsity_figure, [{**LAYER, "sparsity": 90.0}], "layer a, got 90.0; pass a fraction"),
        (plots.layer_sparsity_figure, [{**LAYER, "numel": 0}], "layer a, got 0; pass the number"),
        (plots.layer_sparsity_figure, [{**LAYER, "block_sparsity": 2.0}],
         r"block_sparsity in \[0, 1\] for layer a, got 2.0; pass a fraction"),
        (plots.runs_layers_figure, {}, "got none; pass label -> the report's layers"),
        (plots.runs_layers_figure, {"acdc": []}, "got none; pass the report's layers"),
        (plots.runs_figure, {}, "got none; pass label -> history"),
        (plots.runs_figure, {"acdc": []}, "run 'acdc'.*got none; log at least one step"),
        (plots.runs_figure, {"acdc": [{"step": 1}]}, "got neither; log at least the loss"),
        (plots.flops_quality_figure, {"acdc": {"quality": 1.0}}, "got 1 without; pass quality with"),
        (plots.flops_quality_figure, OTHER_COSTS, "one FLOPs convention, got rigl, swat; draw the runs of each by"),
        (plots.mask_change_figure, {"gmp": {"seed": 1.0}}, "got none in 1 runs; pass method_statistics"),
        (twins, [{**EVALUATIONS[0], "perplexity": math.inf}], "a finite perplexity, got none"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_an_error_with_its_remedy(figure: Any, data: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        figure(data)


def test_the_program_draws_what_results_allow(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def save(figure: Figure, path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.touch(exist_ok=False)
        return path

    def drawn(parent: Path, *contents: dict[str, Any]) -> list[str]:
        """The pictures of runs with these results."""
        for number, content in enumerate(contents):
            (parent / str(number)).mkdir(parents=True)
            (parent / str(number) / "all_results.json").write_text(json.dumps(content), "utf-8")
        folders = [str(parent / str(number)) for number in range(len(contents))]
        assert plots.main([*folders, "--output", str(parent / "plots")]) == 0
        names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
        assert sorted(names) == sorted(path.name for path in (parent / "plots").iterdir())
        return [name.removesuffix(".png") for name in names]

    monkeypatch.setattr(plots.draw, "save", save)
    cost, bars = {"train_flops_fraction": 0.5}, layers()
    one = {"history": history(), "bleu": 26.0, "test_flops_fraction": 0.2, "sparsity": 0.9, **cost}
    runs = [{**one, "method": "acdc", "layers": bars}, {**one, "method": "dense", "layers": None, "bleu": None}]
    assert drawn(tmp_path / "some", *runs, {"method": "gmp", "layers": bars}) == [
        "training_acdc", "layer_sparsity_acdc", "training_dense", "layer_sparsity_gmp", "runs", "layers",
        "flops_quality",
    ]  # fmt: skip
    # Every quality and every run of a method gets its picture.
    short = {"method": "str", "history": history(steps=3, layers=1), **cost}
    statistics = {"top1": 0.7, "method_statistics": {"dead at step 5": 0.1}}
    names = drawn(tmp_path / "more", {**short, "perplexity": 20.0}, {**short, **statistics})
    assert len({name for name in names if name.startswith("training_str")}) == 2
    assert names[-3:] == ["flops_quality_perplexity", "flops_quality_top1", "mask_change"]
    for path in Path(plots.__file__).parent.glob("*.py"):
        assert "import pyplot" not in path.read_text("utf-8") and "matplotlib.pyplot" not in path.read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (None, "give the --output_dir of a training program"),
        ("{", "give the --output_dir of a training program"),
        ("[]", "expected a JSON object"),
        ('{"method": "acdc"}', "let the training program finish first"),
        ('{"history": [{"loss": 1}]}', "log step with each entry"),
        ('{"history": 5}', "check the file"),
        ('{"layers": {"a": 1}}', "check the file"),
    ],
)
def test_bad_results_are_one_sentence(tmp_path: Path, refusal: Any, content: str | None, remedy: str) -> None:
    if content is not None:
        (tmp_path / "all_results.json").write_text(content, "utf-8")
    assert plots.main([str(tmp_path), "--output", str(tmp_path / "plots")]) == 2
    assert remedy in refusal()
