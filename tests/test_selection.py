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
from small_runs import Build, gradients
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.layers import SparseConv1D, SparseLinear


def skipped(sparsifier: ts.Sparsifier) -> dict[str, str]:
    return {skip.name: skip.reason for skip in sparsifier.skipped}


def test_transformers_are_sparse_but_for_tied_weights_and_embeddings(marian: Build, gpt2: Build, bert: Build) -> None:
    model = marian()
    sparsifier = ts.sparsify(model, "str")
    # 4 + 2 linear layers in the encoder's block, 4 + 4 + 2 in the decoder's; lm_head is tied.
    assert {type(layer) for layer in sparsifier.layers.values()} == {SparseLinear} and len(sparsifier.layers) == 16
    assert skipped(sparsifier)["lm_head"] == "tied parameter"
    assert skipped(sparsifier)["model.shared.weight"] == "embedding"
    model.tie_weights()
    assert model.lm_head.weight is model.model.shared.weight and type(model.lm_head) is nn.Linear
    # A wildcard passes over what is tied.
    everything = ts.sparsify(marian(), "str", include=["*"])
    assert list(everything.layers) == list(sparsifier.layers) and skipped(everything)["lm_head"] == "tied parameter"

    sparsifier = ts.sparsify(gpt2(), "str")
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(sparsifier.layers) == [f"transformer.h.{i}.{part}" for i in range(2) for part in parts]
    assert {type(layer) for layer in sparsifier.layers.values()} == {SparseConv1D}
    assert skipped(sparsifier)["lm_head"] == "tied parameter"

    sparsifier = ts.sparsify(bert(), "str")
    # query, key, value, two output layers, the intermediate one, and the head's transform.
    assert len(sparsifier.layers) == 7 and skipped(sparsifier)["cls.predictions.decoder"] == "tied parameter"


def test_an_untied_output_head_stays_dense_until_it_is_named(marian: Build) -> None:
    untied = {"tie_word_embeddings": False, "share_encoder_decoder_embeddings": True}
    assert skipped(ts.sparsify(marian(**untied), "str"))["lm_head"] == "output head"
    assert list(ts.sparsify(marian(**untied), "str", include=["lm_head"]).layers) == ["lm_head"]


def test_parameters_are_the_same_objects_under_the_same_names(marian: Build) -> None:
    model = marian()
    before = dict(model.named_parameters(remove_duplicate=False))
    ts.sparsify(model, "gmp", sparsity=0.5, total_steps=10)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    thresholds = {name for name, _ in ts.sparsify(marian(), "str").model.named_parameters()} - before.keys()
    assert all(name.endswith(".threshold") for name in thresholds) and len(thresholds) == 16


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def parametrized() -> nn.Module:
    """A subclass of Linear, which belongs to another library."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def replaced() -> nn.Module:
    """Our forward would never run."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].forward = lambda x: x
    return model


@pytest.mark.parametrize(
    ("build", "layers", "reasons"),
    [
        (tied, ["1"], {"0": "tied parameter", "2": "tied parameter"}),
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 16),
            ["linear1", "linear2"],
            {
                "self_attn.out_proj.weight": "read by nn.MultiheadAttention",
                "self_attn.in_proj_weight": "MultiheadAttention is not supported",
            },
        ),
        (
            parametrized,
            ["1"],
            {f"0.parametrizations.weight.original{i}": "ParametrizationList is not supported" for i in range(2)},
        ),
        (replaced, ["1"], {"0": "forward is replaced on the instance"}),
    ],
)
def test_what_others_read_or_replace_stays_dense(
    build: Callable[[], nn.Module], layers: list[str], reasons: dict[str, str]
) -> None:
    sparsifier = ts.sparsify(build(), "str")
    assert list(sparsifier.layers) == layers
    assert skipped(sparsifier) == reasons


def test_lora_adapters_stay_dense_and_their_base_layers_do_not(gpt2: Build) -> None:
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    sparsifier = ts.sparsify(peft.get_peft_model(gpt2(), config), "str")
    adapters = {name for name, reason in skipped(sparsifier).items() if reason == "LoRA adapter"}
    prefix = "base_model.model.transformer.h"
    assert adapters == {f"{prefix}.{i}.attn.c_attn.lora_{x}.default" for i in range(2) for x in "AB"}
    assert f"{prefix}.0.attn.c_attn.base_layer" in sparsifier.layers and len(sparsifier.layers) == 8


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


