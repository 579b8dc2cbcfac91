"""The clock counts real optimizer steps: not skipped ones, not accumulation micro-steps; and what may be attached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_runs import Build, Optimizers, Run, assert_same, squares

import tritonsparse as ts
from tritonsparse.clock import Clock
from tritonsparse.methods import GMP, STR, AutoSparse

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
    assert steps == [1, 1, 1, 2]
    assert kept[0] == kept[1] == kept[2] != kept[3]


@every_optimizer
@pytest.mark.parametrize("unscale_first", [False, True], ids=["scaled", "unscaled first"])
def test_the_loss_scale_reaches_neither_weights_nor_thresholds(mlp: Build, optimizer: str, unscale_first: bool) -> None:
    """A power of two scales exactly: the run is the same to the last bit, decay of the thresholds included."""
    results = []
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


def test_accumulation_micro_steps_are_not_steps(mlp: Build, accelerator: Accelerator) -> None:
    model = mlp()
    sparsifier = ts.sparsify(model, METHOD, total_steps=8, steps_per_epoch=2)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=0.1))
    loader = torch.utils.data.DataLoader([torch.randn(8) for _ in range(6)], batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
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


def test_attached_twice_counts_once_and_detached_counts_no_more(mlp: Build) -> None:
    run = start(mlp)
    run.sparsifier.attach(run.optimizer)
    run.optimizer.step()
    assert run.sparsifier.step == 1
    run.sparsifier.detach()
    run.optimizer.step()
    assert run.sparsifier.step == 1


def test_a_second_optimizer_is_refused_until_the_first_is_let_go(mlp: Build) -> None:
    sparsifier = start(mlp).sparsifier
    second = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    with pytest.raises(ValueError, match="expected one optimizer, got a second one; call detach"):
        sparsifier.attach(second)
    second.step()
    assert sparsifier.step == 0
    sparsifier.detach()
    sparsifier.attach(second)
    second.step()
    assert sparsifier.step == 1


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a threshold is missing": (
        lambda s, groups, model: torch.optim.SGD([*groups[:-1], groups[-1] | {"params": groups[-1]["params"][:1]}]),
        ValueError, r"got none for 3 and 0 more; build the optimizer from.*param_groups"),
    "both are missing": (
        lambda s, groups, model: torch.optim.SGD(groups[:-1]), ValueError, r"got none for 0 and 1 more"),
    "thresholds among the weights": (
        lambda s, groups, model: torch.optim.AdamW(s.model.parameters()),
        ValueError, r"got (0|3)\.threshold in group 0 among other parameters; build the opt"),
    "another model's": (
        lambda s, groups, model: torch.optim.SGD(model.parameters()),
        ValueError, "hold the sparse layers' weights, got none of them; attach the optimizer"),
    "no optimizer": (
        lambda s, groups, model: [], TypeError, r"expected a torch.optim.Optimizer, got list; pass the optimizer that"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_optimizer_that_does_not_fit_is_refused_by_the_layers_name(mlp: Build, case: str) -> None:
    make, error, words = REFUSED[case]
    sparsifier = ts.sparsify(mlp(), GMP(sparsity=0.5) if case == "another model's" else STR(), total_steps=4)
    optimizer = make(sparsifier, sparsifier.param_groups(lr=0.1), mlp())
    with pytest.raises(error, match=words):
        sparsifier.attach(optimizer)
    if optimizer:
        optimizer.step()
    assert sparsifier.step == 0


def test_param_groups_hold_every_trainable_parameter_once(marian: Build) -> None:
    model = marian()
    model.model.encoder.layers[0].fc1.weight.requires_grad_(False)
    sparsifier = ts.sparsify(model, STR())
    groups = {group["name"]: group for group in sparsifier.param_groups(lr=0.1, weight_decay=0.3, eps=1e-6)}
    assert {name: (group["weight_decay"], group["eps"]) for name, group in groups.items()} == {
        "decay": (0.3, 1e-6),
        "no_decay": (0.0, 1e-6),
        "thresholds": (0.3, 1e-6),
    }
    held = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    thresholds = [id(layer.threshold) for layer in sparsifier.layers.values()]
    assert [id(parameter) for parameter in groups["thresholds"]["params"]] == thresholds
    assert all(parameter.dim() == 1 for parameter in groups["no_decay"]["params"])


def test_a_scaled_threshold_rate_needs_the_rate_it_scales(mlp: Build) -> None:
    sparsifier = ts.sparsify(mlp(), STR(threshold_lr_scale=6.0))
    with pytest.raises(ValueError, match=r"expected lr= .*6.0.*call param_groups\(lr=...\)"):
        sparsifier.param_groups(weight_decay=0.1)


def test_epochs_are_whole_steps_and_an_unfinished_last_epoch_counts() -> None:
    clock = Clock(0, 10, 4)
    epochs = []
    for step in range(10):
        clock.step = step
        epochs.append((clock.epoch, clock.at_epoch_start))
    assert epochs == [(i // 4, i % 4 == 0) for i in range(10)]
    assert clock.total_epochs == 3
    assert Clock(5).epoch == 0 and Clock(5, 10).total_epochs == 0
