"""What sparse layers cost of their dense multiply-adds, in a forward and over the steps of a training run."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from small_runs import Build
from torch import nn

import tritonsparse as ts
from tritonsparse.flops import LayerCost, Passes, TrainingMeter, forward_fraction, kept_counts, training_fraction
from tritonsparse.layers.sparse_input import SparseInput
from tritonsparse.methods import GMP, STR, AutoSparse


def masked(model: nn.Module, *kept: int) -> ts.Sparsifier:
    sparsifier = ts.sparsify(model, GMP(sparsity=0.5, begin=1.0, end=1.0), total_steps=1000)
    keep(sparsifier, *kept)
    return sparsifier


def keep(sparsifier: ts.Sparsifier, *kept: int) -> None:
    """Script how many weights each layer keeps."""
    for layer, count in zip(sparsifier.layers.values(), kept, strict=False):
        layer.weight.data.fill_(1.0)
        layer.mask.view(-1).copy_(torch.arange(layer.mask.numel()) < count)


def half(method: STR) -> ts.Sparsifier:
    """A layer of which half of the weights pass T = sigma(0) = 1/2."""
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[0.9, 0.1, -0.8, 0.2], [0.7, -0.3, 0.6, 0.4]])
    return ts.sparsify(layer, method)


def saved(meter: TrainingMeter) -> dict[str, object]:
    state: dict[str, object] = json.loads(json.dumps(meter.state_dict()))
    return state


def test_the_forward_fraction_weighs_each_layers_density_by_its_cost(mlp: Build) -> None:
    sparsifier = masked(mlp(), 32, 48)  # densities 1/4 and 3/4
    assert forward_fraction(sparsifier) == (32 + 48) / 192
    # Layer 3 runs three times as often; a dense head counts in full.
    assert forward_fraction(sparsifier, {"0": 128, "3": 192, "head": 80}) == (32 + 144 + 80) / 400


def test_the_meter_averages_over_steps_what_it_counted_last(mlp: Build) -> None:
    sparsifier = masked(mlp())
    meter = TrainingMeter(sparsifier, {"0": 100, "3": 300})
    assert meter.update() == 1.0
    for steps, *kept in ((10, 128, 64), (30, 64, 64), (20, 32, 16)):
        sparsifier.clock.step += steps
        keep(sparsifier, *kept)
        fraction = meter.update()
    # 10 (1) + 30 (50 + 300)/400 + 20 (25 + 75)/400 = 10 + 26.25 + 5
    assert fraction == pytest.approx(41.25 / 60)
    assert meter.update() == fraction
    again = TrainingMeter(sparsifier, {"0": 100, "3": 300})
    again.load_state_dict(saved(meter))
    sparsifier.clock.step += 20
    assert again.update() == pytest.approx((41.25 + 5) / 80)


# Dense training is 1.
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
    sparsifier = half(method)
    sparsifier.clock.step = 1
    assert TrainingMeter(sparsifier).update() == pytest.approx(fraction)


def test_costs_without_any_sparse_layer_are_refused_instead_of_divided_by(mlp: Build) -> None:
    sparsifier = masked(mlp())
    words = r"at least one sparse layer \(such as 0\), got .*; count the model that"
    for macs in ({}, {"module.0": 128, "module.3": 64}, {"0": 0}):
        for count in (sparsifier.report, partial(forward_fraction, sparsifier), partial(TrainingMeter, sparsifier)):
            with pytest.raises(ValueError, match=words):
                count(macs)


def test_packed_activations_make_dw_cheaper_where_weights_are_dense() -> None:
    sparsifier = ts.sparsify(nn.Linear(4, 2), "dense")
    sparsifier.layers[""].sparse_input = SparseInput(density=0.25)
    assert training_fraction(sparsifier) == (1 + 1 + 0.25) / 3
    assert training_fraction(sparsifier, {"": LayerCost(8, 8)}, convention="swat") == (1 + 1 + 0.25) / 3


def test_the_meter_sums_each_layers_passes_over_the_steps() -> None:
    sparsifier = half(AutoSparse(threshold_init=0.0, alpha=0.5, alpha_schedule="constant"))
    costs = {"": LayerCost(100, 400), "head": LayerCost(10, 10)}
    meters = {name: TrainingMeter(sparsifier, costs, convention=name) for name in ("autosparse", "swat")}
    sparsifier.clock.step = 3
    fractions = {name: meter.update(kept_counts(sparsifier)) for name, meter in meters.items()}
    # half of the weights pass; dW is dense, by SWAT's count half of the activations
    swat = meters["swat"]
    assert meters["autosparse"].layers == {"": Passes(150, 150, 300), "head": Passes(30, 30, 30)}
    assert swat.layers == {"": Passes(150, 600, 600), "head": Passes(30, 30, 30)}
    assert swat.totals() == Passes(180, 630, 630)
    assert fractions == pytest.approx({"autosparse": 690 / (3 * 330), "swat": 1440 / (3 * 930)})
    overall = json.loads(json.dumps(swat.overall()))
    assert overall["train_flops_fraction"] == fractions["swat"]
    layers = overall["train_flops"].pop("layers")
    assert layers[""] == {"forward": 150, "grad_input": 600, "grad_weight": 600}
    total = {"forward": 180, "grad_input": 630, "grad_weight": 630}
    assert overall["train_flops"] == {"unit": "multiply-adds", "steps": 3, **total}
    again = TrainingMeter(sparsifier, costs, convention="swat")
    again.load_state_dict(saved(swat))
    assert (again.layers, again.update()) == (swat.layers, fractions["swat"])
    words = "counted by 'autosparse' over 2 layers, got 'swat' over 2 layers; resume with"
    with pytest.raises(ValueError, match=words):
        meters["autosparse"].load_state_dict(swat.state_dict())


def test_known_counts_are_not_counted_again(mlp: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    sparsifier = masked(mlp(), 32, 48)
    kept = kept_counts(sparsifier)
    expected = forward_fraction(sparsifier), training_fraction(sparsifier)
    monkeypatch.setattr(type(sparsifier.layers["0"]), "kept_count", lambda layer: pytest.fail("counted again"))
    assert (forward_fraction(sparsifier, kept=kept), training_fraction(sparsifier, kept=kept)) == expected
    sparsifier.clock.step = 1
    assert TrainingMeter(sparsifier).update(kept) == expected[1]
