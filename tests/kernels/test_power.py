"""theta |theta|^(a-1): values and gradients by hand, against float64 autograd, and where autograd itself gives NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels.weight.power import power, power_reference, root


@pytest.mark.parametrize("exponent", [1.25, 1.5, 1.9])
def test_by_hand_and_the_gradient_at_zero_is_zero_where_autograd_of_the_formula_has_none(exponent: float) -> None:
    theta = torch.tensor([3.0, -2.0, 0.0, 0.5], requires_grad=True)
    weight = power(theta, 2.0)
    assert weight.tolist() == [9.0, -4.0, 0.0, 0.25]
    weight.backward(torch.tensor([1.0, 10.0, 100.0, -1.0]))
    # 2 |theta| g
    assert theta.grad is not None and theta.grad.tolist() == [6.0, 40.0, 0.0, -1.0]

    theta = torch.zeros(3, requires_grad=True)
    power(theta, exponent).backward(torch.ones(3))
    assert theta.grad is not None and theta.grad.tolist() == [0.0, 0.0, 0.0]
    naive = torch.zeros(3, requires_grad=True)
    power_reference(naive, exponent).backward(torch.ones(3))
    assert naive.grad is not None and naive.grad.isnan().all(), "the op of its own would not be needed"


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    exponent=st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.75]),
    seed=st.integers(0, 999),
)
def test_it_is_autograd_of_the_formula_away_from_zero(shape: list[int], exponent: float, seed: int) -> None:
    torch.manual_seed(seed)
    start = torch.randn(shape, dtype=torch.float64)
    start = start + 0.1 * start.sign()
    grad = torch.randn_like(start)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    left, right = power(ours, exponent), power_reference(theirs, exponent)
    left.backward(grad)
    right.backward(grad)
    assert torch.equal(left, right)
    assert ours.grad is not None and theirs.grad is not None
    error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-300)
    assert error < 1e-14, f"dtheta: {error}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_root_is_undone_by_the_power(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64, dtype=torch.float64).mul(0.05).to(dtype)
    weight[0, :5] = 0.0
    for exponent in (1.0, 1.5, 2.0, 4.0):
        back = power(root(weight, exponent), exponent)
        assert back.dtype == dtype
        error = (back - weight).double().norm() / weight.double().norm()
        assert error < 4 * exponent * torch.finfo(dtype).eps, f"a = {exponent}: {error}"
        assert torch.equal(back == 0, weight == 0)


def test_opcheck() -> None:
    theta = torch.randn(6, 4, dtype=torch.float64)
    for each in (theta, theta[:, ::2]):
        torch.library.opcheck(torch.ops.tritonsparse.power.default, (each.detach().requires_grad_(), 1.5))
        torch.library.opcheck(torch.ops.tritonsparse.power_backward.default, (torch.randn_like(each), each, 1.5))


def test_an_exponent_below_one_and_integers_are_refused() -> None:
    for exponent in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"an exponent of at least 1.*2 is the paper's"):
            power(torch.ones(2), exponent)
    with pytest.raises(ValueError, match=r"floating-point theta, got torch\.int64; convert it"):
        power(torch.ones(2, dtype=torch.int64), 2.0)
