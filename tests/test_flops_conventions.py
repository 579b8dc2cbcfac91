"""Dense costs of one forward, counted on paper, and the papers' figures, each by its own count, on their ResNet-50."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from small_runs import Build
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.flops import CONVENTIONS, LayerCost, Passes, layer_costs, layer_macs
from tritonsparse.flops.conventions import DENSE, convention_named
from tritonsparse.layers import SparseLayer
from tritonsparse.masks.distribution import erk
from tritonsparse.methods import Densities

TOKENS = torch.ones(2, 5, dtype=torch.long)


def test_a_layer_costs_its_weights_at_every_position() -> None:
    cases: Any = (
        # rows x in x out
        (nn.Linear(5, 3), (2, 4, 5), 8 * 15, 8 * 15),
        (Conv1D(3, 5), (2, 4, 5), 8 * 15, 8 * 15),
        # positions x (out x in/groups x kernel): 9 -> (9 - 3)/2 + 1 = 4
        (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9), 2 * 4 * 72, 2 * 9 * 72),
        # 8 x 6 -> (8 + 2 - 3)/2 + 1 = 4 by (6 + 2 - 3)/2 + 1 = 3
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 8, 6), 2 * 12 * 108, 2 * 48 * 108),
        (nn.Conv2d(4, 4, (1, 3), groups=4), (4, 5, 5), 15 * 12, 25 * 12),  # depthwise, without a batch
        (nn.Conv3d(2, 3, 2, bias=False), (1, 2, 3, 3, 3), 8 * 48, 27 * 48),
    )
    for layer, shape, macs, input_macs in cases:
        biases = 0 if layer.bias is None else layer(torch.randn(shape)).numel()
        assert list(layer_costs(layer, torch.randn(shape)).values()) == [LayerCost(macs, input_macs, biases)], layer


def test_sparse_layers_count_as_dense_ones_calls_add_up_and_hooks_are_gone(mlp: Build) -> None:
    model = mlp()
    for _ in range(2):
        # 2 x 3 rows of 8 -> 16 and 16 -> 4
        assert layer_macs(model, torch.randn(2, 3, 8)) == {"0": 6 * 128, "3": 6 * 64}
        with pytest.raises(RuntimeError):
            layer_costs(model, torch.randn(2, 7), attention=True)
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
        if not isinstance(model[0], SparseLayer):
            ts.sparsify(model, "str")
    shared = nn.Linear(4, 4)
    assert layer_macs(nn.Sequential(shared, shared), torch.randn(3, 4)) == {"0": 2 * 3 * 16}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_marian_is_counted_by_source_and_target_length_and_any_attention(marian: Build, implementation: str) -> None:
    model = marian(attn_implementation=implementation).eval()
    # 3 sentences of 5 source and 4 target tokens, d = 16, ffn = 32, 40 words
    inputs = {"input_ids": torch.ones(3, 5, dtype=torch.long), "decoder_input_ids": torch.ones(3, 4, dtype=torch.long)}
    macs, source, target, layers = layer_macs(model, **inputs), 15, 12, "model.{}.layers.0.{}/attention"
    assert macs["model.encoder.layers.0.self_attn.q_proj"] == source * 16 * 16
    assert macs["model.decoder.layers.0.encoder_attn.q_proj"] == target * 16 * 16
    assert macs["model.decoder.layers.0.encoder_attn.k_proj"] == source * 16 * 16
    assert macs["lm_head"] == target * 16 * 40
    encoder, decoder = source * (4 * 256 + 2 * 512), target * (6 * 256 + 2 * 512) + source * 2 * 256
    assert sum(macs.values()) == encoder + decoder + target * 640
    # Queries by keys, and the same once more by values
    assert layer_macs(model, **inputs, attention=True) == macs | {
        layers.format("encoder", "self_attn"): 3 * 2 * 5 * 5 * 16,
        layers.format("decoder", "self_attn"): 3 * 2 * 4 * 4 * 16,
        layers.format("decoder", "encoder_attn"): 3 * 2 * 4 * 5 * 16,
    }
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"got 'flash_attention_2'.*set_attn_implementation\('sdpa'\)"):
        layer_costs(model, TOKENS, attention=True)


def test_the_elementwise_costs_are_those_of_ac_dcs_code() -> None:
    pools = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d((1, 2))
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), *pools, nn.Flatten(), nn.LayerNorm(6))
    costs = layer_costs(model, torch.randn(2, 3, 4, 4))
    # 96 elements, twice and once; windows of 9 over 2 x 3 x 2 x 2; of 2 over 2 x 3 x 2 x 1
    assert {name: cost.elementwise for name, cost in costs.items()} == {"0": 192, "1": 96, "2": 216, "3": 24}
    assert layer_macs(nn.Sequential(nn.ReLU()), torch.randn(2)) == {}


def test_attention_on_meta_and_in_sparse_models_counts_the_same_and_embeddings_where_asked_for(gpt2: Build) -> None:
    model = gpt2().eval()
    costs = layer_macs(model, TOKENS, embeddings=True)
    # the positions are looked up once for the batch
    assert (costs.pop("transformer.wte"), costs.pop("transformer.wpe")) == (2 * 5 * 16, 5 * 16)
    assert costs == layer_macs(model, TOKENS)
    expected = layer_macs(model, TOKENS, attention=True)
    assert expected["transformer.h.0.attn.c_attn"] == 10 * 16 * 48
    assert sum(count for name, count in expected.items() if name.endswith("/attention")) == 2 * (2 * 2 * 5 * 5 * 16)
    ts.sparsify(model, "str")
    assert layer_macs(model, TOKENS, attention=True) == expected
    assert layer_macs(gpt2().eval().to("meta"), TOKENS.to("meta"), attention=True) == expected


class Expert(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.bmm(x, self.weight.transpose(1, 2)) + torch.bmm(x, x.transpose(1, 2)).sum()


class Grouped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)


def test_attention_is_a_product_of_two_activations() -> None:
    # 2 batches of 3 x 4 by 4 x 3; with the experts, which are weights, 2 of 3 x 4 by 4 x 4 more
    assert layer_macs(Expert(4, 4, 2), torch.randn(2, 3, 4), attention=True) == {"/attention": 2 * 3 * 4 * 3}
    # grouped queries count by the heads that ask
    q, k, v = torch.randn(2, 4, 3, 8), *torch.randn(2, 2, 2, 5, 8)
    assert layer_macs(Grouped(), q, k, v, attention=True) == {"/attention": 2 * 4 * 3 * 5 * 16}


@functools.cache
def counted(name: str = "ResNet") -> tuple[dict[str, LayerCost], dict[str, torch.Size]]:
    """A network's costs, and the shapes of its weights."""
    network_class: Any = getattr(transformers, f"{name}ForImageClassification")
    with torch.device("meta"):
        network = network_class(network_class.config_class(num_labels=1000)).eval()
    costs = layer_costs(network, torch.empty(1, 3, 224, 224, device="meta"))
    return costs, {name: network.get_submodule(name).weight.shape for name, cost in costs.items() if cost.macs}


