"""DST by hand: cut-offs a row, the estimator's gradients, the penalty, the restart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.methods import DST


def made(method: DST, module: nn.Module | None = None) -> tuple[nn.Module, ts.Sparsifier]:
    model = nn.Sequential(nn.Linear(3, 2, bias=False) if module is None else module)
    if module is None:
        model[0].weight.data = torch.tensor([[0.5, -0.25, 0.0], [0.1, 0.2, -0.3]])
    return model, ts.sparsify(model, method, include=["*"])


def test_cut_offs_start_at_zero_and_prune_exact_zeros_alone() -> None:
    model, sparsifier = made(DST())
    layer = sparsifier.layers["0"]
    assert layer.kind == "step" and layer.threshold is not None and layer.threshold.tolist() == [0.0, 0.0]
    assert layer.kept_count() == 5
    assert torch.equal(model(torch.eye(3)), model[0].weight.t())


def test_one_step_by_hand() -> None:
    # y = W x with x = (1, 1, 1) and dL/dy = (1, 0): g = [[1, 1, 1], [0, 0, 0]].   t = (0.3, 0)
    model, sparsifier = made(DST(penalty=0.0))
    layer = sparsifier.layers["0"]
    assert layer.threshold is not None
    layer.threshold.data[0] = 0.3
    model(torch.ones(3))[0].backward()
    # q = |w| - t = (0.2, -0.05, -0.3); H = 2 - 4|q| = (1.2, 1.8, 0.8)
    # m = 1[kept] + |w| H = (1 + 0.6, 0.45, 0)
    assert layer.weight.grad is not None and layer.threshold.grad is not None
    assert layer.weight.grad[0].tolist() == pytest.approx([1.6, 0.45, 0.0])
    assert layer.weight.grad[1].tolist() == [0.0, 0.0, 0.0]
    # dt = -sum(w H g) = -(0.6 - 0.45)
    assert layer.threshold.grad.tolist() == pytest.approx([-0.15, 0.0])


@pytest.mark.parametrize("scale", [None, 8.0])
def test_the_penalty_pushes_cut_offs_up_by_exp_minus_t(scale: float | None) -> None:
    _, sparsifier = made(DST(penalty=0.5))
    layer = sparsifier.layers["0"]
    assert layer.threshold is not None
    layer.threshold.data = torch.tensor([0.0, math.log(2.0)])
    layer.threshold.grad = torch.zeros(2)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=1.0))
    factor = None if scale is None else torch.tensor(scale)
    sparsifier.method.before_step(sparsifier.layers, sparsifier.clock, optimizer, factor)
    # d/dt penalty exp(-t) = -0.5 (1, 1/2)
    assert layer.threshold.grad.tolist() == pytest.approx([-0.5 * (scale or 1.0), -0.25 * (scale or 1.0)])


def test_a_layer_that_fell_starts_again_after_the_step_and_its_weights_stay() -> None:
    model, sparsifier = made(DST(penalty=0.0, min_density=0.2))
    layer = sparsifier.layers["0"]
    assert layer.threshold is not None
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.0))
    sparsifier.attach(optimizer)
    layer.threshold.data = torch.tensor([0.4, 0.4])  # keeps 1 of 6, at most 0.2
    weight = layer.weight.detach().clone()
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    assert layer.threshold.tolist() == [0.0, 0.0] and torch.equal(layer.weight, weight)
    layer.threshold.data = torch.tensor([0.4, 0.2])  # keeps 2
    optimizer.step()
    assert layer.threshold.tolist() == pytest.approx([0.4, 0.2])


def test_a_transposed_weight_has_a_cut_off_for_every_output_too() -> None:
    conv1d = Conv1D(2, 3)
    conv1d.weight.data = torch.tensor([[0.5, -0.25, 0.0], [0.1, 0.2, -0.3]]).t().contiguous()
    model, sparsifier = made(DST(penalty=0.0), conv1d)
    layer = sparsifier.layers["0"]
    assert layer.threshold is not None and layer.threshold.shape == (1, 2)
    layer.threshold.data = torch.tensor([[0.3, 0.15]])
    assert layer.effective_weight().t().tolist() == [[0.5, 0.0, 0.0], [0.0, pytest.approx(0.2), pytest.approx(-0.3)]]
    model(torch.ones(3))[0].backward()
    assert layer.threshold.grad is not None and layer.threshold.grad[0].tolist() == pytest.approx([-0.15, 0.0])


def test_a_trained_model_gets_sparser_with_the_penalty() -> None:
    found = []
    for penalty in (0.0, 0.02):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        sparsifier = ts.sparsify(model, DST(penalty=penalty), include=["*"])
        optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1, weight_decay=1e-4), momentum=0.9)
        sparsifier.attach(optimizer)
        x = torch.randn(64, 8)
        target = torch.stack([x[:, 0], x[:, 1] * 2], dim=1)
        for _ in range(60):
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((sparsifier.sparsity(), loss.item()))
    (loose, _), (tight, loss) = found
    assert tight > loose + 0.1 and loss < 0.3


def test_what_cannot_be_asked_for_is_refused() -> None:
    for arguments, message in (
        ({"sparsity": 0.8}, "expected no sparsity, or 0"),
        ({"penalty": -1.0}, "a penalty of at least 0"),
        ({"min_density": 1.0}, r"min_density in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            DST(**arguments)
