"""Files that the package wrote at commit 2a1f126 load today, give what they gave, and train on as they did.

`git show 0727123:tests/older_files/make_files.py` made them; it runs with the package of that commit alone. Beside each
<case>.safetensors holds the batches, for a seed may give other numbers elsewhere, and what came out: outputs, and where
training went from there. Adam's epsilon is large, so that gradients as small as rounding errors move nothing.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from small_runs import assert_same, gradients
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import tritonsparse as ts
from tritonsparse.layers.backend import Backend
from tritonsparse.layers.older import from_older
from tritonsparse.methods import TopKAST
from tritonsparse.methods.masked import MaskMethod
from tritonsparse.pattern import NM, Block, Unstructured
from tritonsparse.train import language_modeling

HERE = Path(__file__).parent
# There the numbers are equal bit for bit. On another CPU or under another torch sums of products are added in another
# order, and exp and tanh are approximated otherwise: some 1e-7 of the largest term, which a few steps carry on.
# Emulated older CPUs stayed well within this; one step moves weights by 1e-3 to 1e-1.
RTOL, ATOL = 1e-5, 2e-6


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8))


def convolution() -> nn.Module:
    last = nn.Flatten(), nn.Linear(16, 8, bias=False)
    convolutions = nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, bias=False), nn.Tanh()
    return nn.Sequential(*convolutions, *last).to(memory_format=torch.channels_last)


class Case(NamedTuple):
    """One run: how its model is built or loaded, and by what it is made sparse and trained."""

    build: Callable[..., Any]
    method: str
    fields: dict[str, Any]
    optimizer: str = "adamw"
    pattern: str = "unstructured"

    def attach(self, sparsifier: ts.Sparsifier) -> torch.optim.Optimizer:
        optimizers = {"adamw": partial(AdamW, eps=1e-3), "sgd": partial(SGD, momentum=0.9), "plain": SGD}
        optimizer: Any = optimizers[self.optimizer](sparsifier.param_groups(lr=0.05, weight_decay=0.01))
        sparsifier.attach(optimizer)
        return optimizer


THRESHOLDS = {"threshold_init": -2.5, "threshold_lr_scale": 5.0}
TUNED = {"backward_density": 0.9, "auto_tune": {"reference_losses": [0.5, 0.1]}}
TARGET = {"sparsity": 0.5, "control_every": 2}
PHASES = {"starts": [[0, "dense"], [1, "sparse"], [2, "dense"], [3, "sparse"]], "epochs": 4}
MOMENTUM = {"sparsity": 0.5, "refresh_every": 5, "distribution": "momentum"}
STATES = {
    "autosparse": Case(linear, "autosparse", {**THRESHOLDS, **TUNED}, "sgd"),
    "autosparse_target": Case(convolution, "autosparse", {**THRESHOLDS, **TARGET, "refresh_every": 2}, "sgd"),
    "autosparse_blocks": Case(linear, "autosparse", {**TARGET, "backward_density": 0.9}, "sgd", "block:4"),
    "dst": Case(linear, "dst", {"penalty": 0.01}, "sgd"),
    "rigl": Case(linear, "rigl", {"sparsity": 0.5, "drop_fraction": 0.5, "update_every": 3}, "adamw", "block:4"),
    "acdc": Case(linear, "acdc", {"sparsity": 0.6, "phases": PHASES}),
    "powerprop": Case(linear, "powerprop", {"sparsity": 0.7, "backward_sparsity": 0.4}, "sgd"),
    "swat": Case(convolution, "swat", MOMENTUM, "sgd"),
}
OF_BERT = {"threshold_init": -5.0, "backward_density": 0.95, "control_every": 10}
TOP_KAST = {"sparsity": 0.6, "backward_sparsity": 0.3, "alpha": 0.5}
PRETRAINED = {
    "bert_autosparse": Case(AutoModelForMaskedLM, "autosparse", OF_BERT, "plain"),
    "gpt2_topkast": Case(AutoModelForCausalLM, "topkast", TOP_KAST, "plain"),
}


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): each for key, each in tensors.items() if key.startswith(f"{name}/")}


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Floating-point numbers to rounding; masks, counts and steps exactly."""
    assert expected and expected.keys() <= actual.keys()
    for key, wanted in expected.items():
        rtol, atol = (RTOL, ATOL) if wanted.is_floating_point() else (0.0, 0.0)
        torch.testing.assert_close(
            actual[key].detach(), wanted, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


def outputs_and_loss(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Ids are their own labels; other models give the first 8 numbers of their input back."""
    if not batch.is_floating_point():
        result = model(input_ids=batch, labels=batch)
        return result.logits, result.loss
    outputs = model(batch)
    return outputs, (outputs - batch.detach().flatten(1)[:, :8]).square().mean()


def standing(model: nn.Module, sparsifier: ts.Sparsifier, batch: Tensor) -> dict[str, Tensor]:
    """Where training stands, by what is public beside the Parameters."""
    layers, statistics = sparsifier.layers, sparsifier.method.statistics()
    return {
        "outputs": outputs_and_loss(model.eval(), batch)[0],
        "step": torch.tensor(sparsifier.step),
        "epoch_losses": torch.tensor(sparsifier.epoch_losses),
        "kept": torch.tensor([layer.kept_count() for layer in layers.values()]),
        **{f"mask/{name}": layer.mask.clone() for name, layer in layers.items() if layer.mask is not None},
        **{f"statistic/{key}": torch.tensor(value) for key, value in statistics.items()},
    }


def assert_goes_on(model: nn.Module, sparsifier: ts.Sparsifier, optimizer: Any, expected: Mapping[str, Tensor]) -> None:
    batches, losses = expected["batches"], []
    assert_equal(standing(model, sparsifier, batches[0]), part(expected, "saved"))
    for batch in batches:
        _, loss = outputs_and_loss(model.train(), batch)
        loss.backward()
        sparsifier.observe(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert_equal({"losses": torch.tensor(losses)}, {"losses": expected["losses"]})
    reached = {**standing(model, sparsifier, batches[0]), **dict(model.named_parameters())}
    assert_equal(reached, part(expected, "reached"))


@pytest.fixture
def momentum_outside_b(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 0.1 let the optimizer's momentum move what Top-KAST says is frozen: its runs went on that way."""
    monkeypatch.setattr(TopKAST, "guard", MaskMethod.guard)


@pytest.mark.usefixtures("momentum_outside_b")
@pytest.mark.parametrize("name", STATES)
def test_a_state_trains_on_as_it_did(name: str) -> None:
    case, saved = STATES[name], torch.load(HERE / "states" / f"{name}.pt", weights_only=True)
    model, method = case.build(), ts.methods.METHODS[case.method](**case.fields)
    sparsifier = ts.sparsify(model, method, pattern=case.pattern, total_steps=8, steps_per_epoch=2)
    optimizer = case.attach(sparsifier)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    sparsifier.load_state_dict(saved["sparsifier"])
    assert_goes_on(model, sparsifier, optimizer, load_file(HERE / "states" / f"{name}.safetensors"))


@pytest.mark.usefixtures("momentum_outside_b")
@pytest.mark.parametrize("name", PRETRAINED)
def test_a_saved_model_is_an_ordinary_checkpoint_and_trains_on_from_its_sidecar(name: str) -> None:
    case, folder = PRETRAINED[name], HERE / "pretrained" / name
    expected = load_file(folder.with_suffix(".safetensors"))
    outputs, _ = outputs_and_loss(case.build.from_pretrained(folder).eval(), expected["batches"][0])
    assert_equal({"outputs": outputs}, {"outputs": expected["saved/outputs"]})
    model, sparsifier = ts.load(folder, case.build)
    assert sparsifier.method == ts.methods.METHODS[case.method](**case.fields)
    assert_goes_on(model, sparsifier, case.attach(sparsifier), expected)


def test_a_model_of_packed_blocks_loads_and_trains_and_a_pickled_one_gives_the_same_gradients() -> None:
    pixels = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 8))
    for name, form in (("gpt2", AutoModelForCausalLM), ("pixels", pixels)):
        expected, model = load_file(HERE / "bsr" / f"{name}.safetensors"), ts.load_bsr(HERE / "bsr" / name, form)
        before, loss = outputs_and_loss(model, expected["batch"])
        loss.backward()
        SGD(model.parameters(), lr=0.5).step()
        found = {"before": before, "after": outputs_and_loss(model, expected["batch"])[0]}
        assert_equal(found, part(expected, "expected"))
    for name in ("autosparse", "powerprop", "swat"):
        expected = load_file(HERE / "pickled" / f"{name}.safetensors")
        model, x = torch.load(HERE / "pickled" / f"{name}.pt", weights_only=False), expected["batch"].requires_grad_()
        outputs, loss = outputs_and_loss(model, x)
        loss.backward()
        grads = {name: each.grad for name, each in [("x", x), *model.named_parameters()] if each.grad is not None}
        assert_equal({"outputs": outputs, **grads}, part(expected, "expected"))


