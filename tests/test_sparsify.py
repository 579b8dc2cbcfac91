"""The one call: which modules are sparsified and why the others are not, and what is refused and changes nothing."""

from __future__ import annotations

import copy
import doctest
import importlib
import itertools
import logging
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from small_runs import Build, Run, gradients
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)  # fmt: skip
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.layers import SparseConv1D, SparseLinear
from tritonsparse.methods import GMP, STR, AutoSparse


def skipped(sparsifier: ts.Sparsifier) -> dict[str, str]:
    return {skip.name: skip.reason for skip in sparsifier.skipped}


def test_transformers_are_sparse_but_for_tied_weights_and_embeddings(marian: Build, gpt2: Build, bert: Build) -> None:
    model = marian()
    before = dict(model.named_parameters(remove_duplicate=False))
    sparsifier = ts.sparsify(model, "str")
    # 4 + 2 linear layers in the encoder's block, 4 + 4 + 2 in the decoder's; lm_head is tied.
    assert {type(layer) for layer in sparsifier.layers.values()} == {SparseLinear} and len(sparsifier.layers) == 16
    assert skipped(sparsifier)["lm_head"] == "tied parameter"
    assert skipped(sparsifier)["model.shared.weight"] == "embedding"
    model.tie_weights()
    assert model.lm_head.weight is model.model.shared.weight and type(model.lm_head) is nn.Linear
    # Parameters are the same objects under the same names, and thresholds come to them.
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before)
    assert after.keys() - before.keys() == {f"{name}.threshold" for name in sparsifier.layers}
    masked = ts.sparsify(marian(), "gmp", sparsity=0.5, total_steps=10).model
    assert dict(masked.named_parameters(remove_duplicate=False)).keys() == before.keys()
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


def test_names_choose_by_pattern_exclude_wins_and_an_untied_head_stays_dense(marian: Build, refused: Build) -> None:
    untied = {"tie_word_embeddings": False, "share_encoder_decoder_embeddings": True}
    assert skipped(ts.sparsify(marian(**untied), "str"))["lm_head"] == "output head"
    assert list(ts.sparsify(marian(**untied), "str", include=["lm_head"]).layers) == ["lm_head"]
    sparsifier = ts.sparsify(marian(), "str", include=["*.fc?"], exclude=["*.decoder.*"])
    assert list(sparsifier.layers) == ["model.encoder.layers.0.fc1", "model.encoder.layers.0.fc2"]
    assert skipped(sparsifier)["model.decoder.layers.0.fc1"] == "excluded"
    assert skipped(sparsifier)["model.encoder.layers.0.self_attn.k_proj"] == "not included"
    # A pattern without a match is repeated beside three real names. "model.encoder" is a module, but not a linear one:
    # taking it for its children would be a guess, and taking nothing would be silent.
    model, names = marian(), ", ".join(f"model.encoder.layers.0.self_attn.{part}_proj" for part in "kvq")
    for argument, pattern in itertools.product(("include", "exclude"), ("*.ffn", "model.encoder", "*.FC1")):
        with refused(model, ValueError, argument, repr(pattern), names, "correct the patterns"):
            ts.sparsify(model, "str", **{argument: ["*.fc1", pattern]})


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def test_what_others_read_or_replace_stays_dense(mlp: Build, gpt2: Build) -> None:
    # A subclass of Linear belongs to another library; where forward is replaced, ours would never run.
    parametrized, replaced = mlp(), mlp()
    nn.utils.parametrizations.weight_norm(parametrized[0])
    replaced[0].forward = lambda x: x
    read, attention = "read by nn.MultiheadAttention", "MultiheadAttention is not supported"
    attended = {"self_attn.out_proj.weight": read, "self_attn.in_proj_weight": attention}
    normed = {f"0.parametrizations.weight.original{i}": "ParametrizationList is not supported" for i in range(2)}
    for model, layers, reasons in (
        (tied(), ["1"], {"0": "tied parameter", "2": "tied parameter"}),
        (nn.TransformerEncoderLayer(8, 2, 16), ["linear1", "linear2"], attended),
        (parametrized, ["3"], normed),
        (replaced, ["3"], {"0": "forward is replaced on the instance"}),
    ):
        sparsifier = ts.sparsify(model, "str")
        assert (list(sparsifier.layers), skipped(sparsifier)) == (layers, reasons)
    # LoRA adapters stay dense, their base layers do not.
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    model = peft.get_peft_model(gpt2(), config)
    sparsifier = ts.sparsify(model, "str")
    adapters = {name for name, reason in skipped(sparsifier).items() if reason == "LoRA adapter"}
    prefix = "base_model.model.transformer.h"
    assert adapters == {f"{prefix}.{i}.attn.c_attn.lora_{x}.default" for i in range(2) for x in "AB"}
    # What no adapter trains beside is frozen.
    assert list(sparsifier.layers) == [f"{prefix}.{i}.attn.c_attn.base_layer" for i in range(2)]
    assert sorted(skipped(sparsifier).values()).count("frozen") == 6


