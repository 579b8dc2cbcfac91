"""The clock counts real optimizer steps: not skipped ones, not accumulation micro-steps; and what may be attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim import Optimizer

import tritonsparse as ts
from tritonsparse.clock import Clock
from tritonsparse.methods import GMP, STR, AutoSparse

Build = Callable[..., Any]

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "sgd fused": lambda groups: torch.optim.SGD(groups, momentum=0.9, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, fused=True),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
METHOD = AutoSparse(threshold_init=-2.0, alpha_schedule="linear", threshold_weight_decay=0.25)


def start(model: nn.Module, method: Any, optimizer: Callable[[Any], Optimizer]) -> tuple[ts.Sparsifier, Optimizer]:
    sparsifier = ts.sparsify(model, method, total_steps=8, steps_per_epoch=2)
    built = optimizer(sparsifier.param_groups(lr=0.1, weight_decay=0.01))
    sparsifier.attach(built)
    return sparsifier, built


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()


@every_optimizer
@pytest.mark.parametrize("method", [METHOD, GMP(sparsity=0.8, update_every=1)], ids=["autosparse", "gmp"])
def test_a_step_that_the_scaler_skips_is_not_one(
    mlp: Build, method: Any, optimizer: Callable[[Any], Optimizer]
) -> None:
    model = mlp().eval()
    sparsifier, built = start(model, method, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    steps, kept = [], []
    for step, poison in enumerate([False, True, True, False]):
        scaler.scale(loss_of(model, step)).backward()
        if poison:
            model[0].weight.grad[0, 0] = float("inf")
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        scaler.step(built)
        scaler.update()
        unmoved = all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
        assert unmoved == poison
        built.zero_grad()
        steps.append(sparsifier.step)
        kept.append(sparsifier.layers["0"].kept_count())
    assert steps == [1, 1, 1, 2]
    assert kept[0] == kept[1] == kept[2] != kept[3]


@every_optimizer
@pytest.mark.parametrize("unscale_first", [False, True], ids=["scaled", "unscaled first"])
def test_the_loss_scale_reaches_neither_weights_nor_thresholds(
    mlp: Build, optimizer: Callable[[Any], Optimizer], unscale_first: bool
) -> None:
    """A power of two scales exactly: the run is the same to the last bit, decay of the thresholds included."""
    results = []
    for enabled in (False, True):
        model = mlp().eval()
        _, built = start(model, METHOD, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for step in range(4):
            scaler.scale(loss_of(model, step)).backward()
            if unscale_first:
                scaler.unscale_(built)
            scaler.step(built)
            scaler.update()
            built.zero_grad()
        results.append(model.state_dict())
    assert [key for key in results[0] if not torch.equal(results[0][key], results[1][key])] == []


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


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
    sparsifier, optimizer = start(mlp(), METHOD, OPTIMIZERS["sgd"])
    sparsifier.attach(optimizer)
    optimizer.step()
    assert sparsifier.step == 1
    sparsifier.detach()
    optimizer.step()
    assert sparsifier.step == 1


def test_a_second_optimizer_is_refused_until_the_first_is_let_go(mlp: Build) -> None:
    sparsifier, _ = start(mlp(), METHOD, OPTIMIZERS["sgd"])
    second = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    with pytest.raises(ValueError, match="expected one optimizer, got a second one; call detach"):
        sparsifier.attach(second)
    second.step()
    assert sparsifier.step == 0
    sparsifier.detach()
    sparsifier.attach(second)
    second.step()
    assert sparsifier.step == 1


def test_an_optimizer_without_a_threshold_is_refused_by_the_layers_name(mlp: Build) -> None:
    sparsifier = ts.sparsify(mlp(), STR())
    groups = sparsifier.param_groups(lr=0.1)
    groups[-1]["params"] = groups[-1]["params"][:1]
    with pytest.raises(ValueError, match=r"got none for 3 and 0 more; build the optimizer from.*param_groups"):
        sparsifier.attach(torch.optim.SGD(groups))
    with pytest.raises(ValueError, match=r"got none for 0 and 1 more"):
        sparsifier.attach(torch.optim.SGD(groups[:-1]))


def test_a_threshold_in_the_weights_group_is_refused_by_the_layers_name(mlp: Build) -> None:
    model = mlp()
    sparsifier = ts.sparsify(model, STR())
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"got (0|3)\.threshold in group 0 among other parameters; build the opt"):
        sparsifier.attach(optimizer)
    optimizer.step()
    assert sparsifier.step == 0


def test_an_optimizer_of_another_model_and_what_is_none_are_refused(mlp: Build) -> None:
    sparsifier = ts.sparsify(mlp(), GMP(sparsity=0.5), total_steps=4)
    with pytest.raises(ValueError, match="hold the sparse layers' weights, got none of them; attach the optimizer"):
        sparsifier.attach(torch.optim.SGD(mlp().parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got list; pass the optimizer that"):
        sparsifier.attach([])


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