# What a run's record says of the machine and of the clock, and in words; and the training cost, which version 0.1
# billed by the end of a window.
OF_THE_RUN = ("environment", "training_seconds", "tokens_per_second", "perplexity_line", "backend", "backend_reason",
              "train_flops_fraction", "train_flops")  # fmt: skip
# Files are named relative to the working folder: a resumed run must repeat the names of the run that was saved.
PROGRAM = [
    "--model_name_or_path=model", "--train_file=train.txt", "--validation_file=validation.txt", "--test_file=test.txt",
    "--output_dir=run", "--batch_size=4", "--gradient_accumulation_steps=2", "--tgt_len=8", "--mem_len=8",
    "--eval_batch_size=2", "--max_train_steps=12", "--checkpointing_steps=7", "--logging_steps=4",
    "--learning_rate=0.01", "--min_learning_rate=0.001", "--optim=lamb", "--adam_epsilon=0.001", "--method=autosparse",
    '--method_args={"threshold_init": -3, "backward_density": 0.9}', "--embedding_sparsity=0.25",
]  # fmt: skip


def assert_holds(actual: Any, expected: Any, path: str = "") -> None:
    """All that a JSON document says is in another, numbers to rounding; keys of `OF_THE_RUN` with any value."""
    if isinstance(expected, dict):
        assert expected.keys() <= actual.keys(), path
        for key in expected.keys() - set(OF_THE_RUN):
            assert_holds(actual[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), path
        for each, wanted in zip(actual, expected, strict=True):
            assert_holds(each, wanted, f"{path}[]")
    else:
        assert actual == (pytest.approx(expected, rel=RTOL) if isinstance(expected, float) else expected), path


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_of_the_program_goes_on_and_reports_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # the files are a CPU's
    program, run = HERE / "program", tmp_path / "run"
    shutil.copytree(program, tmp_path, dirs_exist_ok=True)
    run.mkdir()
    (tmp_path / "step_7").rename(run / "step_7")
    monkeypatch.chdir(tmp_path)
    assert language_modeling.main([*PROGRAM, "--resume_from_checkpoint=latest"]) == 0
    before, after = (json.loads((each / "all_results.json").read_text("utf-8")) for each in (program, run))
    assert_holds(after, before)
    assert before["environment"].keys() <= after["environment"].keys()
    # It went on, and did not start again: what came before the checkpoint is the old record, with its speed.
    assert [row["step"] for row in before["history"][:2]] == [4, 7]
    assert after["history"][:2] == before["history"][:2]
    assert_equal(load_file(run / "model.safetensors"), load_file(program / "model.safetensors"))


# What version 0.1 pickled of a layer beside what nn.Module and the view hold.
OLD: dict[str, Any] = {
    "block": None, "n_of_m": None, "backend_choice": "auto", "backend": "torch", "backend_reason": "auto: no GPU",
    "sparse_grad_input": False, "activation_density": None, "activation_scope": "batch", "activation_slack": 1.25,
    "remembers_cutoff": False, "activation_cutoff": None, "row_masks": [], "overflows": 0, "last_cutoff": None,
    "last_overflow": None, "w_hat": None, "w_hat_versions": (), "defer": True, "block_index": None, "grad_index": None,
    "input_index": None, "block_flags": None, "index_versions": (),
}  # fmt: skip
CHOSEN = {"backend_choice": "fused", "backend": "triton", "backend_reason": "narrow", "sparse_grad_input": True}


def test_an_old_attribute_is_found_in_todays_and_what_is_made_anew_is_gone() -> None:
    plain = {"backend": Backend("auto", "torch", "auto: no GPU"), "sparse_input": None, "topology": None, "cache": None}
    for changed, expected in (
        ({}, {"pattern": Unstructured()}),
        ({"block": (16, 32)}, {"pattern": Block(16, 32)}),
        ({"n_of_m": NM(2, 4, transposable=True)}, {"pattern": NM(2, 4, transposable=True)}),
        (CHOSEN, {"pattern": Unstructured(), "backend": Backend("fused", "triton", "narrow", True)}),
    ):
        state = from_older({**OLD, "kind": "soft", "training": True, **changed})
        assert state == {"kind": "soft", "training": True, **plain, **expected}
    # A packed input keeps what the method wrote and counted.
    cutoff, rows = torch.ones(1), torch.ones(2, dtype=torch.bool)
    old = {"activation_density": 0.25, "activation_scope": "sample", "activation_slack": 1.5, "remembers_cutoff": True}
    old |= {"activation_cutoff": cutoff, "row_masks": [rows], "overflows": 3}
    sparse = from_older({**OLD, **old})["sparse_input"]
    assert (sparse.density, sparse.scope, sparse.slack, sparse.remembers) == (0.25, "sample", 1.5, True)
    assert sparse.cutoff is cutoff and sparse.row_masks == [rows] and sparse.overflows == 3
    assert sparse.last_cutoff is None and sparse.last_overflow is None


def test_a_layer_of_then_computes_as_the_one_of_today_and_todays_state_is_left_as_it_is() -> None:
    layer = nn.Linear(8, 4)
    ts.sparsify(layer, "static", sparsity=0.5)
    state: Any = layer.__getstate__()
    assert from_older(state) is state
    twin = copy.copy(layer)
    twin.__dict__ = {}
    dropped = ("pattern", "backend", "sparse_input", "topology", "cache")
    twin.__setstate__({key: value for key, value in state.items() if key not in dropped} | OLD)
    assert_same(gradients(twin, torch.ones(3, 8)), gradients(layer, torch.ones(3, 8)))
    assert repr(twin) == repr(layer)
