"""The clock counts real optimizer steps; what may be attached; and the state, refused where it does not fit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_runs import Build, Optimizers, Run, assert_same, squares
from torch import nn

import tritonsparse as ts
from tritonsparse.clock import Clock
from tritonsparse.methods import GMP, STR, AutoSparse, Static

OPTIMIZERS: Optimizers = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "sgd fused": lambda groups: torch.optim.SGD(groups, momentum=0.9, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, fused=True),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
METHOD = AutoSparse(threshold_init=-2.0, alpha_schedule="linear", threshold_weight_decay=0.25)


def start(build: Build, method: Any = METHOD, optimizer: str = "sgd") -> Run:
    rates = {"lr": 0.1, "weight_decay": 0.01}
    return Run(build().eval(), method, OPTIMIZERS[optimizer], total_steps=8, steps_per_epoch=2, groups=rates)


@every_optimizer
@pytest.mark.parametrize("method", [METHOD, GMP(sparsity=0.8, update_every=1)], ids=["autosparse", "gmp"])
def test_a_step_that_the_scaler_skips_is_not_one(mlp: Build, method: Any, optimizer: str) -> None:
    run = start(mlp, method, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    steps, kept = [], []
    for poison in (False, True, True, False):
        scaler.scale(squares(run.model)).backward()
        if poison:
            run.model[0].weight.grad[0, 0] = float("inf")
        weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        scaler.step(run.optimizer)
        scaler.update()
        assert all(torch.equal(p, weights[name]) for name, p in run.model.named_parameters()) == poison
        run.optimizer.zero_grad()
        steps.append(run.sparsifier.step)
        kept.append(run.sparsifier.layers["0"].kept_count())
    assert steps == [1, 1, 1, 2] and kept[0] == kept[1] == kept[2] != kept[3]


@every_optimizer
@pytest.mark.parametrize("unscale_first", [False, True], ids=["scaled", "unscaled first"])
def test_the_loss_scale_reaches_neither_weights_nor_thresholds(mlp: Build, optimizer: str, unscale_first: bool) -> None:
    results = []  # a power of two scales exactly
    for enabled in (False, True):
        run = start(mlp, METHOD, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for step in range(4):
            torch.manual_seed(step)
            scaler.scale(squares(run.model)).backward()
            if unscale_first:
                scaler.unscale_(run.optimizer)
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
        results.append({**run.model.state_dict()})
    assert_same(*results)


def test_accumulation_micro_steps_are_not_steps(mlp: Build, accelerator: Accelerator, tmp_path: Path) -> None:
    sparsifier = ts.sparsify(mlp(), METHOD, total_steps=8, steps_per_epoch=2)
    loader = torch.utils.data.DataLoader([torch.randn(8) for _ in range(6)], batch_size=1)
    optimizer: Any = torch.optim.AdamW(sparsifier.param_groups(lr=0.1))
    model, optimizer, loader = accelerator.prepare(sparsifier.model, optimizer, loader)
    sparsifier.attach(optimizer)  # accelerate's wrapper
    steps = []
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        steps.append(sparsifier.step)
    assert steps == [0, 1, 1, 2, 2, 3]
    sparsifier.attach(optimizer.optimizer)  # the same one, unwrapped: nothing to do
    optimizer.optimizer.step()
    assert sparsifier.step == 4
    # A folder without a state is named.
    accelerator.save_state(str(tmp_path))
    sparsifier.register(accelerator)
    with pytest.raises(FileNotFoundError, match="resume from a checkpoint of a sparse run"):
        accelerator.load_state(str(tmp_path))


def test_attached_twice_counts_once_and_a_second_optimizer_waits_until_the_first_is_let_go(mlp: Build) -> None:
    run, steps = start(mlp), []
    sparsifier, second = run.sparsifier, torch.optim.SGD(run.sparsifier.param_groups(lr=0.1))
    with pytest.raises(ValueError, match="expected one optimizer, got a second one; call detach"):
        sparsifier.attach(second)
    for change, optimizer in (
        *((lambda: None, second), (lambda: sparsifier.attach(run.optimizer), run.optimizer)),
        *((sparsifier.detach, run.optimizer), (lambda: sparsifier.attach(second), second)),
    ):
        change()
        optimizer.step()
        steps.append(sparsifier.step)
    assert steps == [0, 1, 1, 2]


def test_an_optimizer_that_does_not_fit_is_refused_by_the_layers_name(mlp: Build) -> None:
    sparsifier, other = ts.sparsify(mlp(), STR()), ts.sparsify(mlp(), GMP(sparsity=0.5), total_steps=4)
    *weights, thresholds = sparsifier.param_groups(lr=0.1)
    first = thresholds | {"params": thresholds["params"][:1]}
    cases: Any = (
        (sparsifier, [*weights, first], r"got none for 3 and 0 more; build the optimizer from.*param_groups"),
        (sparsifier, weights, r"got none for 0 and 1 more"),
        (sparsifier, sparsifier.model.parameters(),
         r"got (0|3)\.threshold in group 0 among other parameters; build the opt"),
        (other, mlp().parameters(), "hold every sparse layer's weight, got none for 0 and 1 more of 2; attach"),
    )  # fmt: skip
    for owner, parameters, words in cases:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        with pytest.raises(ValueError, match=words):
            owner.attach(optimizer)
        optimizer.step()
        assert owner.step == 0
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got tuple; pass the optimizer that"):
        sparsifier.attach([()])


def test_param_groups_hold_every_trainable_parameter_once(marian: Build, mlp: Build) -> None:
    model = marian()
    model.model.encoder.layers[0].fc1.weight.requires_grad_(False)
    sparsifier = ts.sparsify(model, STR())
    groups = {group["name"]: group for group in sparsifier.param_groups(lr=0.1, weight_decay=0.3, eps=1e-6)}
    decays = {name: (group["weight_decay"], group["eps"]) for name, group in groups.items()}
    assert decays == {"decay": (0.3, 1e-6), "no_decay": (0.0, 1e-6), "thresholds": (0.3, 1e-6)}
    held = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    thresholds = [id(layer.threshold) for layer in sparsifier.layers.values()]
    assert [id(parameter) for parameter in groups["thresholds"]["params"]] == thresholds
    assert all(parameter.dim() == 1 for parameter in groups["no_decay"]["params"])
    with pytest.raises(ValueError, match=r"expected lr= .*6.0.*call param_groups\(lr=...\)"):
        ts.sparsify(mlp(), STR(threshold_lr_scale=6.0)).param_groups(weight_decay=0.1)


def test_epochs_are_whole_steps_and_an_unfinished_last_epoch_counts() -> None:
    clocks = [Clock(step, 10, 4) for step in range(10)]
    assert [(clock.epoch, clock.at_epoch_start) for clock in clocks] == [(i // 4, i % 4 == 0) for i in range(10)]
    assert clocks[0].total_epochs == 3 and Clock(5).epoch == 0 and Clock(5, 10).total_epochs == 0


MASKED = GMP(sparsity=0.5, initial_sparsity=0.25)


def sparse(model: nn.Module, method: Any = MASKED, **changes: Any) -> ts.Sparsifier:
    return ts.sparsify(model, method, **{"total_steps": 10, "steps_per_epoch": 5, **changes})


ANOTHER = "sparsify the model with the arguments"
# What is loaded: the state of another Sparsifier, or ours with one entry set (or, by None, left out).
REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "method": ({"method": STR()}, (ANOTHER, "method", "'gmp'", "'str'")),
    "configuration": ({"method": GMP(sparsity=0.6, initial_sparsity=0.25)}, (ANOTHER, "gmp.", "0.6")),
    "layers": ({"exclude": ["3"]}, (ANOTHER, "layers", "'3'")),
    "total_steps": ({"total_steps": 11}, (ANOTHER, "total_steps", "10", "11")),
    "steps_per_epoch": ({"steps_per_epoch": 4}, (ANOTHER, "steps_per_epoch", "5", "4")),
    "shapes": ({"model": nn.Sequential(nn.Linear(8, 9), *[nn.ReLU()] * 2, nn.Linear(9, 4))}, (ANOTHER, "0.mask")),
    "version": (("format_version", 0), ()), "mask missing": (("tensors", "0.mask", None), ()),
    "kind without its tensor": (("kinds", "0", "soft"), ()), "unknown kind": (("kinds", "0", "fancy"), ()),
    "stray tensor": (("tensors", "7.mask", torch.ones(2, 2).bool()), ()), "key missing": (("step", None), ()),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_of_another_run_and_a_damaged_one_are_refused_and_nothing_changed(mlp: Build, case: str) -> None:
    (change, words), sparsifier = REFUSED[case], sparse(mlp())
    before = sparsifier.state_dict()
    if isinstance(change, dict):
        state: Any = sparse(**{"model": mlp(), **change}).state_dict()
    else:
        state, (*path, key, value) = copy.deepcopy(before), change
        inner = state[path[0]] if path else state
        inner.pop(key, None)
        inner |= {} if value is None else {key: value}
    with pytest.raises(ValueError) as caught:
        sparsifier.load_state_dict(state)
    assert [word for word in ("load_state_dict: expected", *words) if word not in str(caught.value)] == []
    assert_same(sparsifier.state_dict(), before)


def test_a_state_is_a_copy_that_training_does_not_change_without_weights_and_thresholds(mlp: Build) -> None:
    sparsifier = sparse(mlp())
    saved = sparsifier.state_dict()
    mask = saved["tensors"]["0.mask"].clone()
    for _ in range(2):
        sparsifier.layers["0"].mask.fill_(False)
        assert torch.equal(saved["tensors"]["0.mask"], mask)
        sparsifier.load_state_dict(saved)
    saved = sparse(mlp(), AutoSparse(backward_density=0.5)).state_dict()
    assert saved["tensors"].keys() == {"0.grad_mask", "0.alpha", "3.grad_mask", "3.alpha"}


def test_finalize_uses_the_sparsifier_up_and_warns_where_nothing_is_baked_in(mlp: Build, tmp_path: Path) -> None:
    run = Run(mlp(), "str")
    sparsifier, state = run.sparsifier, run.sparsifier.state_dict()
    sparsifier.finalize()
    arguments = {"load_state_dict": [state], "save_pretrained": [tmp_path], "attach": [run.optimizer]}
    for name in (
        *("finalize", "sparsity", "report", "state_dict", "load_state_dict", "finalized_state_dict", "param_groups"),
        *("trained_state_dict", "save_pretrained", "attach", "compact", "expand", "refresh"),
    ):
        call: Callable[..., Any] = getattr(sparsifier, name)
        with pytest.raises(RuntimeError, match=f"{name}: expected a live Sparsifier.*sparsify the model again"):
            call(*arguments.get(name, []))
    run.optimizer.step()  # the hooks are gone: nothing happens
    assert sparsifier.step == 0
    with pytest.warns(UserWarning, match="every layer dense under method 'str'"):
        sparse(mlp(), STR(threshold_init=-float("inf"))).finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse(mlp(), "dense").finalize()
        sparse(mlp(), Static(sparsity=0.5)).finalize()
