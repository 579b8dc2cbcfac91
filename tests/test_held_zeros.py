"""Zeros outside a stored mask: bit for bit those of writing them after every step, with hardly any writing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse import held_zeros

optim = torch.optim
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: optim.SGD(groups, lr=0.1),
    "nesterov": lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "sgd with decay": lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam amsgrad": lambda groups: optim.Adam(groups, lr=0.01, amsgrad=True),
    "adam with decay": lambda groups: optim.Adam(groups, lr=0.01, weight_decay=0.1),
    "adamw fused": lambda groups: optim.AdamW(groups, lr=0.01, fused=True),
    "adamw foreach": lambda groups: optim.AdamW(groups, lr=0.01, foreach=True),
    "nadam": lambda groups: optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: optim.RAdam(groups, lr=0.01),
    "adagrad": lambda groups: optim.Adagrad(groups, lr=0.01, initial_accumulator_value=0.1),
    "adadelta": lambda groups: optim.Adadelta(groups, lr=0.5),
    "rmsprop": lambda groups: optim.RMSprop(groups, lr=0.01, centered=True, momentum=0.5),
    # Not among those that are known to leave zeros alone.
    "adamax": lambda groups: optim.Adamax(groups, lr=0.01),
}
METHODS = {
    "static": lambda: ts.methods.Static(sparsity=0.5),
    "rigl": lambda: ts.methods.RigL(sparsity=0.5, update_every=3),
    "set": lambda: ts.methods.SET(sparsity=0.5, update_every=3),
    "gmp": lambda: ts.methods.GMP(sparsity=0.5),
}


def start(method: ts.methods.Method, optimizer: str) -> tuple[nn.Module, ts.Sparsifier, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    sparsifier = ts.sparsify(model, method, total_steps=12, include=["*"])
    made = OPTIMIZERS[optimizer](sparsifier.param_groups())
    sparsifier.attach(made)
    return model, sparsifier, made


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, disturb: Callable[[int], None]) -> None:
    random = torch.Generator().manual_seed(1)
    for number in range(steps):
        x, y = torch.randn(8, 12, generator=random), torch.randn(8, 4, generator=random)
        nn.functional.mse_loss(model(x), y).backward()
        disturb(number)
        optimizer.step()
        optimizer.zero_grad()


def outside(sparsifier: ts.Sparsifier, optimizer: torch.optim.Optimizer) -> float:
    """The largest weight, or state that Sparsifier clears, outside a mask; NaN where one is."""
    found = [0.0]
    for layer in sparsifier.layers.values():
        state = optimizer.state[layer.weight].values()
        for each in (layer.weight, *(s for s in state if torch.is_tensor(s) and s.shape == layer.weight.shape)):
            found += each.detach()[~layer.mask].abs().tolist()
    return torch.tensor(found).max().item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_and_state_are_those_of_writing_zeros_after_every_step(
    method: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for always in (False, True):
        model, sparsifier, made = start(METHODS[method](), optimizer)
        with monkeypatch.context() as patch:
            if always:
                patch.setattr(held_zeros, "PRESERVING", ())
            train(model, made, 11, lambda number: None)
        state = [value for each in made.state.values() for value in each.values() if torch.is_tensor(value)]
        results.append([*(p.detach() for p in model.parameters()), *state])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    assert outside(sparsifier, made) == 0.0


def test_momentum_that_a_method_keeps_outside_its_masks_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for preserving in (held_zeros.PRESERVING, ()):
        monkeypatch.setattr(held_zeros, "PRESERVING", preserving)
        model, _, made = start(ts.methods.SNFS(sparsity=0.5, update_every=3), "nesterov")
        train(model, made, 5, lambda number: None)
        results.append(made.state[model[0].weight]["momentum_buffer"])
    assert torch.equal(*results)
    assert (results[0] != 0).float().mean() > 0.9


def test_an_update_that_makes_nan_of_zeros_leaves_none_behind() -> None:
    # Adam's update without eps is 0 / 0, and an infinite rate times 0 is no number either.
    for field, value in (("eps", 0.0), ("lr", float("inf"))):
        model, sparsifier, made = start(METHODS["static"](), "adamw fused")
        train(model, made, 2, lambda number: None)
        made.param_groups[0][field] = value
        train(model, made, 1, lambda number: None)
        assert outside(sparsifier, made) == 0.0


def test_the_zeros_of_state_are_written_once_and_left_alone_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    clear = held_zeros.clear_state
    monkeypatch.setattr(held_zeros, "clear_state", lambda *args: (written.append(1), clear(*args)))
    model, sparsifier, optimizer = start(METHODS["static"](), "adamw fused")
    train(model, optimizer, 1, lambda number: None)
    assert len(written) == len(sparsifier.layers)
    train(model, optimizer, 6, lambda number: None)
    assert len(written) == len(sparsifier.layers)


def noise(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))


def edit(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.add_(0.5)


@pytest.mark.parametrize("optimizer", ["adamw fused", "nesterov", "sgd with decay", "adagrad"])
@pytest.mark.parametrize("disturbance", [noise, edit], ids=["noise in the gradients", "an edit of a weight"])
def test_what_a_user_does_to_gradients_and_weights_leaves_no_pruned_weight_behind(
    optimizer: str, disturbance: Callable[[nn.Module], None]
) -> None:
    model, sparsifier, made = start(METHODS["static"](), optimizer)
    train(model, made, 5, lambda number: disturbance(model) if number == 3 else None)
    assert outside(sparsifier, made) == 0.0


def test_state_that_is_loaded_or_written_to_leaves_nothing_behind() -> None:
    model, sparsifier, made = start(METHODS["static"](), "adamw fused")
    train(model, made, 2, lambda number: None)
    made.state[model[0].weight]["exp_avg"].fill_(1.0)
    train(model, made, 1, lambda number: None)
    assert outside(sparsifier, made) == 0.0
    model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()})
    train(model, made, 1, lambda number: None)
    assert outside(sparsifier, made) == 0.0


def test_a_write_through_data_leaves_nothing_behind() -> None:
    model, sparsifier, made = start(METHODS["static"](), "adamw fused")
    train(model, made, 2, lambda number: None)
    model[0].weight.data.fill_(1.0)
    train(model, made, 1, lambda number: None)
    assert outside(sparsifier, made) == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", ["adamw fused", "nesterov"])
def test_a_closure_that_makes_the_gradients_anew_leaves_nothing_behind(method: str, optimizer: str) -> None:
    model, sparsifier, made = start(METHODS[method](), optimizer)
    random = torch.Generator().manual_seed(1)

    def closure() -> torch.Tensor:
        made.zero_grad()
        loss = model(torch.randn(8, 12, generator=random)).square().mean()
        loss.backward()
        noise(model)
        return loss

    for _ in range(8):
        made.step(closure)
        assert outside(sparsifier, made) == 0.0


def test_a_hook_after_ours_leaves_nothing_behind() -> None:
    model, sparsifier, made = start(METHODS["static"](), "adamw fused")
    made.register_step_pre_hook(lambda *_: noise(model))
    train(model, made, 5, lambda number: None)
    assert outside(sparsifier, made) == 0.0
