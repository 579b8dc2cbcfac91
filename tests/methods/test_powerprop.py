"""PowerPropagation: the start it keeps, its gradient by hand, Top-KAST's sets on it, and what is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import Run, linear
from torch import nn
from transformers import AutoModelForCausalLM

import tritonsparse as ts
from tritonsparse.methods import PowerProp, TopKAST

Build = Callable[..., Any]
X = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])


def start(*weights: float, **fields: Any) -> Run:
    layer = linear(weights or [16.0, -9.0, 4.0, 1.0])
    return Run(layer, PowerProp(**{"sparsity": 0.75, **fields}), lr=1.0)


def gradient(run: Run) -> list[float]:
    run.model(X).sum().backward()
    return run.view.weight.grad[0].tolist()


def test_training_starts_from_the_weights_that_were_given() -> None:
    run = start()
    assert run.view.weight[0].tolist() == [4.0, -3.0, 2.0, 1.0]  # theta = sign(W) sqrt |W|
    assert run.view.effective_weight()[0].tolist() == [16.0, 0.0, 0.0, 0.0]
    assert run.model(X).item() == 16.0 and run.sparsifier.sparsity() == 0.75
    # Masks follow the trained weights.
    run.step([0.0, 0.0, -9.0, 0.0])
    assert run.view.weight[0].tolist() == [4.0, -3.0, 11.0, 1.0]
    assert run.view.effective_weight()[0].tolist() == [0.0, 0.0, 121.0, 0.0]


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
    assert gradient(start(**fields)) == expected


def test_a_weight_of_zero_gets_no_gradient_and_no_nan() -> None:
    found = gradient(start(1.0, 0.0, -0.5, 0.0, sparsity=0.25, exponent=1.5))
    assert found[0] == 1.5 and found[1] == found[3] == 0.0 and found[2] == pytest.approx(150.0 * 0.5 ** (1 / 3))


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
        generator = torch.Generator().manual_seed(0)

        def loss(model: nn.Module = run.model, generator: torch.Generator = generator) -> torch.Tensor:
            x = torch.randn(32, 8, generator=generator)
            return (model(x) - torch.tanh(x[:, :4] + x[:, 4:])).square().mean()

        run.train(100, loss)
        weight = run.views[0].powered(run.views[0].weight).detach().abs()
        near.append(float((weight < 0.05 * weight.max()).float().mean()))
    assert near[0] < near[1] < near[2], near


def test_a_copy_of_the_model_and_another_dtype_keep_the_exponent() -> None:
    layer, x = start().model, torch.randn(3, 4)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(copy.deepcopy(layer).double()(x.double()), layer(x).double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), rtol=2e-2, atol=1e-2)


def test_a_convolution_has_the_same_powers() -> None:
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
    run = start(exponent=1.5)
    expected = gradient(run)
    run.view.weight.grad = None
    run.model = torch.compile(run.model, fullgraph=True, backend="aot_eager")
    assert gradient(run) == pytest.approx(expected)


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
