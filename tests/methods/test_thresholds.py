"""DST's cut-offs by hand, and what STR's published schedule alone does to a threshold logit of -3200."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from method_runs import Run, linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from tritonsparse.methods import DST, STR

WEIGHT = [0.5, -0.25, 0.0], [0.1, 0.2, -0.3]


def test_cut_offs_start_at_zero_and_one_step_by_hand() -> None:
    run = Run(linear(*WEIGHT), DST())
    assert run.view.kind == "step" and run.view.threshold.tolist() == [0.0, 0.0]
    assert run.view.kept_count() == 5
    assert torch.equal(run.model(torch.eye(3)), run.view.weight.t())
    # y = W x with x = (1, 1, 1) and dL/dy = (1, 0): g = [[1, 1, 1], [0, 0, 0]].   t = (0.3, 0)
    view = Run(linear(*WEIGHT), DST(penalty=0.0)).view
    view.threshold.data[0] = 0.3
    view(torch.ones(3))[0].backward()
    # q = |w| - t = (0.2, -0.05, -0.3); H = 2 - 4|q| = (1.2, 1.8, 0.8)
    # m = 1[kept] + |w| H = (1 + 0.6, 0.45, 0)
    assert view.weight.grad[0].tolist() == pytest.approx([1.6, 0.45, 0.0])
    assert view.weight.grad[1].tolist() == [0.0, 0.0, 0.0]
    # dt = -sum(w H g) = -(0.6 - 0.45)
    assert view.threshold.grad.tolist() == pytest.approx([-0.15, 0.0])
    # A transposed weight has a cut-off for every output too.
    conv1d = Conv1D(2, 3)
    conv1d.weight.data = torch.tensor(WEIGHT).t().contiguous()
    view = Run(conv1d, DST(penalty=0.0)).view
    assert view.threshold.shape == (1, 2)
    view.threshold.data = torch.tensor([[0.3, 0.15]])
    assert view.effective_weight().t().tolist() == [[0.5, 0.0, 0.0], [0.0, pytest.approx(0.2), pytest.approx(-0.3)]]
    view(torch.ones(3))[0].backward()
    assert view.threshold.grad[0].tolist() == pytest.approx([-0.15, 0.0])


@pytest.mark.parametrize("scale", [None, 8.0])
def test_the_penalty_pushes_cut_offs_up_by_exp_minus_t(scale: float | None) -> None:
    run = Run(linear(*WEIGHT), DST(penalty=0.5), lr=1.0)
    threshold = run.view.threshold
    threshold.data, threshold.grad = torch.tensor([0.0, math.log(2.0)]), torch.zeros(2)
    run.before_step(scale)
    # d/dt penalty exp(-t) = -0.5 (1, 1/2)
    assert threshold.grad.tolist() == pytest.approx([-0.5 * (scale or 1.0), -0.25 * (scale or 1.0)])


def test_a_layer_that_fell_starts_again_after_the_step_and_its_weights_stay() -> None:
    run = Run(linear(*WEIGHT), DST(penalty=0.0, min_density=0.2))
    view = run.view
    view.threshold.data = torch.tensor([0.4, 0.4])  # keeps 1 of 6, at most 0.2
    weight = view.weight.detach().clone()
    view(torch.ones(3)).sum().backward()
    run.step()
    assert view.threshold.tolist() == [0.0, 0.0] and torch.equal(view.weight, weight)
    view.threshold.data = torch.tensor([0.4, 0.2])  # keeps 2
    run.step()
    assert view.threshold.tolist() == pytest.approx([0.4, 0.2])


def test_a_trained_model_gets_sparser_with_the_penalty() -> None:
    found = []
    for penalty in (0.0, 0.02):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        run = Run(model, DST(penalty=penalty), lr=0.1, weight_decay=1e-4, momentum=0.9, include=["*"])
        x = torch.randn(64, 8)

        def loss(model: nn.Module = model, x: torch.Tensor = x) -> torch.Tensor:
            return (model(x) - torch.stack([x[:, 0], x[:, 1] * 2], dim=1)).square().mean()

        run.train(60, loss)
        found.append((run.sparsifier.sparsity(), loss().item()))
    (loose, _), (tight, error) = found
    assert tight > loose + 0.1 and error < 0.3


STEPS_PER_EPOCH = 5005  # ImageNet at batch 256
DECAY = 2.251757813e-5
PUBLISHED = {10: -505.6, 20: -53.4, 25: -18.4, 30: -6.72, 35: -2.63}  # by running the published code


def learning_rate(epoch: int) -> float:
    """0.256 after five epochs of warm-up, then cosine to 0 over 95."""
    return 0.256 * ((epoch + 1) / 5 if epoch < 5 else 0.5 * (1 + math.cos(math.pi * (epoch - 5) / 95)))


def recurrence(epochs: int, steps: int = STEPS_PER_EPOCH) -> list[float]:
    """s after every epoch: v <- .875 v + wd s, s <- s - lr v; sigma'(s) underflows, so the loss has no part in it."""
    s, v, after = -3200.0, 0.0, []
    for epoch in range(epochs):
        for _ in range(steps):
            v = 0.875 * v + DECAY * s
            s -= learning_rate(epoch) * v
        after.append(s)
    return after


def train(epochs: int, steps: int = STEPS_PER_EPOCH) -> list[float]:
    run = Run(linear([0.5]), STR(threshold_init=-3200.0), lr=0.256, weight_decay=DECAY, momentum=0.875)
    s, after = run.view.threshold, []
    s.grad = torch.zeros(1)
    for epoch in range(epochs):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(epoch)
        for _ in range(steps):
            run.step()
        after.append(s.item())
    return after


@pytest.mark.parametrize("whole", [recurrence, pytest.param(train, marks=pytest.mark.long)])
def test_recurrence_and_threshold_follow_the_published_run_to_epoch_35(whole: Callable[[int], list[float]]) -> None:
    after = whole(35)
    assert {epoch: after[epoch - 1] for epoch in PUBLISHED} == pytest.approx(PUBLISHED, rel=2e-3)


def test_our_threshold_follows_the_recurrence_through_short_epochs() -> None:
    assert train(6, 100) == pytest.approx(recurrence(6, 100), rel=1e-5)
