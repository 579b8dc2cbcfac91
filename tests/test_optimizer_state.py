"""Pruned weights stay exactly zero under every optimizer people train with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

import tritonsparse as ts
from tritonsparse.methods import GMP
from tritonsparse.optimizer_state import learning_rate, momentum, reset_state

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.05, amsgrad=True, weight_decay=0.01),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, lr=0.05, foreach=True),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=0.05, fused=True),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.05),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.05),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.05, momentum=0.9, centered=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.5),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.05),
    "adafactor of torch": lambda groups: torch.optim.Adafactor(groups, lr=0.05),
    "adafactor of transformers": lambda groups: Adafactor(groups, lr=0.05, relative_step=False, beta1=0.9),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_pruned_weights_stay_exactly_zero(build: Callable[[Any], Optimizer]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    method = GMP(sparsity=0.6, begin=0.2, end=0.6, update_every=2)
    sparsifier = ts.sparsify(model, method, total_steps=20)
    optimizer = build(sparsifier.param_groups())
    sparsifier.attach(optimizer)
    for _ in range(20):
        x = torch.randn(16, 8)
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in sparsifier.layers.values():
            assert not layer.weight[~layer.mask].any()
    assert sparsifier.sparsity() == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_reset_moments_step_as_a_new_optimizer_would(build: Callable[[Any], Optimizer]) -> None:
    """Also after zero_grad has set every gradient to None."""
    torch.manual_seed(0)
    used, new = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer = build(used.parameters())
    for _ in range(3):
        used(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    new.load_state_dict(used.state_dict())
    reset_state(optimizer)
    fresh = build(new.parameters())
    x = torch.randn(5, 4)
    for model, each in ((used, optimizer), (new, fresh)):
        model(x).square().sum().backward()
        each.step()
    torch.testing.assert_close(used.weight, new.weight, rtol=1e-5, atol=1e-6)


def test_momentum_is_sgds_buffer_and_adams_quotient() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    gradient = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    sgd, adam = torch.optim.SGD([weight], lr=0.1, momentum=0.9), torch.optim.Adam([weight], lr=0.1)
    assert momentum(sgd, weight) is None and momentum(adam, weight) is None
    for optimizer in (sgd, adam):
        for _ in range(2):
            weight.grad = gradient.clone()
            optimizer.step()
    # .9 g + g
    torch.testing.assert_close(momentum(sgd, weight), 1.9 * gradient)
    # m = (.09 + .1) g, v = (.000999 + .001) g^2
    expected = 0.19 / 0.001999**0.5 * gradient.sign()
    torch.testing.assert_close(momentum(adam, weight), expected, rtol=1e-4, atol=1e-6)
    plain = torch.optim.SGD([weight], lr=0.1)
    weight.grad = gradient.clone()
    plain.step()
    assert momentum(plain, weight) is None


def test_the_learning_rate_is_that_of_the_group_that_holds_the_parameter() -> None:
    first, second, third = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}])
    assert [learning_rate(optimizer, each) for each in (first, second, third)] == [0.1, 0.2, 0.0]
