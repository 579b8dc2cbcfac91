"""The report: what it shows of every layer, why the rest is dense, and by which convention it counts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from small_runs import Build
from torch import nn

import tritonsparse as ts
from tritonsparse.flops import layer_costs, layer_macs
from tritonsparse.layers.backend import BACKENDS
from tritonsparse.methods import STR, Static
from tritonsparse.report import _SKIPS, block_sparsity, cut_off


def masked(model: nn.Module, *kept: int) -> ts.Sparsifier:
    """Layers of ones that keep the first so many weights each."""
    sparsifier = ts.sparsify(model, "gmp", sparsity=0.5, total_steps=1000)
    for layer, count in zip(sparsifier.layers.values(), kept, strict=True):
        layer.weight.data.fill_(1.0)
        layer.kind, layer.mask = "mask", (torch.arange(layer.weight.numel()) < count).view_as(layer.weight)
    return sparsifier


def test_one_layer_is_not_said_to_be_several(mlp: Build) -> None:
    one = ts.sparsify(mlp(), "str", exclude=["3"])
    assert "str on 1 layer, 128 weights" in one.summary() and "1 layers" not in str(one.report())
    assert "str on 2 layers, 192 weights" in ts.sparsify(mlp(), "str").summary()


def test_it_shows_every_layer_and_why_the_rest_is_dense(mlp: Build) -> None:
    sparsifier = ts.sparsify(nn.Sequential(nn.Embedding(30, 8), *mlp()), STR(threshold_init=0.0), exclude=["4"])
    report, kept = sparsifier.report(), sparsifier.layers["1"].kept_count()
    assert report.sparsity == sparsifier.sparsity() == 1 - kept / 128
    lines = str(report).splitlines()
    assert lines[0] == "str at step 0"
    (row,) = (line.split() for line in lines if line.startswith("1  "))
    shares = [f"{1 - kept / 128:.2%}", "100.00%" if kept == 0 else "0.00%", "0.00%"]
    assert row == ["1", "16x8", *shares, "0.5", "128", f"{kept / 128:.1%}", "torch"]
    assert lines[-6].split()[:2] == ["1", "layer"]
    assert lines[-5:] == [
        "in blocks: 64x64 of nothing but zeros",
        "MACs: one forward, by the convention 'autosparse'",
        "back end: auto: no GPU",
        "stays dense, excluded: 64 weights (4)",
        "stays dense, embedding: 240 weights (0.weight)",
    ]
    document = json.loads(report.to_json())
    assert document["sparsity"] == report.sparsity and document["method"] == "str"
    assert document["layers"][0]["threshold"] == 0.5 and document["layers"][0]["kept"] == kept


def test_it_takes_counted_costs_and_a_layer_that_never_ran_costs_nothing(mlp: Build) -> None:
    report = masked(mlp(), 32, 48).report(macs={"0": 1280})
    assert (report.macs_fraction, report.sparsity) == (0.25, 1 - 80 / 192)
    (never_ran,) = (line.split() for line in str(report).splitlines() if line.startswith("3 "))
    assert "1.28k" in str(report) and never_ran[-3:] == ["0", "-", "torch"]


def test_it_counts_by_the_convention_that_it_names(mlp: Build) -> None:
    sparsifier, x = masked(mlp(), 32, 48), torch.randn(1, 8)
    report = sparsifier.report(layer_costs(sparsifier.model, x), convention="acdc")
    # 2 x (32 + 48) and 16 + 4 biases, over 2 x 192 and as many
    assert report.macs_fraction == (160 + 20) / (384 + 20)
    assert "FLOPs: one forward, by the convention 'acdc'" in str(report)
    assert json.loads(report.to_json())["convention"] == "acdc"
    with pytest.raises(TypeError, match="report: expected costs from layer_costs"):
        sparsifier.report(layer_macs(sparsifier.model, x), convention="swat")
    with pytest.raises(ValueError, match="report: expected a FLOPs convention of"):
        sparsifier.report(convention="macs")


def test_zeros_blocks_of_zeros_and_what_the_back_end_skips_are_three_columns() -> None:
    layer = nn.Linear(8, 8, bias=False)
    sparsifier = ts.sparsify(layer, Static(sparsity=0.5), pattern="block:4")
    report = sparsifier.report()
    # Two blocks of four; the dense product reads all of them.
    assert (report.sparsity, report.block_sparsity, report.exploitable) == (0.5, 0.5, 0.0)
    # One element of each empty block comes back: 30 of 64 are zero, in no block of zeros.
    layer.weight.data.fill_(1.0)
    sparsifier.layers[""].mask.view(2, 4, 2, 4)[:, 0, :, 0] = True
    report = sparsifier.report()
    assert (report.sparsity, report.block_sparsity) == (30 / 64, 0.0)
    assert report.block == (4, 4) and report.layers[0].sparsity == 30 / 64
    document = json.loads(report.to_json())
    assert (document["block_sparsity"], document["exploitable"]) == (0.0, 0.0)
    assert set(_SKIPS) == set(BACKENDS) - {"auto"}


def test_it_shows_a_convolution_by_its_matrix() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1))
    sparsifier = ts.sparsify(model, Static(sparsity=0.5), pattern="block:2x4", exclude=["0"])
    (row,) = sparsifier.report(layer_costs(model, torch.randn(1, 3, 8, 8))).layers
    # 6 x 6 positions of 8 x 4 x 9 weights, in blocks of two filters by all four channels at a kernel position
    assert (row.shape, row.numel, row.macs) == ((8, 4, 3, 3), 288, 36 * 288)
    assert (row.sparsity, row.block_sparsity, row.exploitable) == (0.5, 0.5, 0.0)


def test_a_cut_off_that_is_no_logit_is_shown_as_it_is() -> None:
    layer = ts.sparsify(nn.Linear(4, 2), "str").layers[""]
    layer.threshold.data.fill_(0.25)
    assert cut_off(layer) == pytest.approx(1 / (1 + math.exp(-0.25)))
    layer.kind = "hard"
    assert cut_off(layer) == 0.25
    layer.threshold = None
    assert cut_off(layer) is None


@pytest.mark.parametrize(
    ("block", "share"),
    [
        # 6 x 10, zero in rows 0-3 x columns 0-4 and in rows 4-5 x columns 8-9
        ((4, 5), 20 / 60),
        ((4, 4), (16 + 4) / 60),  # blocks at the edges have 4 x 2, 2 x 4 and 2 x 2 elements
        ((1, 5), 20 / 60),
        ((2, 1), 24 / 60),
        ((64, 64), 0.0),
        ((1, 0), 0.0),
    ],
)
def test_block_sparsity_counts_the_elements_of_empty_blocks(block: tuple[int, int], share: float) -> None:
    zero = torch.zeros(6, 10, dtype=torch.bool)
    zero[:4, :5] = True
    zero[4:, 8:] = True
    assert block_sparsity(zero, block) == share
    assert block_sparsity(torch.ones_like(zero), block) == 1.0
