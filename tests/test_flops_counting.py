"""Dense costs of one forward: layers small enough to count on paper, and what is not counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_runs import Build
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.flops import LayerCost, layer_costs, layer_macs
from tritonsparse.layers import SparseLayer

TOKENS = torch.ones(2, 5, dtype=torch.long)


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
    assert cost == LayerCost(macs, input_macs, 0 if layer.bias is None else layer(torch.randn(shape)).numel())


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
def test_marian_is_counted_by_source_and_target_length_and_attention_however_it_is_computed(
    marian: Build, implementation: str
) -> None:
    model = marian(attn_implementation=implementation).eval()
    # 3 sentences of 5 source and 4 target tokens, d = 16, ffn = 32, 40 words
    inputs = {"input_ids": torch.ones(3, 5, dtype=torch.long), "decoder_input_ids": torch.ones(3, 4, dtype=torch.long)}
    macs, source, target = layer_macs(model, **inputs), 15, 12
    assert macs["model.encoder.layers.0.self_attn.q_proj"] == source * 16 * 16
    assert macs["model.decoder.layers.0.encoder_attn.q_proj"] == target * 16 * 16
    assert macs["model.decoder.layers.0.encoder_attn.k_proj"] == source * 16 * 16
    assert macs["lm_head"] == target * 16 * 40
    encoder, decoder = source * (4 * 256 + 2 * 512), target * (6 * 256 + 2 * 512) + source * 2 * 256
    assert sum(macs.values()) == encoder + decoder + target * 640
    # Queries by keys, and the same once more by values
    assert layer_macs(model, **inputs, attention=True) == macs | {
        "model.encoder.layers.0.self_attn/attention": 3 * 2 * 5 * 5 * 16,
        "model.decoder.layers.0.self_attn/attention": 3 * 2 * 4 * 4 * 16,
        "model.decoder.layers.0.encoder_attn/attention": 3 * 2 * 4 * 5 * 16,
    }


def test_the_elementwise_costs_are_those_of_ac_dcs_code() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d((1, 2)), nn.Flatten(), nn.LayerNorm(6)
    )
    costs = layer_costs(model, torch.randn(2, 3, 4, 4))
    # 96 elements, twice and once; windows of 9 over 2 x 3 x 2 x 2; of 2 over 2 x 3 x 2 x 1
    assert {name: cost.elementwise for name, cost in costs.items()} == {"0": 192, "1": 96, "2": 216, "3": 24}
    assert layer_macs(nn.Sequential(nn.ReLU()), torch.randn(2)) == {}


def test_attention_on_the_meta_device_and_in_sparse_models_counts_the_same(gpt2: Build) -> None:
    model = gpt2().eval()
    expected = layer_macs(model, TOKENS, attention=True)
    assert expected["transformer.h.0.attn.c_attn"] == 10 * 16 * 48
    assert sum(count for name, count in expected.items() if name.endswith("/attention")) == 2 * (2 * 2 * 5 * 5 * 16)
    ts.sparsify(model, "str")
    assert layer_macs(model, TOKENS, attention=True) == expected
    assert layer_macs(gpt2().eval().to("meta"), TOKENS.to("meta"), attention=True) == expected


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.experts.transpose(1, 2)) + torch.bmm(x, x.transpose(1, 2)).sum()


class Grouped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)


@pytest.mark.parametrize(
    ("module", "shapes", "macs"),
    [
        # 2 batches of 3 x 4 by 4 x 3; with the experts, which are weights, 2 of 3 x 4 by 4 x 4 more
        (Expert, [(2, 3, 4)], 2 * 3 * 4 * 3),
        # grouped queries count by the heads that ask
        (Grouped, [(2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8)], 2 * 4 * 3 * 5 * 16),
    ],
)
def test_attention_is_a_product_of_two_activations(module: Any, shapes: list[tuple[int, ...]], macs: int) -> None:
    assert layer_macs(module(), *(torch.randn(shape) for shape in shapes), attention=True) == {"/attention": macs}


def test_embeddings_count_where_asked_for(gpt2: Build) -> None:
    model = gpt2().eval()
    costs = layer_macs(model, TOKENS, embeddings=True)
    # the positions are looked up once for the batch
    assert (costs.pop("transformer.wte"), costs.pop("transformer.wpe")) == (2 * 5 * 16, 5 * 16)
    assert costs == layer_macs(model, TOKENS)


def test_attention_in_a_kernel_of_its_own_is_refused(marian: Build) -> None:
    model = marian().eval()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"got 'flash_attention_2'.*set_attn_implementation\('sdpa'\)"):
        layer_costs(model, torch.ones(1, 2, dtype=torch.long), attention=True)