def partly_on_meta(mlp: Build) -> nn.Module:
    model: nn.Module = mlp()
    model[3].to("meta")  # type: ignore[operator]
    return model


def sparsified(mlp: Build) -> nn.Module:
    return ts.sparsify(mlp(), "str", include=["3"]).model


REFUSED: dict[str, tuple[Callable[[Build], nn.Module], dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "no layer": (
        lambda mlp: nn.Sequential(nn.Conv1d(1, 1, 3)), {}, ValueError,
        ("expected linear or convolution layers to sparsify", "none at all")),
    "all excluded": (lambda mlp: mlp(), {"exclude": ["*"]}, ValueError, ("2 excluded",)),
    "a tied module": (lambda mlp: tied(), {"include": ["0", "1"]}, ValueError, ("'0' (tied param", "leave it out")),
    "a string": (lambda mlp: mlp(), {"include": "0"}, TypeError, ("write ['0']",)),
    "on meta": (partly_on_meta, {}, ValueError, ("'3.weight'", "meta device", "load the weights")),
    "sparsified": (sparsified, {}, ValueError, ("'3' sparsified already", "call finalize()")),
    "offloaded": (
        lambda mlp: cpu_offload(mlp(), execution_device=torch.device("cpu")), {}, ValueError,
        ("offloaded by accelerate; load the model without device_map offloading",)),
    "compiled": (
        lambda mlp: torch.compile(mlp(), backend="eager"), {}, ValueError, ("call sparsify before torch.compile",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_or_choice_that_does_not_fit_is_refused_and_left_as_it_is(
    case: str, mlp: Build, refused: Build
) -> None:
    build, options, error, words = REFUSED[case]
    model = build(mlp)
    with refused(model, error, *words):
        ts.sparsify(model, "str", **options)


def test_what_is_no_module_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"expected an nn.Module, got str; pass the model itself"):
        ts.sparsify("gpt2", "str")  # type: ignore[arg-type]


class Count(ModelHook):
    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return args, kwargs


def test_a_hooked_module_runs_its_sparse_forward_and_its_stock_one_after_finalize_or_a_refusal(
    mlp: Build, refused: Build
) -> None:
    model, x, hook = mlp().eval(), torch.randn(3, 8), Count()
    add_hook_to_module(model[0], hook)
    dense = model(x)
    with refused(model, ValueError, "total_steps"):  # by the method, once the layers are re-classed
        ts.sparsify(model, "gmp", sparsity=0.5)
    assert torch.equal(model(x), dense)
    sparsifier = ts.sparsify(model, "str", include=["0"])
    sparsifier.layers["0"].threshold.data.fill_(20.0)  # T = 1: nothing is left of layer 0 but its bias
    assert torch.equal(model(x), model[3](model[0].bias.relu().repeat(3, 1)))
    assert hook.calls == 3
    sparsifier.layers["0"].threshold.data.fill_(-200.0)
    sparsifier.finalize()
    assert torch.equal(model(x), dense)
    assert hook.calls == 4


@pytest.fixture
def fake_ranks() -> Any:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake_ranks")
def test_wrapped_and_sharded_models_are_refused_with_the_order_to_call_in(mlp: Build) -> None:
    model = mlp()
    for wrapper, words in (
        (DistributedDataParallel, r"call sparsify before wrapping.*unwrap_model"),
        (nn.DataParallel, "call sparsify before wrapping"),
    ):
        with pytest.raises(ValueError, match=words):
            ts.sparsify(wrapper(model), "str")
    mesh = init_device_mesh("cpu", (2,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.data, mesh, [Replicate()]))
    with pytest.raises(ValueError, match=r"'0.weight' sharded \(DTensor\); call sparsify before sharding"):
        ts.sparsify(model, "str")
    assert type(model[0]) is type(model[3]) is nn.Linear


def test_conv1d_and_linear_of_the_same_numbers_are_the_same_layer() -> None:
    layers, x = (nn.Linear(6, 4), Conv1D(4, 6)), torch.randn(3, 6)
    layers[1].weight.data, layers[1].bias.data = layers[0].weight.data.t().clone(), layers[0].bias.data
    for layer in layers:
        ts.sparsify(layer, ts.methods.AutoSparse(threshold_init=-1.0, alpha=0.5, alpha_schedule="constant"))
    linear, conv = (gradients(layer, x) for layer in layers)
    torch.testing.assert_close({**conv, "weight": conv["weight"].t()}, linear)