FIRST, LAST = "embedder.embedder", "classifier"


def uniform(density: float, *dense: str, **changes: float) -> dict[str, Densities]:
    """Every weight at `density` but those whose names hold one of `dense`."""
    each = Densities(density, density, changes.get("grad_weight", density), changes.get("activations"))
    return {name: each for name in counted()[1] if not any(part in name for part in dense)}


def fraction(convention: str, densities: dict[str, Densities], training: bool = True) -> float:
    rule = CONVENTIONS[convention]
    return (rule.training_fraction if training else rule.forward_fraction)(counted()[0], densities)


def test_the_published_dense_counts_are_all_of_a_dense_model_and_training_is_three_forwards() -> None:
    dense = {"ResNet": (54, 25_502_912, 4_089_184_256), "MobileNetV1": (28, 4_209_088, 568_740_352)}
    for model, expected in dense.items():
        costs, shapes = counted(model)
        weights, macs = sum(shape.numel() for shape in shapes.values()), sum(cost.macs for cost in costs.values())
        assert (len(shapes), weights, macs) == expected
    assert {fraction(name, {}, training) for name in CONVENTIONS for training in (True, False)} == {1.0}
    for name, each in (("autosparse", 1), ("rigl", 2)):
        passes = CONVENTIONS[name].passes(counted()[0], {}).values()
        assert sum(one.training for one in passes) == each * 3 * 4_089_184_256


