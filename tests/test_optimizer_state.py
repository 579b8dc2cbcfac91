"""What the library knows of optimizers' state: how to start it anew, its momentum, and a parameter's rate."""

from __future__ import annotations

import pytest
import torch
from small_optimizers import OPTIMIZERS
from torch import nn

from tritonsparse.optimizer_state import learning_rate, momentum, reset_state

# An accumulator that starts at another value is not what `reset_state` starts anew.
RESET = OPTIMIZERS | {"adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05)}


@pytest.mark.parametrize("optimizer", RESET)
def test_reset_moments_step_as_a_new_optimizer_would(optimizer: str) -> None:
    """Also after zero_grad has set every gradient to None."""
    used, new = nn.Linear(4, 3), nn.Linear(4, 3)
    old = RESET[optimizer](used.parameters())
    for _ in range(3):
        used(torch.randn(5, 4)).square().sum().backward()
        old.step()
        old.zero_grad()
    new.load_state_dict(used.state_dict())
    reset_state(old)
    x = torch.randn(5, 4)
    for model, each in ((used, old), (new, RESET[optimizer](new.parameters()))):
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
