"""OptG: scores, their step and the masks they choose by hand; the rise over epochs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from method_runs import Run, linear, two
from torch import nn

from tritonsparse.clock import Clock
from tritonsparse.methods import OptG

QUARTER = math.log(3.0) / 50.0  # sigma(-50 beta) = 1/4


def start(**fields: Any) -> Run:
    method = OptG(**{"sparsity": 0.5, "beta": QUARTER, **fields})
    return Run(linear([1.0, -2.0, 3.0, 4.0]), method, lr=0.5, total_steps=4, steps_per_epoch=2)


def test_scores_and_masks_by_hand() -> None:
    run = start()
    view = run.view
    # Epoch 0 of 2: sigma = 1/4, the rate .125 of 4 weights rounds to none.
    assert view.mask.all() and run.saved("scores") == [0.0] * 4
    run.step([1.0, 1.0, -1.0, 0.5])
    # g W = [1, -2, -3, 2], lr_M = .5 / 4
    assert run.saved("scores") == pytest.approx([-0.125, 0.25, 0.375, -0.25])
    assert view.weight[0].tolist() == [0.5, -2.5, 3.5, 3.75]
    run.step([0.0, 0.0, 0.0, -8.0])
    # v = .9 [1, -2, -3, 2] + [0, 0, 0, -30]
    assert run.saved("scores") == pytest.approx([-0.125 - 0.1125, 0.25 + 0.225, 0.375 + 0.3375, -0.25 + 3.525])
    # Epoch 1, the last: the two largest scores.
    assert run.masks() == [[[0, 0, 1, 1]]]
    # What is not kept keeps its value, and gets no gradient; its score goes on.
    assert view.weight[0].tolist() == [0.5, -2.5, 3.5, 7.75]
    run.step(1.0)
    assert view.weight[0].tolist() == [0.5, -2.5, 3.0, 7.25]
    assert view.weight.grad[0].tolist() == [0.0, 0.0, 1.0, 1.0]
    # lr_M = .5 now; v = .9 x .9 x 1 + 1 x .5
    assert run.saved("scores")[0] == pytest.approx(-0.2375 - 0.5 * (0.81 + 0.5))
    assert run.masks() == [[[0, 0, 1, 1]]]


def test_every_weight_gets_its_dense_gradient() -> None:
    run = start()
    run.view.mask.copy_(torch.tensor([[False, False, True, True]]))
    y = run.model(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert y.item() == 4300.0
    (2.0 * y).backward()
    assert run.view.weight.grad[0].tolist() == [2.0, 20.0, 200.0, 2000.0]
    assert run.method.densities(run.view, 0.5).grad_weight == 1.0


def test_a_loss_scale_does_not_reach_the_scores() -> None:
    found = []
    for scale in (None, 8.0):
        run = start()
        run.give(torch.tensor([1.0, 1.0, -1.0, 0.5]) * (scale or 1.0))
        run.before_step(scale)
        found.append(run.saved("scores"))
    assert found[0] == found[1] != [0.0] * 4


def test_one_threshold_gives_layers_their_own_rates() -> None:
    run = Run(two(4), OptG(sparsity=0.5, beta=QUARTER), lr=0.1, total_steps=2, steps_per_epoch=1)
    for view in run.views:
        view.weight.data = torch.tensor([[1.0, 2.0, 3.0, -1.0]])
    run.step(-1.0, -0.1)
    # Scores are lr_M times [1, 2, 3, -1] and [.1, .2, .3, -.1]: of the eight, four are kept.
    assert run.masks() == [[[1, 1, 1, 0]], [[0, 0, 1, 0]]]


def test_the_rise_is_the_papers_over_a_hundred_epochs_and_whole_in_the_last() -> None:
    rise = [OptG(sparsity=0.9).rise(Clock(10 * epoch, 1000, 10)) for epoch in range(100)]
    assert rise == pytest.approx([1 / (1 + math.exp(-(epoch - 50))) for epoch in range(100)])
    assert rise[99] == OptG(sparsity=0.9).rise(Clock(2000, 1000, 10)) == 1.0


def test_n_of_m_comes_down_one_by_one() -> None:
    run = Run(
        nn.Linear(8, 1, bias=False), OptG(sparsity=0.75, beta=0.08), lr=0.1, pattern="1:4", total_steps=8,
        steps_per_epoch=1,
    )  # fmt: skip
    kept = [run.view.mask.view(2, 4).sum(1).tolist()]
    for _ in range(7):
        run.step(torch.randn(1, 8))
        kept.append(run.view.mask.view(2, 4).sum(1).tolist())
    # Rates .75 sigma(8 (e/8 - 1/2)) = .01 .03 .09 .20 .375 .55 .66, then .75 in the last epoch.
    assert kept == [[4, 4], [4, 4], [4, 4], [3, 3], [3, 3], [2, 2], [1, 1], [1, 1]]


def test_half_precision_weights_have_float32_scores() -> None:
    run = Run(nn.Linear(4, 1, bias=False).to(torch.bfloat16), OptG(sparsity=0.5), total_steps=2, steps_per_epoch=1)
    tensors = run.sparsifier.state_dict()["tensors"]
    assert tensors["method:scores/"].dtype == tensors["method:velocities/"].dtype == torch.float32
