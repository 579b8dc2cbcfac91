"""PowerPropagation: the start it keeps, its gradient by hand, Top-KAST's sets on it, and what is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tritonsparse as ts
from tritonsparse.methods import PowerProp, TopKAST

Build = Callable[..., Any]


def start(**fields: Any) -> tuple[nn.Linear, torch.optim.Optimizer, ts.Sparsifier]:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[16.0, -9.0, 4.0, 1.0]])
    sparsifier = ts.sparsify(layer, PowerProp(**{"sparsity": 0.75, **fields}))
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=1.0))
    sparsifier.attach(optimizer)
    return layer, optimizer, sparsifier


def gradient(layer: nn.Linear) -> list[float]:
    layer(torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad[0].tolist()


def test_training_starts_from_the_weights_that_were_given() -> None:
    layer, _, sparsifier = start()
    assert layer.weight[0].tolist() == [4.0, -3.0, 2.0, 1.0]  # theta = sign(W) sqrt |W|
    assert sparsifier.layers[""].effective_weight()[0].tolist() == [16.0, 0.0, 0.0, 0.0]
    assert layer(torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).item() == 16.0
    assert sparsifier.sparsity() == 0.75


def test_the_gradient_is_that_of_the_power() -> None:
    # a |theta| g = 2 x 4 x 1, 2 x 3 x 10, 2 x 2 x 100, 2 x 1 x 1000
    assert gradient(start()[0]) == [8.0, 60.0, 400.0, 2000.0]
    assert gradient(start(backward_sparsity=0.5)[0]) == [8.0, 60.0, 0.0, 0.0]
    assert gradient(start(alpha=0.5)[0]) == [8.0, 30.0, 200.0, 1000.0]
    assert gradient(start(alpha=0.0)[0]) == [8.0, 0.0, 0.0, 0.0]


def test_a_weight_of_zero_gets_no_gradient_and_no_nan() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.0, -0.5, 0.0]])
    ts.sparsify(layer, PowerProp(sparsity=0.25, exponent=1.5))
    found = gradient(layer)
    assert found[0] == 1.5 and found[1] == found[3] == 0.0 and found[2] == pytest.approx(150.0 * 0.5 ** (1 / 3))


def test_masks_follow_the_trained_weights() -> None:
    layer, optimizer, sparsifier = start()
    layer.weight.grad = torch.tensor([[0.0, 0.0, -9.0, 0.0]])
    optimizer.step()
    assert layer.weight[0].tolist() == [4.0, -3.0, 11.0, 1.0]
    assert sparsifier.layers[""].effective_weight()[0].tolist() == [0.0, 0.0, 121.0, 0.0]


def test_blocks_are_chosen_by_the_powers_and_not_by_the_roots() -> None:
    layer = nn.Linear(4, 2, bias=False)
    # Sums of |W| by block: 101 and 50; of |theta|: 10.2 .. 11.1 and 4 x sqrt(12.5) = 14.1.
    layer.weight.data = torch.tensor([[100.0, 0.5, 12.5, 12.5], [0.25, 0.25, 12.5, 12.5]])
    sparsifier = ts.sparsify(layer, PowerProp(sparsity=0.5), pattern="block:2")
    for _ in range(2):
        assert sparsifier.layers[""].mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
        sparsifier.method._refresh(sparsifier.layers)


def test_with_exponent_one_it_is_topkast_bit_for_bit(mlp: Build) -> None:
    runs = []
    for method in (
        TopKAST(sparsity=0.7, backward_sparsity=0.5, penalty=1e-3),
        PowerProp(sparsity=0.7, backward_sparsity=0.5, penalty=1e-3, exponent=1.0),
    ):
        model = mlp().eval()
        sparsifier = ts.sparsify(model, method)
        optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=0.01, weight_decay=0.1))
        sparsifier.attach(optimizer)
        for step in range(6):
            torch.manual_seed(step)
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


@pytest.mark.parametrize("pattern", ["2:4", "channel", "block:3"])
def test_a_refusal_leaves_the_weights_as_they_were(mlp: Build, refused: Any, pattern: str) -> None:
    model = mlp()
    with refused(model, ValueError):
        ts.sparsify(model, PowerProp(sparsity=0.5), pattern=pattern)


def test_small_weights_stay_small(mlp: Build) -> None:
    """The paper's figure 1: after the same training more of the weights lie near 0."""
    near = []
    for exponent in (1.0, 2.0, 4.0):
        model = mlp().eval()
        sparsifier = ts.sparsify(model, PowerProp(sparsity=0.1, exponent=exponent))
        optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.05), momentum=0.9)
        sparsifier.attach(optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(150):
            x = torch.randn(32, 8, generator=generator)
            (model(x) - torch.tanh(x[:, :4] + x[:, 4:])).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weight = sparsifier.layers["0"].powered(sparsifier.layers["0"].weight).detach().abs()
        near.append(float((weight < 0.05 * weight.max()).float().mean()))
    assert near[0] < near[1] < near[2], near


def test_a_copy_of_the_model_and_another_dtype_keep_the_exponent() -> None:
    layer, _, _ = start()
    x = torch.randn(3, 4)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(copy.deepcopy(layer).double()(x.double()), layer(x).double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), rtol=2e-2, atol=1e-2)


def test_a_convolution_has_the_same_powers(mlp: Build) -> None:
    linear, conv = nn.Linear(6, 4), nn.Conv2d(6, 4, 1)
    conv.weight.data, conv.bias.data = linear.weight.data[:, :, None, None].clone(), linear.bias.data.clone()
    x, found = torch.randn(5, 6), []
    for layer, given in ((linear, x), (conv, x[:, :, None, None])):
        ts.sparsify(layer, PowerProp(sparsity=0.5, exponent=3.0))
        layer(given).square().sum().backward()
        found.append((layer(given).flatten(), layer.weight.grad.flatten()))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_a_compiled_layer_has_one_graph_and_the_same_gradient() -> None:
    layer, _, _ = start(exponent=1.5)
    expected = gradient(layer)
    layer.weight.grad = None
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).sum().backward()
    assert layer.weight.grad[0].tolist() == pytest.approx(expected)


def test_what_is_saved_is_w_and_training_goes_on_from_theta(gpt2: Build, tmp_path: Path) -> None:
    model = gpt2().eval()
    sparsifier = ts.sparsify(model, PowerProp(sparsity=0.5, exponent=3.0))
    ids = torch.randint(0, 32, (2, 7))
    expected = model(ids).logits
    sparsifier.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(stock(ids).logits, expected)
    loaded, again = ts.load(tmp_path, AutoModelForCausalLM)
    assert torch.equal(loaded.eval()(ids).logits, expected)
    for name, layer in again.layers.items():
        assert torch.equal(layer.weight, sparsifier.layers[name].weight)
        assert layer.exponent == 3.0
    finalized = sparsifier.finalize()
    assert torch.equal(finalized(ids).logits, expected)
    assert not any(hasattr(module, "exponent") for module in finalized.modules())


@pytest.mark.parametrize("exponent", [0.9, float("nan"), float("inf")])
def test_an_exponent_below_one_is_refused(exponent: float) -> None:
    with pytest.raises(ValueError, match="powerprop: expected an exponent of at least 1"):
        PowerProp(sparsity=0.5, exponent=exponent)
