"""What `cast_many` and `backward_many` promise beside equality with the single-layer functions."""

from __future__ import annotations

import pytest
import torch

from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.backward_many import backward_many
from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.forward_many import cast_many
from tritonsparse.kernels.weight.table import View, ViewTable


def test_casts_fill_the_buffers_and_count_a_layer_and_its_bracket() -> None:
    weight = torch.tensor([[0.75, -0.25], [-1.0, 0.5]])
    mask = torch.tensor([[True, False, False]])
    soft = View("soft", weight, torch.zeros(1), w_hat=torch.empty(2, 2, dtype=torch.bfloat16))
    masked = View("mask", torch.tensor([[2.0, 0.3, 0.1]]), mask=mask, w_hat=torch.empty(1, 3))
    counted = cast_many(ViewTable([soft, masked], "torch"), torch.tensor([0.25, 0.75]))
    assert soft.w_hat is not None and soft.w_hat.tolist() == [[0.25, 0.0], [-0.5, 0.0]]
    assert masked.w_hat is not None and masked.w_hat.tolist() == [[2.0, 0.0, 0.0]]
    assert counted.kept.tolist() == [2, 1]
    assert counted.below is not None and counted.below.tolist() == [0, 1]  # |w| < 1/4
    assert counted.inside is not None and counted.inside.tolist() == [2, 1]  # 1/4 <= |w| < 3/4: 0.25, 0.5; 0.3
    assert [tiles.tolist() for tiles in counted.occupancy] == [[[2]], [[1]]]


def test_backward_changes_gradients_in_place_and_returns_the_thresholds() -> None:
    random = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(4, 6, generator=random), torch.randn(4, 6, generator=random)
    view = View("soft", weight, torch.randn(4, generator=random), alpha=torch.tensor(0.5))
    expected = threshold_backward(grad, weight, view.threshold, alpha=view.alpha, kind="soft")
    (of_threshold,) = backward_many(ViewTable([view], "torch"), [grad])
    assert torch.equal(grad, expected[0]) and torch.equal(of_threshold, expected[1])
    # A layer that got no gradient leaves zeros for its threshold.
    assert backward_many(ViewTable([view], "torch"), [None])[0].tolist() == [0.0] * 4


def test_the_multiplier_commutes_with_accumulation() -> None:
    random = torch.Generator().manual_seed(0)
    weight, s = torch.randn(8, 8, generator=random, dtype=torch.float64), torch.zeros(1)
    parts = [torch.randn(8, 8, generator=random, dtype=torch.float64) for _ in range(4)]
    each = [threshold_backward(part, weight, s, kind="soft") for part in parts]
    total = sum(parts, torch.zeros(8, 8, dtype=torch.float64))
    (of_threshold,) = backward_many(ViewTable([View("soft", weight, s)], "torch"), [total])
    torch.testing.assert_close(total, sum(part[0] for part in each))
    torch.testing.assert_close(of_threshold, sum(part[1] for part in each))


def test_a_view_is_that_of_threshold_cast() -> None:
    weight, s = torch.randn(70, 66, generator=torch.Generator().manual_seed(0)), torch.zeros(70)
    view = View("soft", weight, s, w_hat=torch.empty(70, 66))
    counted = cast_many(ViewTable([view], "torch"))
    w_hat, kept, occupancy = threshold_cast(weight, s, kind="soft")
    assert view.w_hat is not None and torch.equal(view.w_hat, w_hat)
    assert counted.kept[0] == kept and torch.equal(counted.occupancy[0], occupancy)


W = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View("soft", W), "ViewTable: expected kind"),
        (View("soft", torch.ones(3, 2).t(), torch.zeros(1)), "expected a contiguous weight, got float32"),
        (View("soft", W, torch.zeros(1), w_hat=torch.ones(3, 2)), r"expected w_hat of \[2, 3\] on cpu"),
        (View("soft", W, torch.zeros(1), alpha=torch.zeros(2)), "alpha to be one float32 value"),
        (View("step", W, torch.zeros(1), alpha=torch.zeros(())), 'neither grad_mask nor alpha with kind "step"'),
        (View("soft", W, torch.zeros(1, device="meta")), "threshold to be float32"),
    ],
)
def test_a_view_that_does_not_fit_is_refused(view: View, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewTable([view], "torch")


def test_missing_buffers_other_gradients_and_odd_brackets_are_refused() -> None:
    table = ViewTable([View("soft", W, torch.zeros(1))], "torch")
    with pytest.raises(ValueError, match="cast_many: expected a w_hat in every view, got none in view 0"):
        cast_many(table)
    first = torch.ones(2, 3)
    two = ViewTable([View("soft", W, torch.zeros(1)), View("soft", W, torch.zeros(1))], "torch")
    with pytest.raises(ValueError, match=r"a contiguous grad of torch.float32 \[2, 3\] on cpu, got float64"):
        backward_many(two, [first, torch.ones(2, 3, dtype=torch.float64)])
    assert torch.equal(first, torch.ones(2, 3))
    full = ViewTable([View("soft", W, torch.zeros(1), w_hat=torch.empty(2, 3))], "torch")
    with pytest.raises(ValueError, match="bracket to be float32"):
        cast_many(full, torch.zeros(3))
