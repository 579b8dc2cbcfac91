"""Dense costs of one forward: the published counts, and layers small enough to count on paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.flops import LayerCost, layer_costs, layer_macs

Build = Callable[..., Any]


def on_meta(model: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return model(config).eval()


def image_costs(model: nn.Module) -> dict[str, LayerCost]:
    return layer_costs(model, torch.empty(1, 3, 224, 224, device="meta"))


@pytest.mark.parametrize(
    ("model", "tensors", "weights", "macs"),
    [
        ((ResNetForImageClassification, ResNetConfig), 54, 25_502_912, 4_089_184_256),
        ((MobileNetV1ForImageClassification, MobileNetV1Config), 28, 4_209_088, 568_740_352),
    ],
    ids=["resnet50", "mobilenet_v1"],
)
def test_the_published_dense_counts(model: Any, tensors: int, weights: int, macs: int) -> None:
    network = on_meta(model[0], model[1](num_labels=1000))
    counted = {name: cost for name, cost in image_costs(network).items() if cost.macs}
    assert len(counted) == tensors
    assert sum(network.get_submodule(name).weight.numel() for name in counted) == weights
    assert sum(cost.macs for cost in counted.values()) == macs


@pytest.mark.parametrize(
    ("layer", "shape", "macs", "input_macs"),
    [
        # rows x in x out
        (nn.Linear(5, 3), (2, 4, 5), 8 * 15, 8 * 15),
        (Conv1D(3, 5), (2, 4, 5), 8 * 15, 8 * 15),
        # positions x (out x in/groups x kernel): 9 -> (9 - 3)/2 + 1 = 4
        (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9), 2 * 4 * 72, 2 * 9 * 72),
        # 8 x 6 -> (8 + 2 - 3)/2 + 1 = 4 by (6 + 2 - 3)/2 + 1 = 3
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 8, 6), 2 * 12 * 108, 2 * 48 * 108),
        (nn.Conv2d(4, 4, (1, 3), groups=4), (4, 5, 5), 15 * 12, 25 * 12),
        (nn.Conv3d(2, 3, 2, bias=False), (1, 2, 3, 3, 3), 8 * 48, 27 * 48),
    ],
    ids=["linear", "conv1d of gpt2", "conv1d", "conv2d", "depthwise, unbatched", "conv3d"],
)
def test_a_layer_costs_its_weights_at_every_position(
    layer: nn.Module, shape: tuple[int, ...], macs: int, input_macs: int
) -> None:
    (cost,) = layer_costs(layer, torch.randn(shape)).values()
    outputs = layer(torch.randn(shape)).numel()
    assert cost == LayerCost(macs, input_macs, 0 if layer.bias is None else outputs)


def test_the_elementwise_costs_are_those_of_ac_dcs_code() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d((1, 2)), nn.Flatten(), nn.LayerNorm(6)
    )
    costs = layer_costs(model, torch.randn(2, 3, 4, 4))
    # 96 elements, twice and once; windows of 9 over 2 x 3 x 2 x 2; of 2 over 2 x 3 x 2 x 1
    assert {name: cost.elementwise for name, cost in costs.items()} == {"0": 192, "1": 96, "2": 216, "3": 24}
    assert layer_macs(nn.Sequential(nn.ReLU()), torch.randn(2)) == {}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_counted_from_its_shapes_however_it_is_computed(marian: Build, implementation: str) -> None:
    model = marian(attn_implementation=implementation).eval()
    inputs = {"input_ids": torch.ones(3, 5, dtype=torch.long), "decoder_input_ids": torch.ones(3, 4, dtype=torch.long)}
    weights = layer_costs(model, **inputs)
    costs = layer_costs(model, **inputs, attention=True)
    # 3 sentences, d = 16: queries by keys, and the same once more by values
    assert {name: cost.macs for name, cost in costs.items() if name not in weights} == {
        "model.encoder.layers.0.self_attn/attention": 3 * 2 * 5 * 5 * 16,
        "model.decoder.layers.0.self_attn/attention": 3 * 2 * 4 * 4 * 16,
        "model.decoder.layers.0.encoder_attn/attention": 3 * 2 * 4 * 5 * 16,
    }
    assert {name: costs[name] for name in weights} == weights


def test_attention_on_the_meta_device_and_in_sparse_models_counts_the_same(gpt2: Build) -> None:
    tokens = torch.ones(2, 5, dtype=torch.long)
    model = gpt2().eval()
    expected = layer_macs(model, tokens, attention=True)
    assert sum(count for name, count in expected.items() if name.endswith("/attention")) == 2 * (2 * 2 * 5 * 5 * 16)
    ts.sparsify(model, "str")
    assert layer_macs(model, tokens, attention=True) == expected
    assert layer_macs(gpt2().eval().to("meta"), tokens.to("meta"), attention=True) == expected


def test_a_weight_is_no_attention_wherever_it_is_multiplied() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.experts.transpose(1, 2)) + torch.bmm(x, x.transpose(1, 2)).sum()

    # 2 batches of 3 x 4 by 4 x 3; with the experts, 2 of 3 x 4 by 4 x 4 more
    assert layer_macs(Expert(), torch.randn(2, 3, 4), attention=True) == {"/attention": 2 * 3 * 4 * 3}


def test_grouped_queries_count_by_the_heads_that_ask() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)

    q, kv = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    assert layer_macs(Attention(), q, kv, kv, attention=True) == {"/attention": 2 * 4 * 3 * 5 * 16}


def test_embeddings_count_where_asked_for(gpt2: Build) -> None:
    model, tokens = gpt2().eval(), torch.ones(2, 5, dtype=torch.long)
    costs = layer_macs(model, tokens, embeddings=True)
    # the positions are looked up once for the batch
    assert (costs.pop("transformer.wte"), costs.pop("transformer.wpe")) == (2 * 5 * 16, 5 * 16)
    assert costs == layer_macs(model, tokens)


def test_attention_in_a_kernel_of_its_own_is_refused(marian: Build) -> None:
    model = marian().eval()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"got 'flash_attention_2'.*set_attn_implementation\('sdpa'\)"):
        layer_costs(model, torch.ones(1, 2, dtype=torch.long), attention=True)


def test_hooks_are_gone_after_a_forward_that_fails(mlp: Build) -> None:
    model = mlp()
    with pytest.raises(RuntimeError):
        layer_costs(model, torch.randn(2, 7), attention=True)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