V, MASK, SEMI = ValueError, {"method": "gmp", "sparsity": 0.5}, {"backend": "semi_structured"}
KNOWN = "acdc, autosparse, dense, dsr, dst, gmp, mest, optg, powerprop, rigl, set, snfs"
MODELS: dict[str, Any] = {
    "no layer": lambda mlp: nn.Sequential(nn.Conv1d(1, 1, 3)), "a tied module": lambda mlp: tied(),
    "on meta": lambda mlp: nn.Sequential(*mlp()[:3], nn.Linear(16, 4, device="meta")),
    "sparsified": lambda mlp: ts.sparsify(mlp(), "str", include=["3"]).model,
    "offloaded": lambda mlp: cpu_offload(mlp(), execution_device=torch.device("cpu")),
    "compiled": lambda mlp: torch.compile(mlp(), backend="eager"),
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    # models and choices of layers
    "no layer": ({}, V, ("expected linear or convolution layers to sparsify", "none at all")),
    "all excluded": ({"exclude": ["*"]}, V, ("2 excluded",)),
    "a tied module": ({"include": ["0", "1"]}, V, ("'0' (tied param", "leave it out")),
    "a string": ({"include": "0"}, TypeError, ("write ['0']",)),
    "on meta": ({}, V, ("'3.weight'", "meta device", "load the weights")),
    "sparsified": ({}, V, ("'3' sparsified already", "call finalize()")),
    "offloaded": ({}, V, ("offloaded by accelerate; load the model without device_map offloading",)),
    "compiled": ({}, V, ("call sparsify before torch.compile",)),
    # methods, patterns, back ends
    "an unknown method": ({"method": "autosparce"}, V, (KNOWN, "str, swat", "topkast")),
    "a method class": ({"method": GMP}, TypeError, ("method name or object", "try one of")),
    "an unknown pattern": ({"pattern": "blocks:32"}, V, ("'block:R'", "'blocks:32'", "correct the pattern")),
    "a 4:2 pattern": ({"pattern": "4:2"}, V, ("'N:M' with N < M", "'4:2'")),
    "a pattern the method lacks": ({"pattern": "2:4"}, V, ("'str'", "unstructured", "choose another")),
    "4:8 both ways": (MASK | {"pattern": "4:8:transposable"}, V, ("'N:M:transposable' with M of at most 4", "'4:8:tr")),
    "an unknown back end": ({"backend": "cuda"}, V, ("auto, torch, triton", "'cuda'")),
    "triton without a GPU": ({"backend": "triton"}, RuntimeError, ("a GPU", "use backend='auto' or 'torch'")),
    "2:4 of others": (MASK | SEMI, V, ("'2:4' or '2:4:transposable' with backend='semi_structured'", "'unstr")),
    "2:4 without a GPU": (
        MASK | SEMI | {"pattern": "2:4"}, RuntimeError, ("a GPU with 2:4 products", "operands are on cpu")),
    # numbers
    "sparsity for none": ({"method": "dense", "sparsity": 0.8}, V, ("no sparsity= for method 'dense'",)),
    "distribution for a learned one": ({"distribution": "erk"}, V, ("no distribution=", "leave it out")),
    "no sparsity for gmp": ({"method": "gmp"}, V, ("sparsity=", "'gmp', sparsity=0.8")),
    "sparsity 1": (MASK | {"sparsity": 1.0}, V, ("[0, 1)", "write 0.8 for 80 %")),
    "sparsity in per cent": (MASK | {"sparsity": 80}, V, ("[0, 1)", "got 80;")),
    "sparsity below 0": (MASK | {"sparsity": -0.1}, V, ("[0, 1)", "got -0.1;")),
    "sparsity NaN": (MASK | {"sparsity": float("nan")}, V, ("[0, 1)", "got nan;")),
    "sparsity True": (MASK | {"sparsity": True}, V, ("[0, 1)", "got True;")),
    "an unknown distribution": (MASK | {"distribution": "er"}, V, ("uniform, erk", "'er'")),
    "a contradicted object": ({"method": GMP(sparsity=0.8), "sparsity": 0.9}, V, ("0.8", "in one place")),
    "a keyword the object lacks": ({"method": STR(), "distribution": "erk"}, V, ("no such field", "in one place")),
    "no total_steps": (MASK | {"total_steps": None}, V, ("gmp: expected total_steps=", "pass total")),
    "no steps_per_epoch": ({"method": "autosparse"}, V, ("autosparse: expected steps_per_epoch=",)),
    "total_steps 0": ({"total_steps": 0}, V, ("total_steps", "at least 1", "got 0", "optimizer steps")),
    "a fraction of a step": ({"steps_per_epoch": 10.5}, V, ("steps_per_epoch", "got 10.5")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_with_the_remedy_and_as_it_was(case: str, mlp: Build, refused: Build, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, error, words = REFUSED[case]
    model = MODELS.get(case, lambda mlp: mlp())(mlp)
    with refused(model, error, "expected", "got" if error is not RuntimeError else "use backend=", *words):
        ts.sparsify(model, **{"method": "str", "total_steps": 10, **arguments})


def test_the_method_is_a_copy_of_the_one_given_and_agreeing_keywords_are_welcome(mlp: Build, caplog: Any) -> None:
    sparsifier = ts.sparsify(mlp(), GMP(sparsity=0.8), sparsity=0.8, distribution="uniform", total_steps=10)
    assert sparsifier.method == GMP(sparsity=0.8)
    method = AutoSparse(alpha_schedule="constant")
    first, second = ts.sparsify(mlp(), method), ts.sparsify(mlp(), method)
    assert first.method == second.method == method
    assert first.method is not method and second.method is not method
    first.layers["0"].alpha.fill_(0.25)
    assert float(second.layers["0"].alpha) == 0.75
    with caplog.at_level(logging.INFO, logger="tritonsparse"):
        caplog.clear()
        ts.sparsify(mlp(), "str", exclude=["3"])
    # 128 weights of 128 + 16 + 64 + 4 parameters, and one threshold.
    assert [record.getMessage() for record in caplog.records] == [
        "tritonsparse: str on 1 layer, 128 weights (60.1% of the model); skipped: 1 excluded"
    ]
    results = doctest.testmod(importlib.import_module("tritonsparse.api"))
    assert results.attempted > 0 and results.failed == 0


def test_a_lone_linear_layer_is_a_model_too_and_a_conv1d_of_the_same_numbers_is_the_same_layer() -> None:
    run = Run(nn.Linear(4, 4), "gmp", loss=lambda layer: layer(torch.randn(2, 4)).sum(), sparsity=0.5, total_steps=1)
    run.train(1)
    assert int((run.model.weight == 0).sum()) == 8
    again = ts.sparsify(nn.Linear(4, 4), "gmp", sparsity=0.5, total_steps=1, steps_per_epoch=3)
    again.load_state_dict(run.sparsifier.state_dict())
    assert torch.equal(again.layers[""].mask, run.model.mask)
    assert run.sparsifier.finalized_state_dict().keys() == {"weight", "bias"}
    layers, x = (nn.Linear(6, 4), Conv1D(4, 6)), torch.randn(3, 6)
    layers[1].weight.data, layers[1].bias.data = layers[0].weight.data.t().clone(), layers[0].bias.data
    for layer in layers:
        ts.sparsify(layer, AutoSparse(threshold_init=-1.0, alpha=0.5, alpha_schedule="constant"))
    linear, conv = (gradients(layer, x) for layer in layers)
    torch.testing.assert_close({**conv, "weight": conv["weight"].t()}, linear)


class Count(ModelHook):
    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return args, kwargs


def test_a_hooked_module_runs_its_sparse_forward_and_its_stock_one_when_dense(mlp: Build, refused: Build) -> None:
    model, x, hook = mlp().eval(), torch.randn(3, 8), Count()
    add_hook_to_module(model[0], hook)
    dense = model(x)
    with refused(model, ValueError, "total_steps"):  # by the method, once the layers are re-classed
        ts.sparsify(model, "gmp", sparsity=0.5)
    assert torch.equal(model(x), dense)
    sparsifier = ts.sparsify(model, "str", include=["0"])
    sparsifier.layers["0"].threshold.data.fill_(20.0)  # T = 1: nothing is left of layer 0 but its bias
    assert torch.equal(model(x), model[3](model[0].bias.relu().repeat(3, 1))) and hook.calls == 3
    sparsifier.layers["0"].threshold.data.fill_(-200.0)
    sparsifier.finalize()
    assert torch.equal(model(x), dense) and hook.calls == 4


def test_wrapped_sharded_and_no_models_are_refused_with_the_order_to_call_in(mlp: Build, request: Any) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    request.addfinalizer(dist.destroy_process_group)
    model, before = mlp(), "call sparsify before wrapping"
    wrapped = {nn.parallel.DistributedDataParallel: rf"{before}.*unwrap_model", nn.DataParallel: before}
    for wrapper, words in wrapped.items():
        with pytest.raises(ValueError, match=words):
            ts.sparsify(wrapper(model), "str")
    mesh = init_device_mesh("cpu", (2,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.data, mesh, [Replicate()]))
    with pytest.raises(ValueError, match=r"'0.weight' sharded \(DTensor\); call sparsify before sharding"):
        ts.sparsify(model, "str")
    assert type(model[0]) is type(model[3]) is nn.Linear
    with pytest.raises(TypeError, match=r"expected an nn.Module, got str; pass the model itself"):
        ts.sparsify("gpt2", "str")  # type: ignore[arg-type]


def test_output_heads_stay_dense_unless_they_are_asked_for() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    bert = BertConfig(vocab_size=64, num_labels=3, **small)
    speech = Wav2Vec2Config(
        vocab_size=48, conv_dim=(32,), conv_kernel=(8,), conv_stride=(4,), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, **small,
    )  # fmt: skip
    llama = LlamaConfig(vocab_size=64, num_labels=1, **small)
    for model, head in (
        (BertForSequenceClassification(bert), "classifier"),
        (BertForQuestionAnswering(BertConfig(**small)), "qa_outputs"),
        (ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **small)), "classifier"),
        (LlamaForSequenceClassification(llama), "score"), (Wav2Vec2ForCTC(speech), "lm_head"),
    ):  # fmt: skip
        sparsifier = ts.sparsify(copy.deepcopy(model), "static", sparsity=0.5)
        assert head not in sparsifier.layers and skipped(sparsifier)[head] == "output head"
        assert len(sparsifier.layers) >= 6
        assert head in ts.sparsify(copy.deepcopy(model), "static", sparsity=0.5, output_heads=True).layers
        assert list(ts.sparsify(model, "static", sparsity=0.5, include=[head]).layers) == [head]
