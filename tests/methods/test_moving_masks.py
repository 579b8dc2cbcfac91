"""DSR, MEST, RigL, SET and SNFS: one update by hand, exact counts, and what their weights and moments start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_runs import Run, linear, two
from torch import nn

from tritonsparse.clock import Clock
from tritonsparse.methods import DSR, MEST, SET, SNFS, RigL, Static


def dsr(**fields: Any) -> Run:
    method = DSR(**{"sparsity": 0.5, "drop_fraction": 0.5, "threshold_init": 0.15, "update_every": 1, **fields})
    run = Run(two(6), method, momentum=0.5, total_steps=100, seed=3)
    return run.place([0.9, 0.1, -0.2, 0, 0, 0], [0.05, -0.1, 0.3, 0, 0, 0], kept=3)


def test_a_reallocation_by_hand() -> None:
    run = dsr()
    run.step(1.0, 1.0)
    # Below .15: one weight of layer 0, two of layer 1. What remains is 2 and 1, so of the 3, layer 0 grows 2.
    first, second = (view.mask[0] for view in run.views)
    assert first[[0, 2]].all() and not first[1] and int(first[3:].sum()) == 2
    assert second[2] and not second[[0, 1]].any() and int(second[3:].sum()) == 1
    # Grown weights start at 0 without a past, dropped ones are 0; the others have not moved.
    assert run.views[0].weight[0].tolist() == pytest.approx([0.9, 0.0, -0.2, 0.0, 0.0, 0.0])
    assert run.views[1].weight[0].tolist() == pytest.approx([0.0, 0.0, 0.3, 0.0, 0.0, 0.0])
    assert run.momentum()[0].tolist() == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    # Growth differs from step to step.
    masks = {str(run.masks())}
    for _ in range(5):
        run.step(1.0, 1.0)
        masks.add(str(run.masks()))
    assert len(masks) > 1


# K = 3 of 6: N_p = 3 is met, 1 is passed, 6 is not reached.
@pytest.mark.parametrize(("drop_fraction", "threshold"), [(0.5, 0.15), (1 / 6, 0.075), (1.0, 0.3)])
def test_the_threshold_is_halved_or_doubled_off_by_a_tenth(drop_fraction: float, threshold: float) -> None:
    run = dsr(drop_fraction=drop_fraction)
    run.step(1.0, 1.0)
    assert run.sparsifier.state_dict()["method_state"] == {"threshold": pytest.approx(threshold)}


def test_the_threshold_finds_the_number_to_drop_in_periods_that_double_at_the_papers_epochs() -> None:
    model = nn.ModuleList([nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)])
    run = Run(model, DSR(sparsity=0.5, drop_fraction=0.1, threshold_init=1e-5, update_every=1), lr=0.1, total_steps=100)
    moved = []
    for _ in range(40):
        before = [view.mask.clone() for view in run.views]
        run.step(*(0.1 * torch.randn(32, 64) for _ in range(2)))
        moved.append(sum(int((old & ~view.mask).sum()) for old, view in zip(before, run.views, strict=True)))
        assert sum(run.kept()) == 2048
    assert moved[0] < 20
    # H moves by factors of two, so the count stays around N_p = 204.8, not on it.
    assert 0.4 * 204.8 < sum(moved[-20:]) / 20 < 2.5 * 204.8
    method, clock = DSR(sparsity=0.5, update_every=10), Clock(0, 1000, None)
    due = [step for step in range(1000) if method._due(step, clock)]
    # Of 1000 steps: every 10 to 250, every 20 to 500, every 40 to 750, every 80 to 950.
    assert due == [*range(10, 250, 10), *range(260, 500, 20), *range(520, 750, 40), *range(800, 950, 80)]


def test_above_every_weight_a_layer_keeps_its_largest_and_the_count_holds_where_there_is_no_room() -> None:
    run = dsr(threshold_init=10.0)
    run.step(1.0, 1.0)
    assert run.views[0].mask[0, 0] and run.views[1].mask[0, 2] and sum(run.kept()) == 6
    run = Run(two(6), DSR(sparsity=0.2, threshold_init=10.0, update_every=1), total_steps=10)
    run.step(0.0, 0.0)
    assert sum(run.kept()) == 10


def mest(**fields: Any) -> Run:
    run = Run(linear([0.0] * 10), MEST(**{"sparsity": 0.5, "update_every": 1, **fields}), total_steps=8, seed=1)
    return run.place([0.5, -0.1, 0.2, 0.4, 0.3, 0, 0, 0, 0, 0], kept=5)


def test_an_update_prunes_too_much_and_grows_back_at_random() -> None:
    run = mest(mutation=(0.2, 0.0), softness=(0.0, 0.0), stages=(0.5,))
    run.step(0.0)  # step 0: no update
    assert run.view.mask[0, :5].all()
    run.step(0.0)
    mask = run.view.mask[0]
    # To .7: .1 and .2 go, three stay; back to .5: two of the other seven, at value 0.
    assert mask[[0, 3, 4]].all() and int(mask.sum()) == 5
    assert run.view.weight[0].tolist() == pytest.approx([0.5, 0.0, 0.0, 0.4, 0.3, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(("weight", "value"), [(0.0, 0.0), (0.1, -0.1)])
def test_the_gradient_counts_in_the_importance(weight: float, value: float) -> None:
    """The published code takes it after zero_grad."""
    run = mest(mutation=(0.1, 0.0), softness=(0.0, 0.0), stages=(0.5,), gradient_weight=weight)
    run.step(0.0)
    run.step([0.0, 5.0, *[0.0] * 8])
    # |-.1| + .1 x 5 = .6 is the largest, |-.1| alone the smallest: gone, and 0 even if chance grows it again.
    assert run.view.weight[0, 1].item() == pytest.approx(value)


def test_soft_memory_falls_to_the_sparsity_and_freezes() -> None:
    run = mest(softness=(0.3, 0.1, 0.0), mutation=(0.0, 0.0, 0.0), stages=(0.5, 0.75))
    masks = []
    for _ in range(8):
        run.step(0.0)
        masks.append(run.view.mask.clone())
    # Stages begin at steps 4 and 6: 10 x (1 - .5 + .3) = 8, then 6, then 5 for good.
    assert [int(mask.sum()) for mask in masks] == [5, 8, 8, 8, 6, 6, 5, 5]
    assert torch.equal(masks[6], masks[7])


def start(cls: Any, **fields: Any) -> Run:
    method = cls(**{"sparsity": 0.5, "distribution": "uniform", **fields})
    return Run(nn.Linear(6, 1), method, lr=0.1, momentum=0.5, total_steps=100, seed=3)


def train(run: Run, steps: int) -> None:
    generator = torch.Generator().manual_seed(run.sparsifier.step)

    def loss() -> torch.Tensor:
        x = torch.randn(8, 6, generator=generator)
        return (run.model(x) - x.sum(1, keepdim=True)).square().mean()

    run.train(steps, loss)


def test_rigls_update_by_hand() -> None:
    # f(1) = .35 (1 + cos(pi / 75)) = .6997: int(.6997 x 3) = 2 weights move.
    run = start(RigL, drop_fraction=0.7, update_every=1).place([0.9, -0.1, 0.2, 0, 0, 0], kept=3)
    layer = run.view
    layer.bias.grad = torch.ones(1)
    run.step(0.0)  # step 0: no update yet, the bias moves
    assert layer.bias.grad is not None and run.sparsifier.step == 1
    assert float(layer.alpha) == 1.0, "dW must be dense where the update reads it"
    bias = layer.bias.item()
    layer.bias.grad = torch.ones(1)
    run.step([0.0, 5.0, 0.0, -4.0, 1.0, 2.0])
    # Dropped: -.1 and .2. Grown among all others: |5| (just dropped, it comes back with its value) and |-4|.
    assert run.masks() == [[[1, 1, 0, 1, 0, 0]]]
    assert layer.weight[0].tolist() == pytest.approx([0.9, -0.1, 0.0, 0.0, 0.0, 0.0])
    # The update took the place of the step, for every parameter, and counted.
    assert layer.bias.item() == bias and layer.bias.grad is None and run.sparsifier.step == 2
    # A layer without a gradient at an update has one of 0: 0 and -.1 go, ties grow from the lowest place on.
    layer.bias.grad, layer.weight.grad = torch.ones(1), None
    run.step()
    assert run.masks() == [[[1, 1, 1, 0, 0, 0]]] and run.sparsifier.step == 3


def test_the_dense_gradient_is_computed_on_update_steps_only_and_counted_so() -> None:
    run, dense = start(RigL, update_every=3, stop_at=0.08), []
    for number in range(12):
        run.model(torch.randn(4, 6)).sum().backward()
        if (run.view.weight.grad[~run.view.mask] != 0).any():
            dense.append(number)
        run.step()
        run.optimizer.zero_grad()
    # Updates at steps 3 and 6; 9 is past .08 x 100.
    assert dense == [3, 6]
    run = start(RigL, update_every=100)
    # (3 f_S Delta T + 2 f_S + f_D) / (Delta T + 1), a third of it a pass.
    expected = (3 * 0.5 * 100 + 2 * 0.5 + 1) / 101 / 3
    assert run.method.densities(run.view, 0.5).training == pytest.approx(expected)


def test_grown_weights_start_from_zero_without_a_past() -> None:
    run = start(SET, drop_fraction=0.5, update_every=4)
    before = run.view.mask.clone()
    train(run, 4)
    grown = run.view.mask & ~before
    assert int(grown.sum()) == int((before & ~run.view.mask).sum()) == 1
    assert run.view.weight[grown].item() == 0.0
    assert run.momentum()[~run.view.mask | grown].abs().sum() == 0.0


@pytest.mark.parametrize("cls", [RigL, SET])
def test_the_count_never_changes(cls: Any) -> None:
    run, seen = start(cls, drop_fraction=0.7, update_every=2), set()
    for _ in range(10):
        train(run, 2)
        assert run.kept() == [3]
        seen.add(str(run.masks()))
    assert len(seen) > 1


def test_without_dropping_rigl_is_static() -> None:
    weights = []
    for run in (start(RigL, drop_fraction=0.0, update_every=1000), start(Static)):
        run.place((torch.linspace(-1, 1, 6) + 0.05).tolist(), kept=3).view.bias.data.zero_()
        train(run, 6)
        weights.append(run.view.weight.detach().clone())
    assert torch.equal(*weights)


def snfs(**given: Any) -> Run:
    fields = {key: given.pop(key) for key in ("sparsity", "drop_fraction", "stop_at") if key in given}
    method = SNFS(**{"sparsity": 0.5, "drop_fraction": 0.4, "update_every": 1, **fields})
    return Run(two(6), method, total_steps=100, seed=3, **{"momentum": 0.5, **given})


def updated(run: Run) -> Run:
    """After the example's update; a first step of lr 0 makes the gradient the momentum."""
    run.place([0.9, -0.1, 0.2, 0, 0, 0], [0.5, 0.6, -0.7, 0, 0, 0], kept=3)
    run.step([3.0, -3.0, 3.0, 4.0, -5.0, 0.0], [1.0, -1.0, 1.0, 0.0, 0.5, 0.25])
    return run


