"""Zeros outside a stored mask: bit for bit those of writing them after every step, with hardly any writing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_optimizers import OPTIMIZERS
from small_runs import Run, assert_same, squares
from torch import Tensor, nn

from tritonsparse import held_zeros
from tritonsparse.methods import GMP, SET, SNFS, Method, RigL, Static

METHODS: dict[str, Method] = {
    "static": Static(sparsity=0.5),
    "rigl": RigL(sparsity=0.5, update_every=3),
    "set": SET(sparsity=0.5, update_every=3),
    "gmp": GMP(sparsity=0.5),
}


def start(method: Method | str = "static", optimizer: str = "adamw fused") -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    chosen = METHODS[method] if isinstance(method, str) else method
    return Run(model, chosen, OPTIMIZERS[optimizer], include=["*"], groups={})


def outside(run: Run) -> float:
    """The largest weight, or state that the Sparsifier clears, outside a mask; NaN where one is."""
    found = [0.0]
    for layer in run.sparsifier.layers.values():
        state = run.optimizer.state[layer.weight].values()
        for each in (layer.weight, *(s for s in state if torch.is_tensor(s) and s.shape == layer.weight.shape)):
            found += each.detach()[~layer.mask].abs().tolist()
    return torch.tensor(found).max().item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_and_state_are_those_of_writing_zeros_after_every_step(
    method: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(method, optimizer)
    for _ in range(11):
        run.train(1)
        assert outside(run) == 0.0
    monkeypatch.setattr(held_zeros, "PRESERVING", ())
    assert_same(run.state(), start(method, optimizer).train(11).state())


def test_momentum_that_a_method_keeps_outside_its_masks_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for preserving in (held_zeros.PRESERVING, ()):
        monkeypatch.setattr(held_zeros, "PRESERVING", preserving)
        run = start(SNFS(sparsity=0.5, update_every=3), "nesterov").train(5)
        results.append(run.optimizer.state[run.model[0].weight]["momentum_buffer"])
    assert torch.equal(*results)
    assert (results[0] != 0).float().mean() > 0.9


# Adam's update without eps is 0 / 0, and an infinite rate times 0 is no number either.
@pytest.mark.parametrize(("field", "value"), [("eps", 0.0), ("lr", float("inf"))])
def test_an_update_that_makes_nan_of_zeros_leaves_none_behind(field: str, value: float) -> None:
    run = start().train(2)
    run.optimizer.param_groups[0][field] = value
    assert outside(run.train(1)) == 0.0


def test_the_zeros_of_state_are_written_once_and_left_alone_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    clear = held_zeros.clear_state
    monkeypatch.setattr(held_zeros, "clear_state", lambda *args: (written.append(1), clear(*args)))
    run = start()
    for steps in (1, 6):
        run.train(steps)
        assert len(written) == len(run.sparsifier.layers)


def noise(run: Run) -> None:
    for parameter in run.model.parameters():
        parameter.grad.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))


def edit(run: Run) -> None:
    with torch.no_grad():
        run.model[0].weight.add_(0.5)


def write_through_data(run: Run) -> None:
    run.model[0].weight.data.fill_(1.0)


def load(run: Run) -> None:
    run.model.load_state_dict({name: torch.ones_like(value) for name, value in run.model.state_dict().items()})


def write_state(run: Run) -> None:
    for value in run.optimizer.state[run.model[0].weight].values():
        if torch.is_tensor(value) and value.dim() == 2:
            value.fill_(1.0)


@pytest.mark.parametrize("optimizer", ["adamw fused", "nesterov", "sgd with decay", "adagrad"])
@pytest.mark.parametrize("disturb", [noise, edit, write_through_data, load, write_state])
def test_what_a_user_does_between_gradients_and_step_leaves_nothing_behind(
    optimizer: str, disturb: Callable[[Run], None]
) -> None:
    run = start(optimizer=optimizer).train(3)
    run.before_step = lambda: disturb(run)
    assert outside(run.train(1)) == 0.0
    run.before_step = lambda: None
    assert outside(run.train(1)) == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", ["adamw fused", "nesterov"])
def test_a_closure_that_makes_the_gradients_anew_leaves_nothing_behind(method: str, optimizer: str) -> None:
    run = start(method, optimizer)

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = squares(run.model)
        loss.backward()
        noise(run)
        return loss

    for _ in range(8):
        run.optimizer.step(closure)
        assert outside(run) == 0.0


def test_a_hook_after_ours_leaves_nothing_behind() -> None:
    run = start()
    run.optimizer.register_step_pre_hook(lambda *_: noise(run))
    assert outside(run.train(5)) == 0.0
