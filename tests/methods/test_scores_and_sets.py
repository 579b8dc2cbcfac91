"""OptG's scores, Top-KAST's two sets and PowerPropagation's powers, by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import Run, linear, two
from torch import nn
from transformers import AutoModelForCausalLM

import tritonsparse as ts
from tritonsparse.clock import Clock
from tritonsparse.methods import OptG, PowerProp, TopKAST

Build = Callable[..., Any]
QUARTER = math.log(3.0) / 50.0  # sigma(-50 beta) = 1/4
X = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])


def optg(**fields: Any) -> Run:
    method = OptG(**{"sparsity": 0.5, "beta": QUARTER, **fields})
    return Run(linear([1.0, -2.0, 3.0, 4.0]), method, lr=0.5, total_steps=4, steps_per_epoch=2)


def test_scores_and_masks_by_hand() -> None:
    run = optg()
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
    # One threshold gives layers their own rates.
    run = Run(two(4), OptG(sparsity=0.5, beta=QUARTER), lr=0.1, total_steps=2, steps_per_epoch=1)
    run.place(*[[1.0, 2.0, 3.0, -1.0]] * 2).step(-1.0, -0.1)
    # Scores are lr_M times [1, 2, 3, -1] and [.1, .2, .3, -.1]: of the eight, four are kept.
    assert run.masks() == [[[1, 1, 1, 0]], [[0, 0, 1, 0]]]


def test_every_weight_gets_its_dense_gradient_and_a_loss_scale_does_not_reach_the_float32_scores() -> None:
    run = optg()
    run.view.mask.copy_(torch.tensor([[False, False, True, True]]))
    y = run.model(X)
    assert y.item() == 4300.0
    (2.0 * y).backward()
    assert run.view.weight.grad[0].tolist() == [2.0, 20.0, 200.0, 2000.0]
    assert run.method.densities(run.view, 0.5).grad_weight == 1.0
    found = []
    for scale in (None, 8.0):
        run = optg()
        run.give(torch.tensor([1.0, 1.0, -1.0, 0.5]) * (scale or 1.0))
        run.before_step(scale)
        found.append(run.saved("scores"))
    assert found[0] == found[1] != [0.0] * 4
    run = Run(nn.Linear(4, 1, bias=False).to(torch.bfloat16), OptG(sparsity=0.5), total_steps=2, steps_per_epoch=1)
    tensors = run.sparsifier.state_dict()["tensors"]
    assert tensors["method:scores/"].dtype == tensors["method:velocities/"].dtype == torch.float32


def test_the_rise_is_the_papers_and_whole_in_the_last_epoch_and_n_of_m_comes_down_one_by_one() -> None:
    rise = [OptG(sparsity=0.9).rise(Clock(10 * epoch, 1000, 10)) for epoch in range(100)]
    assert rise == pytest.approx([1 / (1 + math.exp(-(epoch - 50))) for epoch in range(100)])
    assert rise[99] == OptG(sparsity=0.9).rise(Clock(2000, 1000, 10)) == 1.0
    method, model = OptG(sparsity=0.75, beta=0.08), nn.Linear(8, 1, bias=False)
    run, kept = Run(model, method, lr=0.1, pattern="1:4", total_steps=8, steps_per_epoch=1), []
    for _ in range(8):
        kept.append(run.view.mask.view(2, 4).sum(1).tolist())
        run.step(torch.randn(1, 8))
    # Rates .75 sigma(8 (e/8 - 1/2)) = .01 .03 .09 .20 .375 .55 .66, then .75 in the last epoch.
    assert kept == [[4, 4], [4, 4], [4, 4], [3, 3], [3, 3], [2, 2], [1, 1], [1, 1]]


def topkast(**fields: Any) -> Run:
    return Run(linear([4.0, -3.0, 2.0, 1.0]), TopKAST(**{"sparsity": 0.75, "penalty": 0.0, **fields}), lr=1.0)


# A = {4}, D = .25; the cost is METHODS' check of AutoSparse's table, (2 D + |B|) / 3.
@pytest.mark.parametrize(
    ("fields", "gradient", "training"),
    [
        ({"backward_sparsity": 0.5}, [1.0, 10.0, 0.0, 0.0], (0.5 + 0.5) / 3),  # B = {4, -3}
        ({}, [1.0, 10.0, 100.0, 1000.0], (0.5 + 1.0) / 3),
        ({"alpha": 0.5}, [1.0, 5.0, 50.0, 500.0], (0.5 + 1.0) / 3),
        # Top-KAST with B = A, in both ways.
        ({"alpha": 0.0}, [1.0, 0.0, 0.0, 0.0], 0.75 / 3),
        ({"backward_sparsity": 0.75}, [1.0, 0.0, 0.0, 0.0], 0.75 / 3),
    ],
    ids=str,
)
def test_forward_sees_a_and_the_gradient_reaches_b(fields: Any, gradient: list[float], training: float) -> None:
    run = topkast(**fields)
    assert run.model(X).item() == 4.0 and run.gradient(X) == gradient
    assert run.method.densities(run.view, 0.25).training == pytest.approx(training)


def test_the_penalty_is_one_on_a_and_one_over_the_density_on_the_rest_of_b_and_scaled_as_gradients_are() -> None:
    run = topkast(backward_sparsity=0.5, penalty=0.1)
    run.step(0.0)
    # A: 4 - .1 x 4; B \ A: -3 - .1 x (1 / .25) x -3; outside B nothing.
    assert run.view.weight[0].tolist() == pytest.approx([3.6, -1.8, 2.0, 1.0])
    assert run.masks() == [[[1, 0, 0, 0]]]
    # B is chosen anew: 2 has overtaken -1.8.
    assert run.view.grad_mask.int().tolist() == [[1, 0, 1, 0]]
    run = topkast(penalty=0.1)
    run.give(0.0)
    run.before_step(8.0)
    assert run.view.weight.grad[0].tolist() == pytest.approx([3.2, -9.6, 6.4, 3.2])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_outside_b_nothing_moves_whatever_the_optimizer_remembers(optimizer: str) -> None:
    model = linear([4.0, -3.0, 2.0, 1.0])
    method = TopKAST(sparsity=0.75, backward_sparsity=0.5, penalty=0.0, refresh_every=2)
    sparsifier = ts.sparsify(model, method)
    (layer,) = sparsifier.layers.values()
    kinds: dict[str, Any] = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}
    stepper = kinds[optimizer](sparsifier.param_groups(lr=0.5, weight_decay=0.1))
    sparsifier.attach(stepper)
    sets = []
    for gradient in ([0.0, -3.0, 0.0, 0.0], [0.0, -3.0, 0.0, 0.0], [0.5] * 4, [0.5] * 4, [0.5] * 4):
        before, superset = layer.weight.detach().clone(), layer.mask | layer.grad_mask
        sets.append(superset.int().tolist())
        layer.weight.grad = torch.tensor([gradient])
        stepper.step()
        moved = layer.weight != before
        assert not moved[~superset].any() and moved[superset].all()
    # One has left B with its momentum, which would have moved it.
    assert [[1, 1, 0, 0]] in sets and [[1, 0, 1, 0]] in sets


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_a_weight_outside_a_comes_back_when_it_has_grown_and_sets_are_refreshed(refresh_every: int) -> None:
    run = topkast(refresh_every=refresh_every)
    for step in (1, 2):
        run.step([0.0, 0.0, -9.0, 0.0])
        assert run.view.weight[0].tolist() == [4.0, -3.0, 2.0 + 9.0 * step, 1.0]
        assert run.masks() == [[[0, 0, 1, 0] if step >= refresh_every else [1, 0, 0, 0]]]


def powerprop(*weights: float, **fields: Any) -> Run:
    return Run(linear(weights or [16.0, -9.0, 4.0, 1.0]), PowerProp(**{"sparsity": 0.75, **fields}), lr=1.0)


def test_training_starts_from_the_weights_that_were_given() -> None:
    run = powerprop()
    assert run.view.weight[0].tolist() == [4.0, -3.0, 2.0, 1.0]  # theta = sign(W) sqrt |W|
    assert run.view.effective_weight()[0].tolist() == [16.0, 0.0, 0.0, 0.0]
    assert run.model(X).item() == 16.0 and run.sparsifier.sparsity() == 0.75
    # Masks follow the trained weights.
    run.step([0.0, 0.0, -9.0, 0.0])
    assert run.view.weight[0].tolist() == [4.0, -3.0, 11.0, 1.0]
    assert run.view.effective_weight()[0].tolist() == [0.0, 0.0, 121.0, 0.0]
    # A weight of zero gets no gradient and no NaN.
    found = powerprop(1.0, 0.0, -0.5, 0.0, sparsity=0.25, exponent=1.5).gradient(X)
    assert found[0] == 1.5 and found[1] == found[3] == 0.0 and found[2] == pytest.approx(150.0 * 0.5 ** (1 / 3))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # a |theta| g = 2 x 4 x 1, 2 x 3 x 10, 2 x 2 x 100, 2 x 1 x 1000
        ({}, [8.0, 60.0, 400.0, 2000.0]),
        ({"backward_sparsity": 0.5}, [8.0, 60.0, 0.0, 0.0]),
        ({"alpha": 0.5}, [8.0, 30.0, 200.0, 1000.0]),
        ({"alpha": 0.0}, [8.0, 0.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_power(fields: dict[str, float], expected: list[float]) -> None:
    assert powerprop(**fields).gradient(X) == expected


def test_blocks_are_chosen_by_the_powers_and_not_by_the_roots() -> None:
    # Sums of |W| by block: 101 and 50; of |theta|: 10.2 .. 11.1 and 4 x sqrt(12.5) = 14.1.
    layer = linear([100.0, 0.5, 12.5, 12.5], [0.25, 0.25, 12.5, 12.5])
    run = Run(layer, PowerProp(sparsity=0.5), pattern="block:2")
    for _ in range(2):
        assert run.masks() == [[[1, 1, 0, 0], [1, 1, 0, 0]]]
        run.method._refresh(run.sparsifier.layers)


def test_with_exponent_one_it_is_topkast_bit_for_bit(mlp: Build) -> None:
    runs = []
    fields = {"sparsity": 0.7, "backward_sparsity": 0.5, "penalty": 1e-3}
    for method in (TopKAST(**fields), PowerProp(**fields, exponent=1.0)):
        run = Run(mlp().eval(), method, lr=0.01, weight_decay=0.1, optimizer=torch.optim.AdamW)
        torch.manual_seed(0)
        run.train(6, lambda model=run.model: model(torch.randn(4, 8)).square().sum())
        runs.append([parameter.detach() for parameter in run.model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


def test_small_weights_stay_small(mlp: Build) -> None:
    """The paper's figure 1: after the same training more of the weights lie near 0."""
    near = []
    for exponent in (1.0, 2.0, 4.0):
        run = Run(mlp().eval(), PowerProp(sparsity=0.1, exponent=exponent), lr=0.05, momentum=0.9)
        torch.manual_seed(0)

        def loss(model: nn.Module = run.model) -> torch.Tensor:
            x = torch.randn(32, 8)
            return (model(x) - torch.tanh(x[:, :4] + x[:, 4:])).square().mean()

        run.train(50, loss)
        weight = run.views[0].powered(run.views[0].weight).detach().abs()
        near.append(float((weight < 0.05 * weight.max()).float().mean()))
    assert near[0] < near[1] < near[2], near


