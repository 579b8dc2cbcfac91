"""OptG: scores, their step and the masks they choose by hand; the rise over epochs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse.clock import Clock
from tritonsparse.methods import OptG

QUARTER = math.log(3.0) / 50.0  # sigma(-50 beta) = 1/4


def start(**fields: Any) -> tuple[nn.Linear, torch.optim.Optimizer, ts.Sparsifier]:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    method = OptG(**{"sparsity": 0.5, "beta": QUARTER, **fields})
    sparsifier = ts.sparsify(layer, method, total_steps=4, steps_per_epoch=2)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.5))
    sparsifier.attach(optimizer)
    return layer, optimizer, sparsifier


def scores(sparsifier: ts.Sparsifier) -> list[float]:
    return sparsifier.state_dict()["tensors"]["method:scores/"][0].tolist()


def test_scores_and_masks_by_hand() -> None:
    layer, optimizer, sparsifier = start()
    view = sparsifier.layers[""]
    # Epoch 0 of 2: sigma = 1/4, the rate .125 of 4 weights rounds to none.
    assert view.mask.all() and scores(sparsifier) == [0.0] * 4
    layer.weight.grad = torch.tensor([[1.0, 1.0, -1.0, 0.5]])
    optimizer.step()
    # g W = [1, -2, -3, 2], lr_M = .5 / 4
    assert scores(sparsifier) == pytest.approx([-0.125, 0.25, 0.375, -0.25])
    assert layer.weight[0].tolist() == [0.5, -2.5, 3.5, 3.75]
    layer.weight.grad = torch.tensor([[0.0, 0.0, 0.0, -8.0]])
    optimizer.step()
    # v = .9 [1, -2, -3, 2] + [0, 0, 0, -30]
    assert scores(sparsifier) == pytest.approx([-0.125 - 0.1125, 0.25 + 0.225, 0.375 + 0.3375, -0.25 + 3.525])
    # Epoch 1, the last: the two largest scores.
    assert view.mask.int().tolist() == [[0, 0, 1, 1]]
    # What is not kept keeps its value, and gets no gradient; its score goes on.
    assert layer.weight[0].tolist() == [0.5, -2.5, 3.5, 7.75]
    layer.weight.grad = torch.ones(1, 4)
    optimizer.step()
    assert layer.weight[0].tolist() == [0.5, -2.5, 3.0, 7.25]
    assert layer.weight.grad[0].tolist() == [0.0, 0.0, 1.0, 1.0]
    # lr_M = .5 now; v = .9 x .9 x 1 + 1 x .5
    assert scores(sparsifier)[0] == pytest.approx(-0.2375 - 0.5 * (0.81 + 0.5))
    assert view.mask.int().tolist() == [[0, 0, 1, 1]]


def test_every_weight_gets_its_dense_gradient() -> None:
    layer, _, sparsifier = start()
    sparsifier.layers[""].mask.copy_(torch.tensor([[False, False, True, True]]))
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    y = layer(x)
    assert y.item() == 4300.0
    (2.0 * y).backward()
    assert layer.weight.grad[0].tolist() == [2.0, 20.0, 200.0, 2000.0]
    assert sparsifier.method.densities(sparsifier.layers[""], 0.5).grad_weight == 1.0


def test_a_loss_scale_does_not_reach_the_scores() -> None:
    found = []
    for scale in (None, torch.tensor(8.0)):
        layer, optimizer, sparsifier = start()
        layer.weight.grad = torch.tensor([[1.0, 1.0, -1.0, 0.5]]) * (1.0 if scale is None else 8.0)
        sparsifier.method.before_step(sparsifier.layers, sparsifier.clock, optimizer, scale)
        found.append(scores(sparsifier))
    assert found[0] == found[1] != [0.0] * 4


def test_one_threshold_gives_layers_their_own_rates() -> None:
    model = nn.ModuleList(nn.Linear(4, 1, bias=False) for _ in range(2))
    sparsifier = ts.sparsify(model, OptG(sparsity=0.5, beta=QUARTER), total_steps=2, steps_per_epoch=1)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    sparsifier.attach(optimizer)
    for layer, gradient in zip(model, (-1.0, -0.1), strict=True):
        layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, -1.0]])
        layer.weight.grad = torch.full((1, 4), gradient)
    optimizer.step()
    # Scores are lr_M times [1, 2, 3, -1] and [.1, .2, .3, -.1]: of the eight, four are kept.
    assert sparsifier.layers["0"].mask.int().tolist() == [[1, 1, 1, 0]]
    assert sparsifier.layers["1"].mask.int().tolist() == [[0, 0, 1, 0]]


def test_the_rise_is_the_papers_over_a_hundred_epochs_and_whole_in_the_last() -> None:
    method = OptG(sparsity=0.9)
    clock = Clock(0, 1000, 10)
    rise = []
    for epoch in range(100):
        clock.step = 10 * epoch
        rise.append(method.rise(clock))
    assert rise == pytest.approx([1 / (1 + math.exp(-(epoch - 50))) for epoch in range(100)])
    assert rise[99] == 1.0
    clock.step = 2000
    assert method.rise(clock) == 1.0


def test_n_of_m_comes_down_one_by_one() -> None:
    layer = nn.Linear(8, 1, bias=False)
    sparsifier = ts.sparsify(layer, OptG(sparsity=0.75, beta=0.08), pattern="1:4", total_steps=8, steps_per_epoch=1)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    sparsifier.attach(optimizer)
    kept = [sparsifier.layers[""].mask.view(2, 4).sum(1).tolist()]
    for _ in range(7):
        layer.weight.grad = torch.randn(1, 8)
        optimizer.step()
        kept.append(sparsifier.layers[""].mask.view(2, 4).sum(1).tolist())
    # Rates .75 sigma(8 (e/8 - 1/2)) = .01 .03 .09 .20 .375 .55 .66, then .75 in the last epoch.
    assert kept == [[4, 4], [4, 4], [4, 4], [3, 3], [3, 3], [2, 2], [1, 1], [1, 1]]


def test_half_precision_weights_have_float32_scores() -> None:
    layer = nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    sparsifier = ts.sparsify(layer, OptG(sparsity=0.5), total_steps=2, steps_per_epoch=1)
    tensors = sparsifier.state_dict()["tensors"]
    assert tensors["method:scores/"].dtype == tensors["method:velocities/"].dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"beta": 0.0}, "beta above 0"), ({"score_momentum": 1.0}, r"score_momentum in \[0, 1\)")],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"optg: expected {words}"):
        OptG(**{"sparsity": 0.5, **fields})


def test_it_needs_the_length_of_the_run_and_of_its_epochs() -> None:
    with pytest.raises(ValueError, match="optg: expected steps_per_epoch="):
        ts.sparsify(nn.Linear(4, 4), OptG(sparsity=0.5), total_steps=10)
