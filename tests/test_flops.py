"""What sparse layers cost of dense multiply-adds, in a forward and over training, and the report that shows it."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import pytest
import torch
from small_runs import Build
from torch import nn

import tritonsparse as ts
from tritonsparse import flops
from tritonsparse.flops import LayerCost, Passes, TrainingMeter, forward_fraction, kept_counts, training_fraction
from tritonsparse.layers.backend import BACKENDS
from tritonsparse.layers.sparse_input import SparseInput
from tritonsparse.methods import ACDC, GMP, SET, STR, AutoSparse, Phases, Static
from tritonsparse.report import _SKIPS, block_sparsity, cut_off

constant = partial(AutoSparse, threshold_init=0.0, alpha=0.5, alpha_schedule="constant")


def masked(model: nn.Module, *kept: int) -> ts.Sparsifier:
    """Layers of ones that keep the first so many weights each."""
    sparsifier = ts.sparsify(model, GMP(sparsity=0.5, begin=1.0, end=1.0), total_steps=1000)
    keep(sparsifier, *kept)
    return sparsifier


def keep(sparsifier: ts.Sparsifier, *kept: int) -> None:
    for layer, count in zip(sparsifier.layers.values(), kept, strict=False):
        layer.weight.data.fill_(1.0)
        layer.mask.view(-1).copy_(torch.arange(layer.mask.numel()) < count)


def half(method: STR) -> ts.Sparsifier:
    """A layer of which half of the weights pass T = sigma(0) = 1/2."""
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[0.9, 0.1, -0.8, 0.2], [0.7, -0.3, 0.6, 0.4]])
    return ts.sparsify(layer, method)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_the_forward_fraction_weighs_each_layers_density_by_its_cost(mlp: Build) -> None:
    sparsifier = masked(mlp(), 32, 48)  # densities 1/4 and 3/4
    assert forward_fraction(sparsifier) == (32 + 48) / 192
    # Layer 3 runs three times as often; a dense head counts in full.
    assert forward_fraction(sparsifier, {"0": 128, "3": 192, "head": 80}) == (32 + 144 + 80) / 400
    # Packed activations make dW cheaper where weights are dense.
    sparsifier = ts.sparsify(nn.Linear(4, 2), "dense")
    sparsifier.layers[""].sparse_input = SparseInput(density=0.25)
    assert training_fraction(sparsifier) == (1 + 1 + 0.25) / 3
    assert training_fraction(sparsifier, {"": LayerCost(8, 8)}, convention="swat") == (1 + 1 + 0.25) / 3


def test_the_meter_bills_every_step_by_the_masks_that_it_saw(mlp: Build) -> None:
    sparsifier = masked(mlp())
    meter, again = (TrainingMeter(sparsifier, {"0": 100, "3": 300}) for _ in range(2))
    assert meter.update() == 1.0
    for steps, *kept in ((10, 128, 64), (30, 64, 64), (20, 32, 16)):
        keep(sparsifier, *kept)
        for _ in range(steps):
            meter.before_step()
            sparsifier.clock.step += 1
    # 10 (1) + 30 (50 + 300)/400 + 20 (25 + 75)/400 = 10 + 26.25 + 5
    fraction = meter.update()
    assert fraction == pytest.approx(41.25 / 60) and meter.update() == fraction
    again.load_state_dict(through_json(meter.state_dict()))
    sparsifier.clock.step += 20
    assert again.update() == pytest.approx((41.25 + 5) / 80)


def weights(*values: float) -> nn.Linear:
    layer = nn.Linear(len(values), 1, bias=False)
    layer.weight.data = torch.tensor([values], dtype=torch.float32)
    return layer


def cost_of(sparsifier: ts.Sparsifier, steps: int) -> tuple[float, list[float]]:
    """Of real steps in one window, counted at its end; and the shares of the mask that they saw."""
    meter, shares = TrainingMeter(sparsifier), []
    layer = sparsifier.layers[""]
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=1.0))
    sparsifier.attach(optimizer)
    for _ in range(steps):
        shares.append(1.0 if layer.mask is None else float(layer.mask.float().mean()))
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    return meter.update(), shares


def test_a_window_that_spans_a_change_bills_each_step_by_what_it_was() -> None:
    # Steps of AC/DC: dense, sparse, sparse, dense, of which a quarter is kept.
    phases = Phases([(0, "dense"), (1, "sparse"), (3, "dense")], 4)
    acdc = ts.sparsify(weights(1, 2, 3, 4), ACDC(sparsity=0.75, phases=phases), total_steps=4, steps_per_epoch=1)
    assert cost_of(acdc, 4) == ((1 + 0.25 + 0.25 + 1) / 4, [1, 0.25, 0.25, 1])
    gmp = GMP(sparsity=0.5, update_every=1, begin=0.0, end=0.75)
    fraction, shares = cost_of(ts.sparsify(weights(1, 2, 3, 4), gmp, total_steps=4), 4)
    assert fraction == sum(shares) / 4 and len(set(shares)) > 1


def test_weights_that_have_just_grown_are_work_though_they_are_zero() -> None:
    # SET drops one weight and grows another every step, at 0: two of four are always multiplied by.
    sparsifier = ts.sparsify(
        weights(1, 2, 3, 4), SET(sparsity=0.5, update_every=1, drop_fraction=0.5), total_steps=8, steps_per_epoch=4
    )
    assert cost_of(sparsifier, 4)[0] == 0.5
    layer = sparsifier.layers[""]
    assert int(layer.mask.sum()) == 2 and layer.kept_count() < 2
    assert training_fraction(sparsifier) == 0.5 and forward_fraction(sparsifier) < 0.5


def test_the_coming_epoch_s_alpha_does_not_bill_the_one_that_ends() -> None:
    # Half of the weights pass. Epoch 0 of two steps has alpha, so dW is dense; epoch 1 has none.
    method = AutoSparse(threshold_init=0.0, alpha=0.5, alpha_schedule="constant", zero_alpha_epoch=1)
    for counted_at in (2, 4):
        sparsifier = ts.sparsify(weights(0.9, 0.1, 0.8, 0.2), method, total_steps=4, steps_per_epoch=2)
        spent = 2 * (0.5 + 0.5 + 1) / 3 + (counted_at - 2) * 0.5
        assert cost_of(sparsifier, counted_at)[0] == pytest.approx(spent / counted_at)


def test_what_passes_a_threshold_is_taken_to_drift_evenly_within_a_window() -> None:
    sparsifier = ts.sparsify(weights(0.9, 0.1, 0.8, 0.2), STR(threshold_init=0.0))
    meter, layer = TrainingMeter(sparsifier), sparsifier.layers[""]
    sparsifier.clock.step += 4
    layer.weight.data.fill_(0.9)
    assert meter.update() == (0.5 + 1.0) / 2
    sparsifier.clock.step += 4
    assert meter.update() == (0.75 + 1.0) / 2


def test_a_training_step_costs_what_the_paper_counts() -> None:
    for method, fraction in (
        *((STR(threshold_init=0.0), 0.5), (constant(alpha=0.0), 0.5), (constant(), (2 * 0.5 + 1) / 3)),
        *((constant(backward_density=0.75), 1.75 / 3), (constant(backward_density=0.25), 0.5)),
        (STR(threshold_init=-float("inf")), 1.0),  # dense training
    ):
        sparsifier = half(method)
        meter = TrainingMeter(sparsifier)
        sparsifier.clock.step = 1
        assert meter.update() == training_fraction(sparsifier) == pytest.approx(fraction), method


def test_the_meter_sums_each_layers_passes_over_the_steps() -> None:
    sparsifier, costs = half(constant()), {"": LayerCost(100, 400), "head": LayerCost(10, 10)}
    meters = {name: TrainingMeter(sparsifier, costs, convention=name) for name in ("autosparse", "swat")}
    sparsifier.clock.step = 3
    fractions = {name: meter.update(kept_counts(sparsifier)) for name, meter in meters.items()}
    # half of the weights pass; dW is dense, by SWAT's count half of the activations
    swat, head = meters["swat"], Passes(30, 30, 30)
    assert meters["autosparse"].layers == {"": Passes(150, 150, 300), "head": head}
    assert swat.layers == {"": Passes(150, 600, 600), "head": Passes(30, 30, 15)}
    assert swat.totals() == Passes(180, 630, 615)
    assert fractions == pytest.approx({"autosparse": 690 / (3 * 330), "swat": 1425 / (3 * 930)})
    overall = through_json(swat.overall())
    assert overall["train_flops_fraction"] == fractions["swat"]
    assert overall["train_flops"].pop("layers")[""] == {"forward": 150, "grad_input": 600, "grad_weight": 600}
    total = {"forward": 180, "grad_input": 630, "grad_weight": 615}
    assert overall["train_flops"] == {"unit": "multiply-adds", "steps": 3, **total}
    again = TrainingMeter(sparsifier, costs, convention="swat")
    again.load_state_dict(through_json(swat.state_dict()))
    assert (again.layers, again.update()) == (swat.layers, fractions["swat"])
    with pytest.raises(ValueError, match="by 'autosparse' over 2 layers, got 'swat' over 2 layers; resume with"):
        meters["autosparse"].load_state_dict(swat.state_dict())


def test_costs_of_no_sparse_layer_are_refused_and_known_counts_not_counted_again(mlp: Build, monkeypatch: Any) -> None:
    sparsifier = masked(mlp(), 32, 48)
    for macs in ({}, {"module.0": 128, "module.3": 64}, {"0": 0}):
        for count in (sparsifier.report, partial(forward_fraction, sparsifier), partial(TrainingMeter, sparsifier)):
            with pytest.raises(ValueError, match=r"one sparse layer \(such as 0\), got .*; count the model that"):
                count(macs)
    kept, expected = kept_counts(sparsifier), (forward_fraction(sparsifier), training_fraction(sparsifier))
    monkeypatch.setattr(type(sparsifier.layers["0"]), "kept_count", lambda layer: pytest.fail("counted again"))
    assert (forward_fraction(sparsifier, kept=kept), training_fraction(sparsifier, kept=kept)) == expected
    meter = TrainingMeter(sparsifier)
    sparsifier.clock.step = 1
    assert meter.update(kept) == expected[1]


def test_the_report_shows_every_layer_and_why_the_rest_is_dense(mlp: Build) -> None:
    sparsifier = ts.sparsify(nn.Sequential(nn.Embedding(30, 8), *mlp()), STR(threshold_init=0.0), exclude=["4"])
    report, kept = sparsifier.report(), sparsifier.layers["1"].kept_count()
    assert report.sparsity == sparsifier.sparsity() == 1 - kept / 128
    lines = str(report).splitlines()
    assert lines[0] == "str at step 0" and "1 layers" not in str(report)
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
    assert "str on 1 layer, 128 weights" in sparsifier.summary()
    assert "str on 2 layers, 192 weights" in ts.sparsify(mlp(), "str").summary()


def test_the_report_takes_counted_costs_and_counts_by_the_convention_that_it_names(mlp: Build) -> None:
    sparsifier, x = masked(mlp(), 32, 48), torch.randn(1, 8)
    report = sparsifier.report(macs={"0": 1280})  # a layer that never ran costs nothing
    assert (report.macs_fraction, report.sparsity) == (0.25, 1 - 80 / 192)
    (never_ran,) = (line.split() for line in str(report).splitlines() if line.startswith("3 "))
    assert "1.28k" in str(report) and never_ran[-3:] == ["0", "-", "torch"]
    report = sparsifier.report(flops.layer_costs(sparsifier.model, x), convention="acdc")
    # 2 x (32 + 48) and 16 + 4 biases, over 2 x 192 and as many
    assert report.macs_fraction == (160 + 20) / (384 + 20)
    assert "FLOPs: one forward, by the convention 'acdc'" in str(report)
    assert json.loads(report.to_json())["convention"] == "acdc"
    with pytest.raises(TypeError, match="report: expected costs from layer_costs"):
        sparsifier.report(flops.layer_macs(sparsifier.model, x), convention="swat")
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
    assert (report.sparsity, report.block_sparsity) == (report.layers[0].sparsity, 0.0) == (30 / 64, 0.0)
    document = json.loads(report.to_json())
    assert (document["block_sparsity"], document["exploitable"], report.block) == (0.0, 0.0, (4, 4))
    assert set(_SKIPS) == set(BACKENDS) - {"auto"}
    # A convolution is shown by its matrix: 6 x 6 positions of 8 x 4 x 9 weights, in blocks of two filters by all four
    # channels at a kernel position.
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1))
    sparsifier = ts.sparsify(model, Static(sparsity=0.5), pattern="block:2x4", exclude=["0"])
    (row,) = sparsifier.report(flops.layer_costs(model, torch.randn(1, 3, 8, 8))).layers
    assert (row.shape, row.numel, row.macs) == ((8, 4, 3, 3), 288, 36 * 288)
    assert (row.sparsity, row.block_sparsity, row.exploitable) == (0.5, 0.5, 0.0)
    # A cut-off that is no logit is shown as it is.
    layer = ts.sparsify(nn.Linear(4, 2), "str").layers[""]
    layer.threshold.data.fill_(0.25)
    assert cut_off(layer) == pytest.approx(1 / (1 + math.exp(-0.25)))
    layer.kind = "hard"
    assert cut_off(layer) == 0.25
    layer.threshold = None
    assert cut_off(layer) is None


def test_block_sparsity_counts_the_elements_of_empty_blocks() -> None:
    # 6 x 10, zero in rows 0-3 x columns 0-4 and in rows 4-5 x columns 8-9
    zero = torch.zeros(6, 10, dtype=torch.bool)
    zero[:4, :5] = zero[4:, 8:] = True
    # Blocks of 4x4 at the edges have 4 x 2, 2 x 4 and 2 x 2 elements.
    shares = {(4, 5): 20 / 60, (4, 4): 20 / 60, (1, 5): 20 / 60, (2, 1): 24 / 60, (64, 64): 0.0, (1, 0): 0.0}
    assert {block: block_sparsity(zero, block) for block in shares} == shares
    assert {block_sparsity(torch.ones_like(zero), block) for block in shares} == {1.0}