def test_every_paper_s_figures_follow_by_its_own_count() -> None:
    # README of google-research/rigl: forward with ERK 0.42, 0.24, 0.12; trained by RigL, uniform but for the first
    # layer, with an update every 100 steps, 0.23 and 0.13.
    for sparsity, published in ((0.8, 0.4138), (0.9, 0.2418), (0.95, 0.1217)):
        densities = {layer: Densities(1 - p, 1 - p, 1 - p) for layer, p in erk(counted()[1], sparsity).items()}
        for name in ("rigl", "autosparse"):
            assert fraction(name, densities, training=False) == pytest.approx(published, abs=5e-5)
    for kept, published in ((0.2, 0.2257), (0.1, 0.1289)):
        densities = uniform(kept, FIRST, grad_weight=(100 * kept + 1.0) / 101)
        assert fraction("rigl", densities) == pytest.approx(published, abs=5e-5)
    # AutoSparse (arXiv:2304.06941), Tables 1 and 2: Top-KAST at 80 %, first and last layer dense: Test F .22, and Train
    # F .48 with dW dense, .32 with half of it. Of one layer it is the mean of its densities: (2 d + B)/3.
    for backward, published, of_one in ((1.0, 0.48, 0.482), (0.5, 0.32, 0.316)):
        densities = uniform(0.2, FIRST, LAST, grad_weight=backward)
        assert fraction("autosparse", densities, training=False) == pytest.approx(0.2235, abs=5e-5)
        assert fraction("autosparse", densities) == pytest.approx(published, abs=5e-3)
        share = CONVENTIONS["autosparse"].training_fraction({"a": 100}, {"a": Densities(0.2235, 0.2235, backward)})
        assert share == pytest.approx(of_one, abs=5e-4)
    # SWAT (arXiv:2001.01969), Table 3, W = A, the first layer dense: 76.1, 85.6 % fewer training FLOPs. Its equations
    # 4-6 give 76.4 and 85.7 for ResNet-50 v1.5; the paper does not say which ResNet-50 it counted.
    for density, equations, published in ((0.2, 0.7637, 0.761), (0.1, 0.8574, 0.856)):
        saved = 1.0 - fraction("swat", uniform(density, FIRST, activations=density))
        assert saved == pytest.approx(equations, abs=1e-4) and saved == pytest.approx(published, abs=3e-3)
    # It gives every other method half of the activations: a static mask of 20 %, the first layer dense. In 1e9:
    # f = 3.971 + 0.118, f_in = 5.937 + 0.472.
    # (0.2 x 3.971 + 0.118 + 0.2 x 5.937 + 0.472 + 0.5 x 6.409) / (4.089 + 2 x 6.409) = 5.776 / 16.906
    found = {name: fraction(name, uniform(0.2, FIRST)) for name in ("swat", "rigl")}
    assert found == pytest.approx({"swat": 0.3416, "rigl": 0.2231}, abs=1e-4)


def test_every_convention_counts_one_layer_as_on_paper_and_says_what_it_needs() -> None:
    # 10 multiply-adds at the output, 40 at the input, 3 biases; forward 1/2, dX 1/4, dW 1/5
    costs, swat = {"a": LayerCost(10, 40, 3)}, CONVENTIONS["swat"]
    counted = {name: rule.passes(costs, {"a": Densities(0.5, 0.25, 0.2)})["a"] for name, rule in CONVENTIONS.items()}
    assert counted == {
        **{"autosparse": Passes(5.0, 2.5, 2.0), "rigl": Passes(10.0, 5.0, 4.0)},
        **{"acdc": Passes(13.0, 13.0, 13.0), "swat": Passes(5.0, 10.0, 20.0)},
    }
    assert swat.passes(costs, {"a": Densities(0.5, 0.25, 0.2, activations=0.1)})["a"] == Passes(5.0, 10.0, 4.0)
    assert swat.passes(costs, {"a": DENSE})["a"] == Passes(10.0, 40.0, 40.0)
    # What AC/DC counts beside weights is never sparse: (2 x 50 / 2 + 100) / (2 x 50 + 100); by multiply-adds a half.
    costs, half = {"conv": LayerCost(50, 50), "norm": LayerCost(0, 0, 100)}, {"conv": Densities(0.5, 0.5, 0.5)}
    acdc = CONVENTIONS["acdc"]
    assert acdc.forward_fraction(costs, half) == acdc.training_fraction(costs, half) == 0.75
    assert CONVENTIONS["autosparse"].forward_fraction(costs, half) == 0.5
    for name in ("acdc", "swat"):
        with pytest.raises(TypeError, match=f"convention '{name}', got a plain number for 'a'; count with layer_c"):
            CONVENTIONS[name].forward_fraction({"a": 10}, {})
    with pytest.raises(ValueError, match="a FLOPs convention of autosparse, rigl, acdc, swat, got 'macs'; choose"):
        convention_named("report", "macs")
