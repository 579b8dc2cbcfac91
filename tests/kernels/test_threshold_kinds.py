"""The kinds "hard" and "step", and thresholds per block: hand-sized, and against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.forward import threshold_cast

F64 = torch.float64


@pytest.mark.parametrize("kind", ["hard", "step"])
def test_a_cut_off_keeps_weights_above_it_as_they_are(kind: str) -> None:
    weight = torch.tensor([[0.75, -0.5, 0.25], [-1.0, 0.0, float("nan")]])
    # One cut-off a row; |w| = t is pruned, and a negative cut-off keeps even a zero.
    w_hat, kept, _ = threshold_cast(weight, torch.tensor([0.5, -0.1]), kind=kind)
    assert w_hat[0].tolist() == [0.75, 0.0, 0.0] and w_hat[1, :2].tolist() == [-1.0, 0.0] and w_hat[1, 2].isnan()
    assert kept == 4


def test_hard_multiplies_as_a_mask_does_and_gives_the_cut_off_no_gradient() -> None:
    weight, grad = torch.tensor([[0.75, -0.5, 0.25, 0.0]]), torch.tensor([[2.0, 4.0, 8.0, 16.0]])
    within = torch.tensor([[False, True, False, True]])
    grad_weight, grad_cutoff = threshold_backward(
        grad, weight, torch.tensor([0.5]), grad_mask=within, alpha=torch.tensor(0.25), kind="hard"
    )
    # Kept; pruned in B; pruned outside B; a pruned zero in B: unlike soft, its sign plays no part.
    assert grad_weight.tolist() == [[2.0, 1.0, 0.0, 4.0]]
    assert grad_cutoff.tolist() == [0.0]


def test_step_is_the_long_tailed_estimator_by_hand() -> None:
    # q = |w| - t with t = 0.5:    0.25        -0.1            0.6         -0.5           1.5
    weight = torch.tensor([[0.75, -0.4, 1.1, 0.0, -2.0]], dtype=F64)
    # H = 2 - 4|q|:                1.0          1.6            0.4          0.4            0
    # m = kept + |w| H:            1.75         0.64           1.44         0              1
    grad = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0]], dtype=F64)
    grad_weight, grad_cutoff = threshold_backward(grad, weight, torch.tensor([0.5], dtype=F64), kind="step")
    assert grad_weight[0].tolist() == pytest.approx([1.75, 6.4, 144.0, 0.0, 10000.0])
    # -(w H g):  -0.75 + 6.4 - 44 + 0 + 0
    assert grad_cutoff.tolist() == pytest.approx([-38.35])


def test_step_refuses_what_its_estimator_does_not_read() -> None:
    w = torch.ones(2, 2)
    with pytest.raises(ValueError, match='neither grad_mask nor alpha with kind "step", got alpha; leave'):
        threshold_backward(w, w, torch.zeros(2), alpha=torch.tensor(0.5), kind="step")


def test_a_threshold_per_block_is_that_threshold_on_each_block() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=random, dtype=F64)
    grad = torch.randn(6, 8, generator=random, dtype=F64)
    s = torch.randn(3, 2, generator=random, dtype=F64)  # blocks of 2 x 4
    alpha = torch.tensor(0.5)
    w_hat, kept, _ = threshold_cast(weight, s, kind="soft")
    grad_weight, grad_s = threshold_backward(grad, weight, s, alpha=alpha, kind="soft")
    total = 0
    for i in range(3):
        for j in range(2):
            block = (slice(2 * i, 2 * i + 2), slice(4 * j, 4 * j + 4))
            expected, count, _ = threshold_cast(weight[block], s[i, j, None], kind="soft")
            assert torch.equal(w_hat[block], expected)
            due = threshold_backward(grad[block], weight[block], s[i, j, None], alpha=alpha, kind="soft")
            assert torch.equal(grad_weight[block], due[0])
            torch.testing.assert_close(grad_s[i, j, None], due[1])
            total += int(count)
    assert kept == total


@pytest.mark.parametrize("shape", [(1,), (6,), (3, 2)])
def test_soft_gradients_are_autograds_where_the_view_is_smooth(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 8, generator=random, dtype=F64, requires_grad=True)
    s = torch.randn(*shape, generator=random, dtype=F64, requires_grad=True)
    grad = torch.randn(6, 8, generator=random, dtype=F64)
    t = s.sigmoid()
    spread = t[:, None] if t.dim() == 1 else t.repeat_interleave(2, 0).repeat_interleave(4, 1)
    expected = torch.autograd.grad((weight.sign() * (weight.abs() - spread).relu() * grad).sum(), (weight, s))
    actual = threshold_backward(grad, weight.detach(), s.detach(), kind="soft")
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


@pytest.mark.parametrize("shape", [(4, 2), (6, 3), (0, 2), (7, 8)])
def test_blocks_that_do_not_divide_the_weight_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"or \[R, C\] that divide \[6, 8\]"):
        threshold_cast(torch.ones(6, 8), torch.zeros(shape), kind="soft")
