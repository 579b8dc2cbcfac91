"""Every optimizer: zeros outside stored masks are those of writing them after every step, and its state is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import Optimizers, Run, assert_same, squares
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam
from transformers.optimization import Adafactor

from tritonsparse import held_zeros
from tritonsparse.methods import GMP, SET, SNFS, Method, RigL, Static
from tritonsparse.optimizer_state import learning_rate, momentum, reset_state

# Those that people train with, those that keep state of other shapes than the weight's too.
OPTIMIZERS: Optimizers = {
    "sgd": lambda groups: SGD(groups, lr=0.1),
    "nesterov": lambda groups: SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "sgd with decay": lambda groups: SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam amsgrad": lambda groups: Adam(groups, lr=0.01, amsgrad=True),
    "adam with decay": lambda groups: Adam(groups, lr=0.01, weight_decay=0.1),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "adagrad": lambda groups: Adagrad(groups, lr=0.01, initial_accumulator_value=0.1),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.5),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, centered=True, momentum=0.5),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "adafactor of torch": lambda groups: torch.optim.Adafactor(groups, lr=0.05),
    "adafactor of transformers": lambda groups: Adafactor(groups, lr=0.05, relative_step=False, beta1=0.9),
}
METHODS: dict[str, Method] = {
    "static": Static(sparsity=0.5), "rigl": RigL(sparsity=0.5, update_every=3),
    "set": SET(sparsity=0.5, update_every=3), "gmp": GMP(sparsity=0.5),
}  # fmt: skip


def start(method: Any = "static", optimizer: str = "adamw fused") -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return Run(
        model, METHODS[method] if isinstance(method, str) else method, OPTIMIZERS[optimizer], include=["*"], groups={}
    )


def outside(run: Run) -> float:
    """The largest weight, or state that the Sparsifier clears, outside a mask; NaN where one is."""
    found = [0.0]
    for layer in run.sparsifier.layers.values():
        for each in (layer.weight, *run.optimizer.state[layer.weight].values()):
            if torch.is_tensor(each) and each.shape == layer.weight.shape:
                found += each.detach()[~layer.mask].abs().tolist()
    return torch.tensor(found).max().item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_all_is_as_if_zeros_were_written_after_every_step(method: str, optimizer: str, monkeypatch: Any) -> None:
    run = start(method, optimizer)
    assert [outside(run.train(1)) for _ in range(7)] == [0.0] * 7
    monkeypatch.setattr(held_zeros, "PRESERVING", ())
    assert_same(run.state(), start(method, optimizer).train(7).state())


def test_momentum_outside_masks_is_kept_and_the_zeros_of_state_are_written_once(monkeypatch: Any) -> None:
    results = []
    for preserving in (held_zeros.PRESERVING, ()):
        monkeypatch.setattr(held_zeros, "PRESERVING", preserving)
        run = start(SNFS(sparsity=0.5, update_every=3), "nesterov").train(5)
        results.append(run.optimizer.state[run.model[0].weight]["momentum_buffer"])
    assert torch.equal(*results) and (results[0] != 0).float().mean() > 0.9
    written: list[int] = []
    monkeypatch.undo()
    clear, run = held_zeros.clear_state, start()
    monkeypatch.setattr(held_zeros, "clear_state", lambda *args: (written.append(1), clear(*args)))
    for steps in (1, 6):
        run.train(steps)
        assert len(written) == len(run.sparsifier.layers)


def noise(run: Run) -> None:
    for parameter in run.model.parameters():
        parameter.grad.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))


def states(run: Run) -> list[Tensor]:
    return [each for each in run.optimizer.state[run.model[0].weight].values() if torch.is_tensor(each) and each.dim()]


DISTURBANCES: dict[str, Callable[[Run], Any]] = {
    "noise": noise,
    "an edit": lambda run: torch.no_grad()(run.model[0].weight.add_)(0.5),
    "a write through data": lambda run: run.model[0].weight.data.fill_(1.0),
    "loading": lambda run: run.model.load_state_dict(
        {k: torch.ones_like(v) for k, v in run.model.state_dict().items()}
    ),
    "a write of state": lambda run: [each.fill_(1.0) for each in states(run)],
}


@pytest.mark.parametrize("optimizer", ["adamw fused", "nesterov", "sgd with decay", "adagrad"])
@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_what_a_user_does_between_gradients_and_step_leaves_nothing_behind(optimizer: str, disturbance: str) -> None:
    run = start(optimizer=optimizer).train(3)
    run.before_step = lambda: DISTURBANCES[disturbance](run)
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


def test_neither_an_update_that_makes_nan_of_zeros_nor_a_hook_after_ours_leaves_any_behind() -> None:
    # Adam's update without eps is 0 / 0, and an infinite rate times 0 is no number either.
    for field, value in (("eps", 0.0), ("lr", float("inf"))):
        run = start().train(2)
        run.optimizer.param_groups[0][field] = value
        assert outside(run.train(1)) == 0.0
    run = start()
    run.optimizer.register_step_pre_hook(lambda *_: noise(run))
    assert outside(run.train(5)) == 0.0


# An accumulator that starts at another value is not what `reset_state` starts anew.
RESET = OPTIMIZERS | {"adagrad": lambda groups: Adagrad(groups, lr=0.05)}


@pytest.mark.parametrize("optimizer", RESET)
def test_reset_moments_step_as_a_new_optimizer_would_also_after_zero_grad(optimizer: str) -> None:
    used, new, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(5, 4)
    old = RESET[optimizer](used.parameters())

    def step(model: nn.Module, optimizer: Any) -> None:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step(used, old)
    new.load_state_dict(used.state_dict())
    reset_state(old)
    step(used, old)
    step(new, RESET[optimizer](new.parameters()))
    torch.testing.assert_close(used.weight, new.weight, rtol=1e-5, atol=1e-6)


def test_a_reset_of_momentum_alone_keeps_adams_second_moments_and_step_counts() -> None:
    weight = nn.Parameter(torch.ones(3))
    adam = Adam([weight], lr=0.1)
    for _ in range(3):
        weight.grad = torch.tensor([1.0, -2.0, 4.0])
        adam.step()
    second = adam.state[weight]["exp_avg_sq"].clone()
    reset_state(adam, momentum_only=True)
    state = adam.state[weight]
    assert not state["exp_avg"].any() and torch.equal(state["exp_avg_sq"], second) and state["step"] == 3


def test_momentum_is_sgds_buffer_and_adams_quotient_and_the_rate_is_of_the_group_that_holds_a_parameter() -> None:
    weight, gradient = nn.Parameter(torch.zeros(2, 2)), torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    sgd, adam, plain = SGD([weight], lr=0.1, momentum=0.9), Adam([weight], lr=0.1), SGD([weight], lr=0.1)
    assert momentum(sgd, weight) is None and momentum(adam, weight) is None
    for optimizer in (sgd, sgd, adam, adam, plain):
        weight.grad = gradient.clone()
        optimizer.step()
    # .9 g + g
    torch.testing.assert_close(momentum(sgd, weight), 1.9 * gradient)
    # m = (.09 + .1) g, v = (.000999 + .001) g^2
    expected = 0.19 / 0.001999**0.5 * gradient.sign()
    torch.testing.assert_close(momentum(adam, weight), expected, rtol=1e-4, atol=1e-6)
    assert momentum(plain, weight) is None
    first, second, third = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}])
    assert [learning_rate(optimizer, each) for each in (first, second, third)] == [0.1, 0.2, 0.0]
