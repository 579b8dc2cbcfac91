"""The papers' figures, each by the paper's own count, on ResNet-50 as the papers have it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import (
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from tritonsparse.flops import CONVENTIONS, LayerCost, Passes, layer_costs
from tritonsparse.flops.conventions import DENSE, convention_named
from tritonsparse.masks.distribution import erk
from tritonsparse.methods import Densities

RESNET50 = (ResNetForImageClassification, ResNetConfig)


@functools.cache
def counted(model: Any, config: Any) -> tuple[dict[str, LayerCost], dict[str, torch.Size]]:
    """A network's costs, and the shapes of its weights."""
    with torch.device("meta"):
        network = model(config(num_labels=1000)).eval()
    costs = layer_costs(network, torch.empty(1, 3, 224, 224, device="meta"))
    return costs, {name: network.get_submodule(name).weight.shape for name, cost in costs.items() if cost.macs}


def resnet50() -> tuple[dict[str, LayerCost], dict[str, torch.Size]]:
    return counted(*RESNET50)


@pytest.mark.parametrize(
    ("model", "tensors", "weights", "macs"),
    [
        (RESNET50, 54, 25_502_912, 4_089_184_256),
        ((MobileNetV1ForImageClassification, MobileNetV1Config), 28, 4_209_088, 568_740_352),
    ],
    ids=["resnet50", "mobilenet_v1"],
)
def test_the_published_dense_counts(model: Any, tensors: int, weights: int, macs: int) -> None:
    costs, shapes = counted(*model)
    assert (len(shapes), sum(shape.numel() for shape in shapes.values())) == (tensors, weights)
    assert sum(cost.macs for cost in costs.values()) == macs


FIRST, LAST = "embedder.embedder", "classifier"


def uniform(density: float, *dense: str, **changes: float) -> dict[str, Densities]:
    """Every weight at `density` but those whose names hold one of `dense`."""
    each = Densities(density, density, changes.get("grad_weight", density), changes.get("activations"))
    return {name: each for name in resnet50()[1] if not any(part in name for part in dense)}


def by_erk(sparsity: float) -> dict[str, Densities]:
    return {layer: Densities(1 - p, 1 - p, 1 - p) for layer, p in erk(resnet50()[1], sparsity).items()}


def fraction(convention: str, densities: dict[str, Densities], training: bool) -> float:
    rule = CONVENTIONS[convention]
    return (rule.training_fraction if training else rule.forward_fraction)(resnet50()[0], densities)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_dense_model_costs_all_of_itself_by_every_convention(name: str) -> None:
    assert fraction(name, {}, True) == fraction(name, {}, False) == 1.0


def test_dense_training_is_three_forwards_of_four_thousand_million_multiply_adds() -> None:
    totals = {
        name: sum(passes.training for passes in CONVENTIONS[name].passes(resnet50()[0], {}).values())
        for name in ("autosparse", "rigl")
    }
    assert totals == {"autosparse": 3 * 4_089_184_256, "rigl": 2 * 3 * 4_089_184_256}


# README of google-research/rigl: forward with ERK 0.42, 0.24, 0.12; trained by RigL, uniform but for the first layer,
# with an update every 100 steps, 0.23 and 0.13.
@pytest.mark.parametrize("name", ["rigl", "autosparse"])
@pytest.mark.parametrize(("sparsity", "published"), [(0.8, 0.4138), (0.9, 0.2418), (0.95, 0.1217)])
def test_rigl_erk_predicts_for_what_rigl_published(name: str, sparsity: float, published: float) -> None:
    assert fraction(name, by_erk(sparsity), training=False) == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize(("kept", "published"), [(0.2, 0.2257), (0.1, 0.1289)])
def test_rigl_uniform_trains_for_what_rigl_published(kept: float, published: float) -> None:
    densities = uniform(kept, FIRST, grad_weight=(100 * kept + 1.0) / 101)
    assert fraction("rigl", densities, training=True) == pytest.approx(published, abs=5e-5)


