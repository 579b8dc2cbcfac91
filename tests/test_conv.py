"""Sparse convolutions: the definition, the gradients, memory formats, and what methods see of their weights."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import Build, relative_error
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.layers.conv2d import SparseConv2d, is_depthwise
from tritonsparse.methods import ACDC, GMP, AutoSparse, Phases, RigL, Static

SOFT = AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="constant")
# kernel, stride, padding, dilation, groups, padding mode; each on 8 -> 12 channels.
SHAPES: list[tuple[Any, ...]] = [
    (3, 1, 1, 1, 1, "zeros"), (3, 2, 1, 1, 1, "zeros"), (1, 1, 0, 1, 1, "zeros"),
    ((3, 5), (2, 1), (0, 3), (2, 1), 1, "zeros"), (3, 1, "same", 2, 4, "zeros"), (4, 1, "same", 1, 2, "reflect"),
    (2, 3, "valid", 1, 1, "zeros"), (3, 1, 2, 1, 1, "circular"), (3, 1, 1, 1, 2, "replicate"),
]  # fmt: skip


def conv(*shape: Any, last: bool = False) -> nn.Conv2d:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    layer = nn.Conv2d(8, 12, **dict(zip(names, shape, strict=True)), dtype=torch.float64)
    # About half of them above T = sigma(-2) = 0.12.
    nn.init.normal_(layer.weight, std=0.15)
    return layer.to(memory_format=torch.channels_last) if last else layer


def sparse(model: nn.Module, method: Any = SOFT, **options: Any) -> ts.Sparsifier:
    return ts.sparsify(model, method, total_steps=10, steps_per_epoch=5, **options)


def assert_gradients(layer: Any, multiplier: Tensor, expected: Any, w_hat: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Y = conv(X, W_hat) and dX are those of `expected`, of weight W_hat; dW = m G, G being its dense gradient."""
    outputs, inputs = [], [x.clone().requires_grad_() for _ in range(2)]
    expected.weight.data.copy_(w_hat)
    for module, each in zip((layer, expected), inputs, strict=True):
        outputs.append(module(each))
        outputs[-1].backward(torch.linspace(-1, 1, outputs[0].numel()).double().reshape(outputs[0].shape))
    assert relative_error(*outputs) < 1e-12
    assert relative_error(inputs[0].grad, inputs[1].grad) < 1e-12
    assert relative_error(layer.weight.grad, multiplier * expected.weight.grad) < 1e-12
    assert relative_error(layer.bias.grad, expected.bias.grad) < 1e-12
    return layer.weight.grad, multiplier * expected.weight.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_output_and_gradients_are_the_formulas(shape: tuple[Any, ...], channels_last: bool) -> None:
    layer: Any = conv(*shape, last=channels_last)
    stock = copy.deepcopy(layer)
    sparse(nn.Sequential(layer))
    assert type(layer) is SparseConv2d
    x = torch.randn(2, 8, 11, 13, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    s, w = torch.tensor(-2.0, dtype=torch.float64), stock.weight.detach().clone()
    kept = w.abs() > s.sigmoid()
    assert 0.2 < kept.double().mean() < 0.8
    w_hat = w.sign() * F.relu(w.abs() - s.sigmoid())
    _, multiplied = assert_gradients(layer, torch.where(kept, 1.0, 0.5), stock, w_hat, x)
    slope = s.sigmoid() * (1 - s.sigmoid())
    # ds = -sigma'(s) sum(sign(W) m G); the threshold is float32.
    assert float(layer.threshold.grad) == pytest.approx(float(-slope * (w.sign() * multiplied).sum()), rel=1e-5)


# As those of `SHAPES`, but any: kernel, stride, padding, dilation, groups.
kernels, counts = (
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    (st.integers(1, 3), st.integers(0, 3), st.integers(1, 2)),
)


@given(st.tuples(kernels, *counts, st.sampled_from([1, 2, 4])), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_masks_prune_in_the_forward_and_in_dw_for_any_convolution(shape: Any, last: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer: Any = conv(*shape, "zeros", last=last)
    stock = copy.deepcopy(layer)
    sparse(nn.Sequential(layer), Static(sparsity=0.5))
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    found, _ = assert_gradients(layer, layer.mask, stock, stock.weight.detach() * layer.mask, x)
    assert not found[~layer.mask].any()


@pytest.mark.parametrize("method", [SOFT, GMP(sparsity=0.6, initial_sparsity=0.5)], ids=["soft", "mask"])
def test_channels_last_moves_masks_along_and_changes_nothing(method: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    sparse(model, method)
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    if model[2].mask is not None:
        assert model[2].mask.stride() == model[2].weight.stride()
        # A view, not a copy: the op reads the mask where it lies.
        assert model[2].oriented(model[2].mask).data_ptr() == model[2].mask.data_ptr()
    assert relative_error(model(x.to(memory_format=torch.channels_last)), expected) < 1e-6


def test_as_a_matrix_the_columns_run_over_kernel_positions_and_then_input_channels() -> None:
    layer: Any = nn.Conv2d(3, 2, 2)
    sparse(nn.Sequential(layer))
    matrix = layer.oriented(layer.weight)
    assert matrix.shape == (2, 12)
    for row, (i, j), channel in itertools.product(range(2), itertools.product(range(2), range(2)), range(3)):
        assert matrix[row, (2 * i + j) * 3 + channel] == layer.weight[row, channel, i, j]
    assert torch.equal(layer.stored(matrix), layer.weight)
    # So do a mask and the set B, which gradients reach and nothing outside it.
    sparse(nn.Sequential(layer := nn.Conv2d(4, 4, 3)), "topkast", sparsity=0.8)
    layer.grad_mask, layer.alpha = torch.rand_like(layer.weight) < 0.5, torch.tensor(0.25)
    layer(torch.randn(2, 4, 6, 6)).square().sum().backward()
    assert torch.equal(layer.weight.grad != 0, layer.mask | layer.grad_mask)


def test_blocks_span_channels_at_one_kernel_position_a_channel_is_an_output_channel_and_2_4_is_along_inputs() -> None:
    layer: Any = nn.Conv2d(8, 8, 3)
    sparse(nn.Sequential(layer), "static", sparsity=0.75, pattern="block:4x2")
    blocks = layer.mask.reshape(2, 4, 4, 2, 3, 3).float().sum(dim=(1, 3))
    assert set(blocks.unique().tolist()) == {0.0, 8.0}
    assert int((blocks > 0).sum()) == 18  # a quarter of 2 x 4 x 9
    layer = nn.Conv2d(4, 8, 3)
    sparse(nn.Sequential(layer), "static", sparsity=0.5, pattern="channel", backend="torch")
    assert sorted(layer.mask.flatten(1).float().mean(1).tolist()) == [0.0] * 4 + [1.0] * 4
    for groups in (1, 2):
        layer = nn.Conv2d(8, 4, 3, groups=groups)
        weight = layer.weight.detach().abs()
        sparse(nn.Sequential(layer), ACDC(sparsity=0.5, phases=Phases([(0, "sparse")], 2)), pattern="2:4")
        kept = layer.mask.reshape(4, -1, 4, 3, 3)
        grouped = weight.reshape(kept.shape)
        smallest = torch.where(kept, grouped, torch.inf).amin(2)
        assert (kept.sum(2) == 2).all() and (smallest >= torch.where(kept, 0.0, grouped).amax(2)).all()


def test_units_that_would_straddle_positions_or_groups_are_refused(refused: Build) -> None:
    # 3 input channels, although a row has 48 weights; 2 channels a group.
    narrow, grouped = nn.Conv2d(3, 8, 4), nn.Conv2d(8, 8, 3, groups=4)
    for layer, pattern in ((narrow, "2:4"), (narrow, "block:4"), (grouped, "block:4")):
        model = nn.Sequential(layer)
        with refused(model, ValueError, "exclude the layer"):
            sparse(model, "static", sparsity=0.5, pattern=pattern)


def test_erk_counts_the_kernel_among_the_dimensions_and_depthwise_stays_dense_unless_named() -> None:
    # raw = sum / product of dimensions: 22 / 576 and 34 / 512 of [8, 8, 3, 3] and [16, 16, 1, 2].
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(16, 16, (1, 2)))
    sparse(model, RigL(sparsity=0.9))
    eps = (576 - 518 + 512 - 460) / (22 + 35)
    assert [int(layer.mask.sum()) for layer in model] == [round(eps * 22), round(eps * 35)]

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=2))

    assert [is_depthwise(layer) for layer in build()] == [True, False, False]
    sparsifier = sparse(build())
    assert sorted(sparsifier.layers) == ["1", "2"]
    assert [(skip.name, skip.reason) for skip in sparsifier.skipped] == [("0", "depthwise convolution")]
    assert sorted(sparse(build(), include=["*"]).layers) == ["0", "1", "2"]
    assert sparse(build(), "static", sparsity=0.5, include=["0"]).sparsity() == 0.5


def test_the_state_of_channels_last_masks_is_plain_and_comes_back_and_what_is_saved_is_ordinary() -> None:
    def build() -> tuple[Any, ts.Sparsifier]:
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        sparsifier = sparse(model, "topkast", sparsity=0.6)
        return model.to(memory_format=torch.channels_last), sparsifier

    (model, first), (other, second) = build(), build()
    saved = first.state_dict()
    assert saved["tensors"] and all(tensor.is_contiguous() for tensor in saved["tensors"].values())
    second.load_state_dict(saved)
    for ours, theirs in ((other[0], model[0]), (other[3], model[3])):
        assert torch.equal(ours.mask, theirs.mask) and ours.mask.stride() == ours.weight.stride()
    assert not other[0].mask.is_contiguous()
    x = torch.randn(2, 4, 8, 8)
    expected, share = model.eval()(x), first.sparsity()
    stock = copy.deepcopy(first.finalize())
    assert [type(module) for module in stock] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert torch.equal(stock(x), expected)
    weights = torch.cat([stock[i].weight.flatten() for i in (0, 3)])
    assert int((weights == 0).sum()) == round(share * len(weights)) > 0
