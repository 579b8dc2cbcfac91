"""`SparseTrainer`: the Trainer's own arithmetic, optimizers, saves and reloads."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import Build, assert_same
from torch import nn
from transformers import GPT2LMHeadModel, MarianMTModel, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import tritonsparse as ts
from tritonsparse.methods import ACDC, GMP, STR, AutoSparse, Phases, RigL, TopKAST

DATA = [{"input_ids": (tokens := torch.arange(i, i + 8) % 32), "labels": tokens} for i in range(12)]
TURNS = Phases([(0, "sparse"), (1, "dense"), (2, "sparse")], 4)
METHODS: dict[str, Callable[[], Any]] = {
    "gmp": lambda: GMP(sparsity=0.7, update_every=2),
    "rigl": lambda: RigL(sparsity=0.7, update_every=2),
    "acdc": lambda: ACDC(sparsity=0.7, phases=TURNS),
    "topkast": lambda: TopKAST(sparsity=0.7),
    "str": lambda: STR(sparsity=0.7),
    "autosparse": lambda: AutoSparse(sparsity=0.7),
}


def arguments(folder: Path, cls: type[TrainingArguments] = TrainingArguments, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        **{"num_train_epochs": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"},
        **{"use_cpu": True, "disable_tqdm": True, "logging_steps": 3, "save_steps": 3, "save_strategy": "steps"},
    }
    return cls(str(folder), **settings | options)


def trainer(model: Any, folder: Path, method: Any = None, **options: Any) -> ts.SparseTrainer:
    given = {
        key: options.pop(key) for key in ("sparsity", "pattern", "sparsifier", "compute_metrics") if key in options
    }
    data = {"train_dataset": DATA, "eval_dataset": DATA[:4]}
    return ts.SparseTrainer(model, arguments(folder, **options), method=method, **data, **given)


@pytest.mark.parametrize("method", ["gmp", "rigl", "acdc", "optg", "mest", "str", "autosparse"])
def test_a_run_goes_on_longer_than_it_was_planned_and_a_shorter_one_is_refused(
    gpt2: Build, tmp_path: Path, method: str
) -> None:
    trainer(gpt2(), tmp_path / "a", method, sparsity=0.7).train()
    longer = trainer(gpt2(), tmp_path / "b", method, sparsity=0.7, num_train_epochs=8)
    first: list[float] = []
    longer.sparsifier.model.register_forward_pre_hook(lambda *_: first.append(longer.sparsifier.sparsity()))
    longer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-12"))
    assert (longer.sparsifier.step, longer.sparsifier.clock.total_steps) == (24, 24)
    # It began where the other had ended, or in the phase of the longer plan, and ends as sparse.
    assert first[0] == pytest.approx(0.0 if method == "acdc" and first[0] == 0.0 else 0.7, abs=0.02)
    assert longer.sparsifier.sparsity() == pytest.approx(0.7, abs=0.02)
    shorter = trainer(gpt2(), tmp_path / "c", method, sparsity=0.7, num_train_epochs=4)
    with pytest.raises(ValueError, match=r"expected total_steps = 12, got 24"):
        shorter.sparsifier.restore(tmp_path / "b" / "checkpoint-24", longer=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_and_resumed_ends_where_the_unbroken_one_does(gpt2: Build, tmp_path: Path, method: str) -> None:
    unbroken = trainer(gpt2(), tmp_path / "a", METHODS[method]())
    clock = unbroken.sparsifier.clock
    assert (clock.total_steps, clock.steps_per_epoch) == (12, 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="tritonsparse")
        unbroken.train()
        assert unbroken.sparsifier.step == 12 and unbroken.sparsifier.sparsity() == pytest.approx(0.7, abs=0.02)
        resumed = trainer(gpt2(seed=5), tmp_path / "b", METHODS[method]())
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert_same(
        [{**resumed.model.state_dict()}, resumed.sparsifier.state_dict()],
        [{**unbroken.model.state_dict()}, unbroken.sparsifier.state_dict()],
    )
    # The last checkpoint and what save_model writes are ordinary, with exact zeros, and go on.
    unbroken.save_model(str(tmp_path / "c"))
    finalized = unbroken.sparsifier.finalized_state_dict()
    for folder in (tmp_path / "a" / "checkpoint-12", tmp_path / "c"):
        written = load_file(folder / "model.safetensors")
        assert_same(written, {key: finalized[key] for key in written})
    model, sparsifier = ts.load(tmp_path / "c", GPT2LMHeadModel)
    assert sparsifier.step == 12
    assert_same({**model.state_dict()}, {**unbroken.model.state_dict()})


@pytest.mark.parametrize("method", METHODS)
def test_the_best_model_is_evaluated_under_its_own_views(gpt2: Build, tmp_path: Path, method: str) -> None:
    scores = iter([0.0, 1.0, 0.0, 0.0, 0.0])
    run = trainer(
        gpt2(), tmp_path, METHODS[method](), eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True, compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another sparsity than at the end
        run.train()
    assert run.state.best_model_checkpoint is not None and run.state.best_model_checkpoint.endswith("-6")
    best = next(entry["eval_loss"] for entry in run.state.log_history if entry["step"] == 6 and "eval_loss" in entry)
    assert run.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-5)
    assert run.sparsifier.step == 6


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_thresholds_get_a_group_of_their_own_in_every_optimizer(gpt2: Build, tmp_path: Path, optim: str) -> None:
    method = AutoSparse(sparsity=0.5, threshold_lr_scale=0.5, threshold_weight_decay=0.1)
    run = trainer(gpt2(), tmp_path, method, optim=optim, weight_decay=0.01, max_steps=12)
    run.train()
    thresholds = {id(layer.threshold) for layer in run.sparsifier.layers.values()}
    groups = [{id(p) for p in group["params"]} for group in run.optimizer.param_groups]
    assert [group & thresholds for group in groups] == [set(), set(), thresholds] and groups[2] == thresholds
    assert run.optimizer.param_groups[2]["weight_decay"] == 0.0
    assert run.optimizer.param_groups[2]["initial_lr"] == pytest.approx(5e-3)
    held = [identity for group in groups for identity in group]
    assert len(held) == len(set(held)) == sum(p.requires_grad for p in run.model.parameters())


@pytest.mark.parametrize("stock", [False, True])
def test_a_model_without_save_pretrained_is_saved_with_zeros_and_resumed(tmp_path: Path, stock: bool) -> None:
    class Plain(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.layers(x)
            return {"loss": (y - labels).square().mean(), "logits": y}

    data = [{"x": torch.full((8,), float(i)), "labels": torch.arange(8.0)} for i in range(12)]
    runs = []
    for seed, options in ((0, {}), (3, {"resume_from_checkpoint": str(tmp_path / "checkpoint-6")})):
        model, args = Plain(seed), arguments(tmp_path)
        if stock:
            sparsifier = ts.sparsify(model, STR(sparsity=0.5), total_steps=12, steps_per_epoch=3)
            optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=1e-2))
            callback = ts.SparsityCallback(sparsifier, resume_from=options.get("resume_from_checkpoint"))
            parts: dict[str, Any] = {"callbacks": [callback], "optimizers": (optimizer, None)}
            run: Any = Trainer(model, args, train_dataset=data, **parts)
        else:
            run = ts.SparseTrainer(model, args, train_dataset=data, method=STR(sparsity=0.5))
            sparsifier = run.sparsifier
        run.train(**options)
        runs.append(run)
    assert_same({**runs[1].model.state_dict()}, {**runs[0].model.state_dict()})
    runs[0].save_model(str(tmp_path / "saved"))
    # Both runs ended in the same place.
    finalized = sparsifier.finalized_state_dict()
    assert_same(load_file(tmp_path / "saved" / "model.safetensors"), finalized)
    assert any(bool((weight == 0).any()) for weight in finalized.values())


def test_sequences_to_sequences(marian: Build, tmp_path: Path) -> None:
    data = [{"input_ids": torch.arange(3, 9), "attention_mask": torch.ones(6), "labels": torch.arange(4, 10)}] * 8
    args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True)
    run = ts.SparseSeq2SeqTrainer(marian(), args, train_dataset=data, eval_dataset=data[:2], method="gmp", sparsity=0.5)
    run.train()
    assert run.sparsifier.sparsity() == pytest.approx(0.5, abs=0.01) and "eval_loss" in run.evaluate()
    run.save_model(str(tmp_path / "saved"))
    zeros = {name: layer.effective_weight() == 0 for name, layer in run.sparsifier.layers.items()}
    stock = MarianMTModel.from_pretrained(tmp_path / "saved")
    assert_same({name: stock.get_submodule(name).weight == 0 for name in zeros}, zeros)


def test_what_does_not_fit_is_refused(gpt2: Build, tmp_path: Path) -> None:
    model = gpt2()
    for options, words in (
        ({}, "expected method= or sparsifier=, got neither"),
        ({"method": "gmp", "sparsifier": object()}, "got both"),
        ({"sparsifier": ts.sparsify(gpt2(), "static", sparsity=0.5)}, "of this model, got one of another"),
    ):
        with pytest.raises(ValueError, match=f"SparseTrainer: expected .*{words}|{words}"):
            ts.SparseTrainer(model, arguments(tmp_path), train_dataset=DATA, **options)
    with pytest.raises(ValueError, match="SparseTrainer: expected model=, got none"):
        ts.SparseTrainer(args=arguments(tmp_path), model_init=gpt2, method="gmp", sparsity=0.5, train_dataset=DATA)
    sparsifier = ts.sparsify(model, "gmp", sparsity=0.5, total_steps=1000)
    run = ts.SparseTrainer(model, arguments(tmp_path), train_dataset=DATA, sparsifier=sparsifier)
    with pytest.raises(ValueError, match="expected total_steps of the run, 12, got a Sparsifier of 1000"):
        run.train()
    assert sparsifier.step == 0


def test_a_stopped_run_says_what_it_missed(gpt2: Build, tmp_path: Path) -> None:
    run = trainer(gpt2(), tmp_path, GMP(sparsity=0.7, update_every=2))
    stop = copy.copy(run.callback_handler.callbacks[0])
    stop.on_step_end = lambda args, state, control, **_: setattr(
        control, "should_training_stop", state.global_step == 4
    )
    run.add_callback(stop)
    with pytest.warns(
        UserWarning, match="SparsityCallback: expected a sparsity of 0.7 .* the run stopped at step 4 of 12"
    ):
        run.train()