def test_a_copy_another_dtype_and_a_convolution_have_the_same_powers() -> None:
    layer, x = powerprop().model, torch.randn(3, 4)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(copy.deepcopy(layer).double()(x.double()), layer(x).double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), rtol=2e-2, atol=1e-2)
    layer, conv = nn.Linear(6, 4), nn.Conv2d(6, 4, 1)
    conv.weight.data, conv.bias.data = layer.weight.data[:, :, None, None].clone(), layer.bias.data.clone()
    x, found = torch.randn(5, 6), []
    for module, given in ((layer, x), (conv, x[:, :, None, None])):
        ts.sparsify(module, PowerProp(sparsity=0.5, exponent=3.0))
        module(given).square().sum().backward()
        found.append((module(given).flatten(), module.weight.grad.flatten()))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_a_compiled_layer_has_one_graph_and_the_same_gradient() -> None:
    run = powerprop(exponent=1.5)
    expected = run.gradient(X)
    run.view.weight.grad = None
    run.model = torch.compile(run.model, fullgraph=True, backend="aot_eager")
    assert run.gradient(X) == pytest.approx(expected)


def test_what_is_saved_is_w_and_training_goes_on_from_theta(gpt2: Build, tmp_path: Path) -> None:
    model, ids = gpt2().eval(), torch.randint(0, 32, (2, 7))
    sparsifier = ts.sparsify(model, PowerProp(sparsity=0.5, exponent=3.0))
    expected = model(ids).logits
    sparsifier.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    loaded, again = ts.load(tmp_path, AutoModelForCausalLM)
    assert torch.equal(stock(ids).logits, expected) and torch.equal(loaded.eval()(ids).logits, expected)
    for name, layer in again.layers.items():
        assert torch.equal(layer.weight, sparsifier.layers[name].weight) and layer.exponent == 3.0
    finalized = sparsifier.finalize()
    assert torch.equal(finalized(ids).logits, expected)
    assert not any(hasattr(module, "exponent") for module in finalized.modules())
