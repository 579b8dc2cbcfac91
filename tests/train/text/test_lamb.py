"""LAMB against its formula, in float64 and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tritonsparse.train.text.lamb import Lamb


def formula(weights: np.ndarray, gradients: list[np.ndarray], **fields: float) -> np.ndarray:
    """Algorithm 2 of arXiv:1904.00962 as NVIDIA runs it, in NumPy."""
    w, m, v = weights.copy(), np.zeros_like(weights), np.zeros_like(weights)
    for g in gradients:
        m = fields["beta1"] * m + (1 - fields["beta1"]) * g
        v = fields["beta2"] * v + (1 - fields["beta2"]) * g * g
        u = m / (np.sqrt(v) + fields["eps"]) + fields["decay"] * w
        norms = min(np.linalg.norm(w), 10.0), np.linalg.norm(u)
        ratio = 1.0 if 0 in norms else norms[0] / (norms[1] + fields["eps"])
        w = w - fields["lr"] * ratio * u
    return w


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0], ids=["small", "about one", "norm beyond 10"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_twenty_steps_equal_the_formula_in_float64(scale: float, decay: float) -> None:
    rng = np.random.default_rng(0)
    weights = scale * rng.standard_normal((7, 5))
    gradients = [rng.standard_normal((7, 5)) for _ in range(20)]
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    optimizer = Lamb([parameter], lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    expected = formula(weights, gradients, beta1=0.8, beta2=0.95, eps=1e-6, decay=decay, lr=0.03)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-13)


def test_the_first_step_by_hand() -> None:
    # g = (3, -4): m = 0.1 g, v = 0.001 g^2, u = m / sqrt(v) = 0.1 / sqrt(0.001) sign(g) = +-3.1623, |u| = 4.4721.
    # |w| = 5, so r = 5 / 4.4721 = 1.1180 and w moves by lr r u = 0.01 x 1.1180 x 3.1623 = 0.035355.
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    parameter.grad = torch.tensor([3.0, -4.0])
    Lamb([parameter], lr=0.01, eps=1e-12).step()
    torch.testing.assert_close(parameter.data, torch.tensor([3.0 - 0.0353553, 4.0 + 0.0353553]))


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1.0, 0.0)], ids=["no weight", "no gradient"])
def test_where_a_norm_is_zero_the_ratio_is_one(weight: float, gradient: float) -> None:
    parameter = torch.nn.Parameter(torch.full((4,), weight))
    parameter.grad = torch.full((4,), gradient)
    Lamb([parameter], lr=0.5, betas=(0.0, 0.0), eps=1e-8).step()
    torch.testing.assert_close(parameter.data, torch.full((4,), weight - 0.5 * gradient))


def test_each_tensor_has_its_own_ratio_and_a_parameter_without_gradient_stays() -> None:
    first, second, idle = (torch.nn.Parameter(torch.full((4,), value)) for value in (1.0, 2.0, 3.0))
    first.grad, second.grad = torch.ones(4), torch.ones(4)
    optimizer = Lamb([{"params": [first]}, {"params": [second, idle], "lr": 0.01}], lr=0.1)
    optimizer.step()
    # u = 0.1 / sqrt(0.001) in every entry, so r u is w itself.
    torch.testing.assert_close(first.data, torch.full((4,), 1.0 - 0.1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.data, torch.full((4,), 2.0 - 0.02), rtol=1e-5, atol=1e-5)
    assert torch.equal(idle.data, torch.full((4,), 3.0)) and idle not in optimizer.state


def test_saved_state_goes_on_as_if_never_stopped() -> None:
    gradients = torch.randn(6, 3, 3)

    def run(optimizer: Lamb, parameter: torch.nn.Parameter, which: slice) -> None:
        for gradient in gradients[which]:
            parameter.grad = gradient
            optimizer.step()

    whole = torch.nn.Parameter(torch.ones(3, 3))
    run(Lamb([whole], lr=0.1), whole, slice(None))
    early = torch.nn.Parameter(torch.ones(3, 3))
    before = Lamb([early], lr=0.1)
    run(before, early, slice(0, 3))
    late = torch.nn.Parameter(early.detach().clone())
    after = Lamb([late], lr=0.1)
    after.load_state_dict(before.state_dict())
    run(after, late, slice(3, 6))
    assert torch.equal(late, whole)


def test_a_closure_is_called_with_gradients_on() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = Lamb([parameter], lr=0.1)

    def closure() -> float:
        loss = (parameter**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert float(parameter.max()) < 1.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr": -1.0}, "lr of at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas in \[0, 1\)"),
        ({"eps": 0.0}, "eps above 0"),
        ({"weight_decay": -0.1}, "weight_decay of at least 0"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Lamb([torch.nn.Parameter(torch.ones(1))], **fields)