# AutoSparse (arXiv:2304.06941), Tables 1 and 2: Top-KAST at 80 %, first and last layer dense: Test F .22, and Train F
# .48 with dW dense, .32 with half of it.
@pytest.mark.parametrize(("backward", "published"), [(1.0, 0.48), (0.5, 0.32)])
def test_top_kast_trains_for_what_autosparse_published(backward: float, published: float) -> None:
    densities = uniform(0.2, FIRST, LAST, grad_weight=backward)
    assert fraction("autosparse", densities, training=False) == pytest.approx(0.2235, abs=5e-5)
    assert fraction("autosparse", densities, training=True) == pytest.approx(published, abs=5e-3)
    # Of one layer it is the mean of its densities: (2 d + B)/3.
    one = Densities(0.2235, 0.2235, backward)
    share = CONVENTIONS["autosparse"].training_fraction({"a": 100}, {"a": one})
    assert share == pytest.approx({1.0: 0.482, 0.5: 0.316}[backward], abs=5e-4)


# SWAT (arXiv:2001.01969), Table 3, W = A, the first layer dense: 76.1 and 85.6 % fewer training FLOPs. Its equations
# 4-6 give 75.0 and 84.3 for ResNet-50 v1.5; the paper does not say which ResNet-50 it counted.
@pytest.mark.parametrize(("density", "equations", "published"), [(0.2, 0.750, 0.761), (0.1, 0.843, 0.856)])
def test_swat_saves_what_its_equations_say(density: float, equations: float, published: float) -> None:
    saved = 1.0 - fraction("swat", uniform(density, FIRST, activations=density), training=True)
    assert saved == pytest.approx(equations, abs=1e-3) and saved == pytest.approx(published, abs=0.015)


def test_swat_gives_every_other_method_half_of_the_activations() -> None:
    # A static mask of 20 %, the first layer dense. In 1e9: f = 3.971 + 0.118, f_in = 5.937 + 0.472.
    # (0.2 x 3.971 + 0.118 + 0.2 x 5.937 + 0.472 + 0.5 x 5.937 + 0.472) / (4.089 + 2 x 6.409) = 6.012 / 16.906
    found = {name: fraction(name, uniform(0.2, FIRST), training=True) for name in ("swat", "rigl")}
    assert found == pytest.approx({"swat": 0.3556, "rigl": 0.2231}, abs=1e-4)


def test_every_convention_counts_one_layer_as_on_paper() -> None:
    # 10 multiply-adds at the output, 40 at the input, 3 biases; forward 1/2, dX 1/4, dW 1/5
    costs = {"a": LayerCost(10, 40, 3)}
    densities = {"a": Densities(0.5, 0.25, 0.2)}
    counted = {name: rule.passes(costs, densities)["a"] for name, rule in CONVENTIONS.items()}
    assert counted == {
        "autosparse": Passes(5.0, 2.5, 2.0),
        "rigl": Passes(10.0, 5.0, 4.0),
        "acdc": Passes(13.0, 13.0, 13.0),
        "swat": Passes(5.0, 10.0, 20.0),
    }
    kept = {"a": Densities(0.5, 0.25, 0.2, activations=0.1)}
    assert CONVENTIONS["swat"].passes(costs, kept)["a"] == Passes(5.0, 10.0, 4.0)
    assert CONVENTIONS["swat"].passes(costs, {"a": DENSE})["a"] == Passes(10.0, 40.0, 40.0)


def test_what_acdc_counts_beside_weights_is_never_sparse() -> None:
    costs = {"conv": LayerCost(50, 50), "norm": LayerCost(0, 0, 100)}
    half = {"conv": Densities(0.5, 0.5, 0.5)}
    acdc = CONVENTIONS["acdc"]
    # (2 x 50 / 2 + 100) / (2 x 50 + 100); by multiply-adds it is a half
    assert acdc.forward_fraction(costs, half) == acdc.training_fraction(costs, half) == 0.75
    assert CONVENTIONS["autosparse"].forward_fraction(costs, half) == 0.5


def test_a_convention_that_needs_more_than_multiply_adds_and_an_unknown_one_say_so() -> None:
    for name in ("acdc", "swat"):
        words = f"for the convention '{name}', got a plain number for 'a'; count with layer_c"
        with pytest.raises(TypeError, match=words):
            CONVENTIONS[name].forward_fraction({"a": 10}, {})
    words = "expected a FLOPs convention of autosparse, rigl, acdc, swat, got 'macs'; choose"
    with pytest.raises(ValueError, match=words):
        convention_named("report", "macs")
