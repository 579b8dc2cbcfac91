"""Which modules are sparsified, why the others are not, and which models are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.layers import SparseConv1D, SparseLinear

Build = Callable[..., Any]


def skipped(sparsifier: ts.Sparsifier) -> dict[str, str]:
    return {skip.name: skip.reason for skip in sparsifier.skipped}


def test_marian_keeps_its_tied_embeddings_and_head_dense(marian: Build) -> None:
    model = marian()
    sparsifier = ts.sparsify(model, "str")
    # 4 + 2 linear layers in the encoder's block, 4 + 4 + 2 in the decoder's; lm_head is tied.
    assert len(sparsifier.layers) == 16
    assert all(type(layer) is SparseLinear for layer in sparsifier.layers.values())
    assert skipped(sparsifier)["lm_head"] == "tied parameter"
    assert skipped(sparsifier)["model.shared.weight"] == "embedding"
    model.tie_weights()
    assert model.lm_head.weight is model.model.shared.weight
    assert type(model.lm_head) is nn.Linear


def test_an_untied_output_head_stays_dense_until_it_is_named(marian: Build) -> None:
    untied = {"tie_word_embeddings": False, "share_encoder_decoder_embeddings": True}
    sparsifier = ts.sparsify(marian(**untied), "str")
    assert skipped(sparsifier)["lm_head"] == "output head"
    assert list(ts.sparsify(marian(**untied), "str", include=["lm_head"]).layers) == ["lm_head"]


def test_gpt2_is_sparse_in_its_conv1d_layers(gpt2: Build) -> None:
    sparsifier = ts.sparsify(gpt2(), "str")
    blocks = [f"transformer.h.{i}" for i in range(2)]
    names = [f"{block}.{name}" for block in blocks for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert list(sparsifier.layers) == names
    assert all(type(layer) is SparseConv1D for layer in sparsifier.layers.values())
    assert skipped(sparsifier)["lm_head"] == "tied parameter"


def test_bert_is_sparse_but_for_its_tied_decoder(bert: Build) -> None:
    sparsifier = ts.sparsify(bert(), "str")
    # query, key, value, two output layers, the intermediate one, and the head's transform.
    assert len(sparsifier.layers) == 7
    assert skipped(sparsifier)["cls.predictions.decoder"] == "tied parameter"


def test_parameters_are_the_same_objects_under_the_same_names(marian: Build) -> None:
    model = marian()
    before = dict(model.named_parameters(remove_duplicate=False))
    ts.sparsify(model, "gmp", sparsity=0.5, total_steps=10)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    thresholds = {name for name, _ in ts.sparsify(marian(), "str").model.named_parameters()} - before.keys()
    assert all(name.endswith(".threshold") for name in thresholds) and len(thresholds) == 16


def test_a_module_that_shares_its_weight_is_tied_whatever_its_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    sparsifier = ts.sparsify(model, "str")
    assert list(sparsifier.layers) == ["1"]
    assert skipped(sparsifier) == {"0": "tied parameter", "2": "tied parameter"}


def test_children_of_multihead_attention_stay_dense_because_it_reads_their_weights() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    sparsifier = ts.sparsify(model, "str")
    assert list(sparsifier.layers) == ["linear1", "linear2"]
    assert skipped(sparsifier) == {
        "self_attn.out_proj.weight": "read by nn.MultiheadAttention",
        "self_attn.in_proj_weight": "MultiheadAttention is not supported",
    }


def test_lora_adapters_stay_dense_and_their_base_layers_do_not(gpt2: Build) -> None:
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    sparsifier = ts.sparsify(peft.get_peft_model(gpt2(), config), "str")
    adapters = {name for name, reason in skipped(sparsifier).items() if reason == "LoRA adapter"}
    prefix = "base_model.model.transformer.h"
    assert adapters == {f"{prefix}.{i}.attn.c_attn.lora_{x}.default" for i in range(2) for x in "AB"}
    assert f"{prefix}.0.attn.c_attn.base_layer" in sparsifier.layers
    assert len(sparsifier.layers) == 8


def test_subclasses_of_linear_belong_to_other_libraries(mlp: Build) -> None:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    sparsifier = ts.sparsify(model, "str")
    assert list(sparsifier.layers) == ["3"]
    assert any("is not supported" in reason for reason in skipped(sparsifier).values())


def test_include_and_exclude_are_patterns_on_full_names_and_exclude_wins(marian: Build) -> None:
    sparsifier = ts.sparsify(marian(), "str", include=["*.fc?"], exclude=["*.decoder.*"])
    assert list(sparsifier.layers) == ["model.encoder.layers.0.fc1", "model.encoder.layers.0.fc2"]
    assert skipped(sparsifier)["model.decoder.layers.0.fc1"] == "excluded"
    assert skipped(sparsifier)["model.encoder.layers.0.self_attn.k_proj"] == "not included"


# "model.encoder" is a module, but not a linear one: taking it for its children would be a guess, and taking
# nothing would be silent.
@pytest.mark.parametrize("pattern", ["*.ffn", "model.encoder", "*.FC1"])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_without_a_match_is_repeated_beside_three_real_names(
    marian: Build, refused: Build, argument: str, pattern: str
) -> None:
    model = marian()
    names = [f"model.encoder.layers.0.self_attn.{part}_proj" for part in "kvq"]
    with refused(model, ValueError, argument, repr(pattern), ", ".join(names), "correct the patterns"):
        ts.sparsify(model, "str", **{argument: ["*.fc1", pattern]})


def test_a_model_without_layers_to_sparsify_is_an_error_never_a_silent_success(refused: Build) -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.ReLU())
    with refused(model, ValueError, "expected linear or convolution layers to sparsify", "none at all"):
        ts.sparsify(model, "str")


def test_excluding_everything_says_why_nothing_is_left(mlp: Build, refused: Build) -> None:
    model = mlp()
    with refused(model, ValueError, "2 excluded"):
        ts.sparsify(model, "str", exclude=["*"])


def test_a_wildcard_passes_over_what_is_tied(marian: Build) -> None:
    everything = ts.sparsify(marian(), "str", include=["*"])
    assert list(everything.layers) == list(ts.sparsify(marian(), "str").layers)
    assert skipped(everything)["lm_head"] == "tied parameter"


def test_including_a_tied_module_is_refused_by_name(marian: Build, refused: Build) -> None:
    model = marian()
    with refused(model, ValueError, "'lm_head' (tied parameter)", "leave it out"):
        ts.sparsify(model, "str", include=["lm_head", "*.fc1"])


def test_a_string_for_a_list_of_patterns_is_a_type_error(mlp: Build, refused: Build) -> None:
    model = mlp()
    with refused(model, TypeError, "write ['0']"):
        ts.sparsify(model, "str", include="0")  # type: ignore[arg-type]


class Count(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return args, kwargs


def test_a_hooked_module_runs_its_sparse_forward_and_its_stock_one_after_finalize(mlp: Build) -> None:
    model, x, hook = mlp().eval(), torch.randn(3, 8), Count()
    add_hook_to_module(model[0], hook)
    dense = model(x)
    sparsifier = ts.sparsify(model, "str", include=["0"])
    sparsifier.layers["0"].threshold.data.fill_(20.0)  # T = 1: nothing is left of layer 0 but its bias
    assert torch.equal(model(x), model[3](model[0].bias.relu().repeat(3, 1)))
    assert hook.calls == 2
    sparsifier.layers["0"].threshold.data.fill_(-200.0)
    sparsifier.finalize()
    assert torch.equal(model(x), dense)
    assert hook.calls == 3


def test_a_refusal_by_the_method_leaves_a_hooked_module_usable(mlp: Build, refused: Build) -> None:
    model, x = mlp().eval(), torch.randn(3, 8)
    add_hook_to_module(model[0], Count())
    dense = model(x)
    with refused(model, ValueError, "total_steps"):
        ts.sparsify(model, "gmp", sparsity=0.5)
    assert torch.equal(model(x), dense)


def test_a_module_whose_forward_was_replaced_stays_dense_for_ours_would_never_run(mlp: Build) -> None:
    model = mlp()
    model[0].forward = lambda x: x
    assert skipped(ts.sparsify(model, "str"))["0"] == "forward is replaced on the instance"


def test_offloaded_weights_are_refused(mlp: Build) -> None:
    model = cpu_offload(mlp(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded by accelerate; load the model without device_map offloading"):
        ts.sparsify(model, "str")
    assert type(model[0]) is nn.Linear


def test_weights_on_the_meta_device_are_refused_even_when_few(mlp: Build, refused: Build) -> None:
    model = mlp()
    model[3].to("meta")
    with refused(model, ValueError, "'3.weight'", "meta device", "load the weights"):
        ts.sparsify(model, "str")


def test_a_compiled_model_is_refused(mlp: Build) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"call sparsify before torch.compile"):
        ts.sparsify(torch.compile(model, backend="eager"), "str")
    assert type(model[0]) is nn.Linear


def test_what_is_no_module_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"expected an nn.Module, got str; pass the model itself"):
        ts.sparsify("gpt2", "str")  # type: ignore[arg-type]


def test_a_model_is_sparsified_once(mlp: Build, refused: Build) -> None:
    model = mlp()
    ts.sparsify(model, "str", include=["3"])
    with refused(model, ValueError, "'3' sparsified already", "call finalize()"):
        ts.sparsify(model, "str")


@pytest.fixture
def fake_ranks() -> Any:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake_ranks")
def test_wrapped_and_sharded_models_are_refused_with_the_order_to_call_in(mlp: Build) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"call sparsify before wrapping.*unwrap_model"):
        ts.sparsify(DistributedDataParallel(model), "str")
    with pytest.raises(ValueError, match="call sparsify before wrapping"):
        ts.sparsify(nn.DataParallel(model), "str")
    assert type(model[0]) is nn.Linear
    mesh = init_device_mesh("cpu", (2,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.data, mesh, [Replicate()]))
    with pytest.raises(ValueError, match=r"'0.weight' sharded \(DTensor\); call sparsify before sharding"):
        ts.sparsify(model, "str")
    assert type(model[3]) is nn.Linear


def test_conv1d_and_linear_of_the_same_numbers_are_the_same_layer() -> None:
    linear, conv = nn.Linear(6, 4), Conv1D(4, 6)
    conv.weight.data, conv.bias.data = linear.weight.data.t().clone(), linear.bias.data
    x = torch.randn(3, 6)
    grad_y = torch.randn(3, 4)
    results = []
    for layer in (linear, conv):
        ts.sparsify(layer, ts.methods.AutoSparse(threshold_init=-1.0, alpha=0.5, alpha_schedule="constant"))
        y = layer(x)
        y.backward(grad_y)
        weight_grad = layer.weight.grad if layer is linear else layer.weight.grad.t()
        results.append([y, weight_grad, layer.bias.grad, layer.threshold.grad])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)
