"""Multiply-adds counted by hand, and the report that shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse.flops import (
    LayerCost,
    Passes,
    TrainingMeter,
    forward_fraction,
    kept_counts,
    layer_costs,
    layer_macs,
    training_fraction,
)
from tritonsparse.layers.backend import BACKENDS
from tritonsparse.layers.sparse_input import SparseInput
from tritonsparse.methods import GMP, STR, AutoSparse, Static
from tritonsparse.report import _SKIPS, block_sparsity, cut_off

Build = Callable[..., Any]


def keep(sparsifier: ts.Sparsifier, **kept: int) -> None:
    """Script how many weights a masked layer keeps: "layer0" -> the first so many of layer "0"."""
    for name, count in kept.items():
        layer = sparsifier.layers[name.removeprefix("layer")]
        layer.weight.data.fill_(1.0)
        layer.mask.view(-1).copy_(torch.arange(layer.mask.numel()) < count)


def masked(model: nn.Module) -> ts.Sparsifier:
    return ts.sparsify(model, GMP(sparsity=0.5, begin=1.0, end=1.0), total_steps=1000)


def test_a_linear_layer_costs_rows_times_its_weight(mlp: Build) -> None:
    model = mlp()
    # 2 x 3 rows of 8 -> 16 and 16 -> 4
    assert layer_macs(model, torch.randn(2, 3, 8)) == {"0": 6 * 128, "3": 6 * 64}
    ts.sparsify(model, "str")
    assert layer_macs(model, torch.randn(2, 3, 8)) == {"0": 6 * 128, "3": 6 * 64}
    assert all(not module._forward_hooks for module in model.modules())


def test_marian_is_counted_by_source_and_target_length(marian: Build) -> None:
    model = marian().eval()
    # 3 sentences of 5 source and 4 target tokens, d = 16, ffn = 32, 40 words
    inputs = {"input_ids": torch.ones(3, 5, dtype=torch.long), "decoder_input_ids": torch.ones(3, 4, dtype=torch.long)}
    macs = layer_macs(model, **inputs)
    source, target = 15, 12
    assert macs["model.encoder.layers.0.self_attn.q_proj"] == source * 16 * 16
    assert macs["model.decoder.layers.0.encoder_attn.q_proj"] == target * 16 * 16
    assert macs["model.decoder.layers.0.encoder_attn.k_proj"] == source * 16 * 16
    assert macs["lm_head"] == target * 16 * 40
    encoder, decoder = source * (4 * 256 + 2 * 512), target * (6 * 256 + 2 * 512) + source * 2 * 256
    assert sum(macs.values()) == encoder + decoder + target * 640


def test_conv1d_counts_like_linear_and_calls_add_up(gpt2: Build) -> None:
    model = gpt2().eval()
    macs = layer_macs(model, torch.ones(2, 5, dtype=torch.long))
    assert macs["transformer.h.0.attn.c_attn"] == 10 * 16 * 48
    shared = nn.Linear(4, 4)
    assert layer_macs(nn.Sequential(shared, shared), torch.randn(3, 4)) == {"0": 2 * 3 * 16}


def test_the_forward_fraction_weighs_each_layers_density_by_its_cost(mlp: Build) -> None:
    sparsifier = masked(mlp())
    keep(sparsifier, layer0=32, layer3=48)  # densities 1/4 and 3/4
    assert forward_fraction(sparsifier) == (32 + 48) / 192
    # Layer 3 runs three times as often; a dense head counts in full.
    macs = {"0": 128, "3": 192, "head": 80}
    assert forward_fraction(sparsifier, macs) == (32 + 144 + 80) / 400


def test_the_meter_averages_over_steps_what_it_counted_last(mlp: Build) -> None:
    sparsifier = masked(mlp())
    meter = TrainingMeter(sparsifier, {"0": 100, "3": 300})
    assert meter.update() == 1.0
    script = [(10, 128, 64), (30, 64, 64), (20, 32, 16)]  # steps, kept in layer 0, in layer 3
    for steps, first, second in script:
        sparsifier.clock.step += steps
        keep(sparsifier, layer0=first, layer3=second)
        fraction = meter.update()
    # 10 (1) + 30 (50 + 300)/400 + 20 (25 + 75)/400 = 10 + 26.25 + 5
    assert fraction == pytest.approx(41.25 / 60)
    assert meter.update() == fraction
    again = TrainingMeter(sparsifier, {"0": 100, "3": 300})
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    sparsifier.clock.step += 20
    assert again.update() == pytest.approx((41.25 + 5) / 80)


# Half of the weights pass T = sigma(0) = 1/2; dense training is 1.
@pytest.mark.parametrize(
    ("method", "fraction"),
    [
        (STR(threshold_init=0.0), 0.5),
        (AutoSparse(threshold_init=0.0, alpha=0.0, alpha_schedule="constant"), 0.5),
        (AutoSparse(threshold_init=0.0, alpha=0.5, alpha_schedule="constant"), (2 * 0.5 + 1) / 3),
        (AutoSparse(threshold_init=0.0, alpha=0.5, alpha_schedule="constant", backward_density=0.75), 1.75 / 3),
        (AutoSparse(threshold_init=0.0, alpha=0.5, alpha_schedule="constant", backward_density=0.25), 0.5),
        (STR(threshold_init=-float("inf")), 1.0),
    ],
    ids=repr,
)
def test_a_training_step_costs_what_the_paper_counts(method: STR, fraction: float) -> None:
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[0.9, 0.1, -0.8, 0.2], [0.7, -0.3, 0.6, 0.4]])
    sparsifier = ts.sparsify(layer, method)
    sparsifier.clock.step = 1
    assert TrainingMeter(sparsifier).update() == pytest.approx(fraction)


def test_one_layer_is_not_said_to_be_several(mlp: Build) -> None:
    one = ts.sparsify(mlp(), "str", exclude=["3"])
    assert "str on 1 layer, 128 weights" in one.summary()
    assert "1 layers" not in str(one.report())
    assert "str on 2 layers, 192 weights" in ts.sparsify(mlp(), "str").summary()


def test_the_report_shows_every_layer_and_why_the_rest_is_dense(mlp: Build) -> None:
    sparsifier = ts.sparsify(nn.Sequential(nn.Embedding(30, 8), *mlp()), STR(threshold_init=0.0), exclude=["4"])
    report = sparsifier.report()
    kept = sparsifier.layers["1"].kept_count()
    assert report.sparsity == sparsifier.sparsity() == 1 - kept / 128
    lines = str(report).splitlines()
    assert lines[0] == "str at step 0"
    (row,) = (line.split() for line in lines if line.startswith("1  "))
    in_blocks = "100.00%" if kept == 0 else "0.00%"
    shares = [f"{1 - kept / 128:.2%}", in_blocks, "0.00%"]
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


def test_the_report_takes_counted_costs_and_a_layer_that_never_ran_costs_nothing(mlp: Build) -> None:
    sparsifier = masked(mlp())
    keep(sparsifier, layer0=32, layer3=48)
    report = sparsifier.report(macs={"0": 1280})
    assert report.macs_fraction == 0.25
    assert report.sparsity == 1 - 80 / 192
    (never_ran,) = (line.split() for line in str(report).splitlines() if line.startswith("3 "))
    assert "1.28k" in str(report) and never_ran[-3:] == ["0", "-", "torch"]


def test_costs_without_any_sparse_layer_are_refused_instead_of_divided_by(mlp: Build) -> None:
    sparsifier = masked(mlp())
    for macs in ({}, {"module.0": 128, "module.3": 64}, {"0": 0}):
        for count in (sparsifier.report, partial(forward_fraction, sparsifier), partial(TrainingMeter, sparsifier)):
            with pytest.raises(
                ValueError, match=r"at least one sparse layer \(such as 0\), got .*; count the model that"
            ):
                count(macs)


def test_the_report_counts_by_the_convention_that_it_names(mlp: Build) -> None:
    sparsifier = masked(mlp())
    keep(sparsifier, layer0=32, layer3=48)
    costs = layer_costs(sparsifier.model, torch.randn(1, 8))
    report = sparsifier.report(costs, convention="acdc")
    # 2 x (32 + 48) and 16 + 4 biases, over 2 x 192 and as many
    assert report.macs_fraction == (160 + 20) / (384 + 20)
    assert "FLOPs: one forward, by the convention 'acdc'" in str(report)
    assert json.loads(report.to_json())["convention"] == "acdc"
    with pytest.raises(TypeError, match="report: expected costs from layer_costs"):
        sparsifier.report(layer_macs(sparsifier.model, torch.randn(1, 8)), convention="swat")
    with pytest.raises(ValueError, match="report: expected a FLOPs convention of"):
        sparsifier.report(convention="macs")


def test_zeros_blocks_of_zeros_and_what_the_back_end_skips_are_three_columns() -> None:
    layer = nn.Linear(8, 8, bias=False)
    sparsifier = ts.sparsify(layer, Static(sparsity=0.5), pattern="block:4")
    assert (sparsifier.report().sparsity, sparsifier.report().block_sparsity, sparsifier.report().exploitable) == (
        (0.5, 0.5, 0.0)  # two blocks of four; the dense product reads all of them
    )
    # One element of each empty block comes back: 30 of 64 are zero, in no block of zeros.
    mask = sparsifier.layers[""].mask
    assert mask is not None
    layer.weight.data.fill_(1.0)
    blocks = mask.view(2, 4, 2, 4)
    blocks[:, 0, :, 0] = True
    report = sparsifier.report()
    assert (report.sparsity, report.block_sparsity) == (30 / 64, 0.0)
    assert report.block == (4, 4) and report.layers[0].sparsity == 30 / 64
    document = json.loads(report.to_json())
    assert (document["block_sparsity"], document["exploitable"]) == (0.0, 0.0)


def test_the_report_shows_a_convolution_by_its_matrix() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1))
    sparsifier = ts.sparsify(model, Static(sparsity=0.5), pattern="block:2x4", exclude=["0"])
    costs = layer_costs(model, torch.randn(1, 3, 8, 8))
    (row,) = sparsifier.report(costs).layers
    # 6 x 6 positions of 8 x 4 x 9 weights, in blocks of two filters by all four channels at a kernel position
    assert (row.shape, row.numel, row.macs) == ((8, 4, 3, 3), 288, 36 * 288)
    assert (row.sparsity, row.block_sparsity, row.exploitable) == (0.5, 0.5, 0.0)


def test_a_cut_off_that_is_no_logit_is_shown_as_it_is() -> None:
    sparsifier = ts.sparsify(nn.Linear(4, 2), "str")
    layer = sparsifier.layers[""]
    assert layer.threshold is not None
    layer.threshold.data.fill_(0.25)
    assert cut_off(layer) == pytest.approx(1 / (1 + math.exp(-0.25)))
    layer.kind = "hard"
    assert cut_off(layer) == 0.25
    layer.threshold = None
    assert cut_off(layer) is None


def test_packed_activations_make_dw_cheaper_where_weights_are_dense() -> None:
    sparsifier = ts.sparsify(nn.Linear(4, 2), "dense")
    sparsifier.layers[""].sparse_input = SparseInput(density=0.25)
    assert training_fraction(sparsifier) == (1 + 1 + 0.25) / 3
    assert training_fraction(sparsifier, {"": LayerCost(8, 8)}, convention="swat") == (1 + 1 + 0.25) / 3


def test_the_report_knows_what_every_back_end_skips() -> None:
    assert set(_SKIPS) == set(BACKENDS) - {"auto"}


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


def test_the_meter_sums_each_layers_passes_over_the_steps() -> None:
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[0.9, 0.1, -0.8, 0.2], [0.7, -0.3, 0.6, 0.4]])
    sparsifier = ts.sparsify(layer, AutoSparse(threshold_init=0.0, alpha=0.5, alpha_schedule="constant"))
    costs = {"": LayerCost(100, 400), "head": LayerCost(10, 10)}
    meters = {name: TrainingMeter(sparsifier, costs, convention=name) for name in ("autosparse", "swat")}
    sparsifier.clock.step = 3
    fractions = {name: meter.update(kept_counts(sparsifier)) for name, meter in meters.items()}
    # half of the weights pass; dW is dense, by SWAT's count half of the activations
    assert meters["autosparse"].layers == {"": Passes(150, 150, 300), "head": Passes(30, 30, 30)}
    assert meters["swat"].layers == {"": Passes(150, 600, 600), "head": Passes(30, 30, 30)}
    assert meters["swat"].totals() == Passes(180, 630, 630)
    assert fractions == pytest.approx({"autosparse": 690 / (3 * 330), "swat": 1440 / (3 * 930)})
    overall = json.loads(json.dumps(meters["swat"].overall()))
    assert overall["train_flops_fraction"] == fractions["swat"]
    layers = overall["train_flops"].pop("layers")
    assert layers[""] == {"forward": 150, "grad_input": 600, "grad_weight": 600}
    total = {"forward": 180, "grad_input": 630, "grad_weight": 630}
    assert overall["train_flops"] == {"unit": "multiply-adds", "steps": 3, **total}
    again = TrainingMeter(sparsifier, costs, convention="swat")
    again.load_state_dict(json.loads(json.dumps(meters["swat"].state_dict())))
    assert (again.layers, again.update()) == (meters["swat"].layers, fractions["swat"])
    with pytest.raises(
        ValueError, match=r"counted by 'autosparse' over 2 layers, got 'swat' over 2 layers; resume with"
    ):
        meters["autosparse"].load_state_dict(meters["swat"].state_dict())


def test_known_counts_are_not_counted_again(mlp: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    sparsifier = masked(mlp())
    keep(sparsifier, layer0=32, layer3=48)
    kept = kept_counts(sparsifier)
    expected = forward_fraction(sparsifier), training_fraction(sparsifier)
    monkeypatch.setattr(type(sparsifier.layers["0"]), "kept_count", lambda layer: pytest.fail("counted again"))
    assert (forward_fraction(sparsifier, kept=kept), training_fraction(sparsifier, kept=kept)) == expected
    sparsifier.clock.step = 1
    assert TrainingMeter(sparsifier).update(kept) == expected[1]