def test_an_update_of_two_layers_by_hand() -> None:
    run = updated(snfs())
    # f(1) = .005 + .395 (1 + cos(pi / 100)) / 2 = .3999: ceil(.3999 x 3) = 2 of each layer's 3 go, the smallest.
    # Mean momentum of the kept: 3 and 1. Of the 4, layer 0 grows 3 and layer 1 grows 1.
    # Layer 0: |-5|, |4|, then 3 at the lower index, which has just gone and comes back with its value.
    assert run.masks() == [[[1, 1, 0, 1, 1, 0]], [[1, 0, 1, 0, 0, 0]]]
    assert run.views[0].weight[0].tolist() == pytest.approx([0.9, -0.1, 0.0, 0.0, 0.0, 0.0])
    assert run.views[1].weight[0].tolist() == pytest.approx([0.5, 0.0, -0.7, 0.0, 0.0, 0.0])
    # Momentum is whole, inside the masks and outside.
    assert run.momentum()[0].tolist() == [3.0, -3.0, 3.0, 4.0, -5.0, 0.0]
    # Adam's is divided by the root of its square: after one step m / sqrt(v) = .1 g / sqrt(.001 g^2) has one size
    # wherever g is not 0: both layers ask alike, 2 each; ties go to the lowest index; where g is 0 nothing grows.
    run = updated(snfs(optimizer=torch.optim.Adam))
    assert run.masks() == [[[1, 1, 1, 0, 0, 0]], [[1, 1, 1, 0, 0, 0]]]
    # A layer that is nearly dense and wants more turns over its zeros only.
    run = snfs(sparsity=0.1, drop_fraction=0.5).place(*[[0.1, 0.2, 0.3, 0.4, 0.5, 0.0]] * 2, kept=5)
    run.step(5.0, 1.0)
    # Layer 0 is 1/6 sparse and asks for more than its half: ceil(5/6) = 1 goes. Layer 1: ceil(.4999 x 5) = 3.
    # Of the 4, layer 0 may take floor(.99 x 2) = 1, so layer 1 grows 3: nothing has moved between them.
    assert run.kept() == [5, 5] and run.masks()[0] == [[1, 1, 1, 1, 1, 0]]
    # An optimizer without momentum is refused at the update.
    run = snfs(momentum=0.0)
    masks = run.masks()
    with pytest.raises(RuntimeError, match=r"with momentum or Adam's averages, got SGD without; use SGD\(mom"):
        run.step(1.0, 1.0)
    assert run.masks() == masks


