"""A sparsity for every layer: `sparsity={"pattern": 0.9}`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import IDS, Build, Run, assert_same
from torch import nn
from transformers import GPT2LMHeadModel, TrainingArguments

import tritonsparse as ts
from tritonsparse.masks.distribution import divide
from tritonsparse.masks.topk import kept_count
from tritonsparse.methods import ACDC, GMP, MEST, METHODS, SET, SWAT, Method, Phases, PowerProp, RigL, Static, TopKAST

# Of weights [16, 8], [12, 16], [4, 12].
WANTED = {"0": 0.75, "[24]": 0.5}
TURNS = Phases([(0, "sparse"), (1, "dense"), (2, "sparse")], 4)
SERVED: dict[str, Any] = {
    "static": lambda p: Static(sparsity=p),
    "gmp": lambda p: GMP(sparsity=p, update_every=2),
    "gmp, from a tenth": lambda p: GMP(sparsity=p, update_every=2, initial_sparsity=0.1),
    "set": lambda p: SET(sparsity=p, update_every=2),
    "rigl": lambda p: RigL(sparsity=p, update_every=2),
    "mest": lambda p: MEST(sparsity=p, update_every=2),
    "topkast": lambda p: TopKAST(sparsity=p, backward_sparsity=0.3),
    "powerprop": lambda p: PowerProp(sparsity=p),
    "swat": lambda p: SWAT(sparsity=p),
    "acdc": lambda p: ACDC(sparsity=p, phases=TURNS, scope="uniform"),
}


def three(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def loss(model: Any) -> torch.Tensor:
    x = torch.randn(16, 8)
    result: torch.Tensor = (model(x) - torch.tanh(x[:, :4])).square().mean()
    return result


@pytest.mark.parametrize("method", SERVED)
def test_every_layer_ends_at_its_own_sparsity_exactly(method: str, tmp_path: Path) -> None:
    def start(seed: int = 0) -> Run:
        return Run(three(seed), SERVED[method](WANTED), loss=loss, total_steps=12, steps_per_epoch=3)

    run = start().train(12)
    kept = {name: int(layer.mask.sum()) for name, layer in run.sparsifier.layers.items()}
    assert kept == {"0": kept_count(128, 0.75), "2": kept_count(192, 0.5), "4": kept_count(48, 0.5)}
    # What it comes to over all layers, and is saved as.
    assert run.sparsifier.method.sparsity == pytest.approx(1 - sum(kept.values()) / 368)
    config = json.loads(json.dumps(run.sparsifier.method.to_dict()))
    assert METHODS[run.sparsifier.method.name](**config) == run.sparsifier.method
    # Resumed, it goes on bit for bit.
    half = start().train(6)
    again = start(3).load(half.state())
    again.train(6)
    assert_same(again.model.state_dict(), run.model.state_dict())


def test_the_first_pattern_counts_and_layers_without_one_stay_dense_with_the_reason() -> None:
    sparsifier = ts.sparsify(three(), "static", sparsity={"0": 0.25, "[04]": 0.75, "2": 0.0})
    assert {name: 1 - layer.kept_count() / layer.weight.numel() for name, layer in sparsifier.layers.items()} == {
        "0": 0.25, "4": 0.75,
    }  # fmt: skip
    assert [(skip.name, skip.reason) for skip in sparsifier.skipped] == [("2", "no sparsity given")]
    assert "no sparsity given" in str(sparsifier.report())
    # An object says it in the same words.
    assert ts.sparsify(three(), Static(sparsity={"0": 0.25})).layers.keys() == {"0"}


def test_other_sparsities_of_a_method_are_in_proportion() -> None:
    shapes = {"0": (16, 8), "2": (12, 16), "4": (4, 12)}
    mean = (0.75 * 128 + 0.5 * 192 + 0.5 * 48) / 368
    assert divide(WANTED, shapes, mean) == {"0": 0.75, "2": 0.5, "4": 0.5}
    assert divide(WANTED, shapes, 0.0) == {"0": 0.0, "2": 0.0, "4": 0.0}
    assert divide(WANTED, shapes, mean / 2) == pytest.approx({"0": 0.375, "2": 0.25, "4": 0.25})
    # Above its own by half of what is kept at most: 1.5 times .75 would be more than all.
    assert divide(WANTED, shapes, mean * 1.5) == pytest.approx({"0": 0.875, "2": 0.75, "4": 0.75})
    # Top-KAST's larger set holds the smaller one in every layer.
    layers = ts.sparsify(three(), TopKAST(sparsity=WANTED, backward_sparsity=0.5)).layers.values()
    assert all(not (layer.mask & ~layer.grad_mask).any() for layer in layers)


def test_it_is_saved_loaded_and_trained_on_as_any_other(gpt2: Build, tmp_path: Path) -> None:
    wanted = {"*.attn.*": 0.5, "*.mlp.*": 0.75}
    data = [{"input_ids": (tokens := torch.arange(i, i + 8) % 32), "labels": tokens} for i in range(12)]
    settings: dict[str, Any] = {"num_train_epochs": 4, "per_device_train_batch_size": 4, "report_to": "none"}
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **settings)
    trainer = ts.SparseTrainer(gpt2(), arguments, train_dataset=data, method="gmp", sparsity=wanted)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model, sparsifier = ts.load(tmp_path / "saved", GPT2LMHeadModel)
    assert torch.equal(model.eval()(IDS).logits, trainer.model.eval()(IDS).logits)
    for name, layer in sparsifier.layers.items():
        share = 0.5 if ".attn." in name else 0.75
        assert int(layer.mask.sum()) == kept_count(layer.weight.numel(), share), name


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no match": ("gmp", {"sparsity": {"nothing": 0.5}}, r"sparsity pattern 'nothing' to match a module"),
    "all dense": ("gmp", {"sparsity": {"*": 0.0}}, r"a sparsity above 0 to match"),
    "out of range": ("gmp", {"sparsity": {"*": 1.0}}, r"numbers in \[0, 1\), got 1.0 for '\*'"),
    "no number": ("gmp", {"sparsity": {"*": "0.5"}}, r"numbers in \[0, 1\), got '0.5'"),
    "one of two": ("gmp", {"sparsity": {"0": 0.5, "2": "half"}}, r"numbers in \[0, 1\), got 'half' for '2'"),
    "empty": ("gmp", {"sparsity": {}}, r"sparsity"),
    "a distribution too": ("gmp", {"sparsity": {"*": 0.5}, "distribution": "erk"}, r"no distribution= beside"),
    "another object": (Static(sparsity=0.5), {"sparsity": {"*": 0.5}}, r"sparsity= to agree with the method object"),
    "layers compete": ("acdc", {"sparsity": {"*": 0.5}}, r"scope 'uniform' with sparsities by layer"),
    "two in one pattern": ("gmp", {"sparsity": {"0": 0.5, "2": 0.25}, "pattern": "2:4"}, r"one sparsity with pattern"),
    **{name: (name, {"sparsity": {"*": 0.5}}, r"expected (one|a) sparsity") for name in ("dsr", "snfs", "optg", "str")},
    "autosparse": ("autosparse", {"sparsity": {"*": 0.5}}, r"expected (one|a) sparsity"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_has_changed(case: str) -> None:
    method, options, message = REFUSED[case]
    model = three()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ts.sparsify(model, method, total_steps=300, steps_per_epoch=100, **options)
    assert_same(model.state_dict(), before)
    assert all(type(module) in (nn.Sequential, nn.Linear, nn.ReLU) for module in model.modules())


def test_which_methods_take_it_is_every_one_whose_layers_keep_their_share() -> None:
    taken = {name for name, cls in METHODS.items() if getattr(cls, "keeps_distribution", False)}
    assert taken - {"optg"} == {name.partition(",")[0] for name in SERVED}
    assert issubclass(METHODS["gmp"], Method)
