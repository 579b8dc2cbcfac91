"""DST by hand: cut-offs a row, the estimator's gradients, the penalty, the restart."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from method_runs import Run, linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from tritonsparse.methods import DST

WEIGHT = [0.5, -0.25, 0.0], [0.1, 0.2, -0.3]


def test_cut_offs_start_at_zero_and_prune_exact_zeros_alone() -> None:
    run = Run(linear(*WEIGHT), DST())
    assert run.view.kind == "step" and run.view.threshold.tolist() == [0.0, 0.0]
    assert run.view.kept_count() == 5
    assert torch.equal(run.model(torch.eye(3)), run.view.weight.t())


def test_one_step_by_hand() -> None:
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


@pytest.mark.parametrize("scale", [None, 8.0])
def test_the_penalty_pushes_cut_offs_up_by_exp_minus_t(scale: float | None) -> None:
    run = Run(linear(*WEIGHT), DST(penalty=0.5), lr=1.0)
    threshold = run.view.threshold
    threshold.data = torch.tensor([0.0, math.log(2.0)])
    threshold.grad = torch.zeros(2)
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


def test_a_transposed_weight_has_a_cut_off_for_every_output_too() -> None:
    conv1d = Conv1D(2, 3)
    conv1d.weight.data = torch.tensor(WEIGHT).t().contiguous()
    view = Run(conv1d, DST(penalty=0.0)).view
    assert view.threshold.shape == (1, 2)
    view.threshold.data = torch.tensor([[0.3, 0.15]])
    assert view.effective_weight().t().tolist() == [[0.5, 0.0, 0.0], [0.0, pytest.approx(0.2), pytest.approx(-0.3)]]
    view(torch.ones(3))[0].backward()
    assert view.threshold.grad[0].tolist() == pytest.approx([-0.15, 0.0])


def error(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (model(x) - target).square().mean()


def test_a_trained_model_gets_sparser_with_the_penalty() -> None:
    found = []
    for penalty in (0.0, 0.02):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        run = Run(model, DST(penalty=penalty), lr=0.1, weight_decay=1e-4, momentum=0.9, include=["*"])
        x = torch.randn(64, 8)
        target = torch.stack([x[:, 0], x[:, 1] * 2], dim=1)
        run.train(60, functools.partial(error, model, x, target))
        found.append((run.sparsifier.sparsity(), error(model, x, target).item()))
    (loose, _), (tight, loss) = found
    assert tight > loose + 0.1 and loss < 0.3