def test_weights_move_to_the_layer_that_learns_and_the_total_stays() -> None:
    model = nn.ModuleList([nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)])
    run = Run(model, SNFS(sparsity=0.8, update_every=5), lr=0.05, momentum=0.9, total_steps=200, seed=1)
    truth = torch.randn(8, 16)

    def loss() -> torch.Tensor:
        x = torch.randn(32, 16)
        # The second layer's task is a hundredth of the first's.
        errors = model[0](x) - x @ truth.t(), 0.1 * (model[1](x) - 0.1 * x @ truth.t())
        return errors[0].square().mean() + errors[1].square().mean()

    for _ in range(60):
        run.train(1, loss)
        assert sum(run.kept()) == 52
    assert run.kept()[0] > 1.5 * run.kept()[1], run.kept()


def test_dw_is_dense_until_the_last_update_and_masked_after_it() -> None:
    run = snfs(stop_at=0.03)
    view, dense, densities = run.views[0], [], []
    for _ in range(6):
        sum(layer(torch.randn(4, 6)).square().sum() for layer in run.model).backward()
        dense.append(bool((view.weight.grad[~view.mask] != 0).any()))
        densities.append(run.method.densities(view, 0.5).grad_weight)
        run.step()
        run.optimizer.zero_grad()
        assert not view.weight[~view.mask].any()
    assert dense == [True, True, True, False, False, False]
    assert densities == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    # The past of what is pruned for good is cleared, or it would move.
    assert not any(run.momentum(number)[~view.mask].any() for number, view in enumerate(run.views))
