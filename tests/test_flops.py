"""Multiply-adds counted by hand, and the report that shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse.flops import TrainingMeter, forward_fraction, layer_macs
from tritonsparse.methods import GMP, STR, AutoSparse

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


def test_the_report_shows_every_layer_and_why_the_rest_is_dense(mlp: Build) -> None:
    sparsifier = ts.sparsify(nn.Sequential(nn.Embedding(30, 8), *mlp()), STR(threshold_init=0.0), exclude=["4"])
    report = sparsifier.report()
    kept = sparsifier.layers["1"].kept_count()
    assert report.sparsity == sparsifier.sparsity() == 1 - kept / 128
    lines = str(report).splitlines()
    assert lines[0] == "str at step 0"
    (row,) = (line.split() for line in lines if line.startswith("1  "))
    assert row == ["1", "16x8", f"{1 - kept / 128:.2%}", "0.5", "128", f"{kept / 128:.1%}", "torch"]
    assert lines[-3:] == [
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
    assert "1.28k" in str(report) and "75.0%" in str(report)
