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
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import tritonsparse as ts
from tritonsparse.layers.conv2d import SparseConv2d, is_depthwise
from tritonsparse.methods import ACDC, GMP, AutoSparse, Phases, RigL, Static
from tritonsparse.pattern import parse

quick = settings(max_examples=40, deadline=None)
SOFT = AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="constant")
# kernel, stride, padding, dilation, groups, padding mode; each on 8 -> 12 channels.
SHAPES: list[tuple[Any, ...]] = [
    (3, 1, 1, 1, 1, "zeros"),
    (3, 2, 1, 1, 1, "zeros"),
    (1, 1, 0, 1, 1, "zeros"),
    ((3, 5), (2, 1), (0, 3), (2, 1), 1, "zeros"),
    (3, 1, "same", 2, 4, "zeros"),
    (4, 1, "same", 1, 2, "reflect"),
    (2, 3, "valid", 1, 1, "zeros"),
    (3, 1, 2, 1, 1, "circular"),
    (3, 1, 1, 1, 2, "replicate"),
]


def conv(kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int, mode: str) -> nn.Conv2d:
    layer = nn.Conv2d(
        8, 12, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=mode
    ).double()
    # About half of them above T = sigma(-2) = 0.12.
    nn.init.normal_(layer.weight, std=0.15)
    return layer


def sparse(model: nn.Module, method: Any = SOFT, **options: Any) -> ts.Sparsifier:
    return ts.sparsify(model, method, total_steps=10, steps_per_epoch=5, **options)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_output_and_gradients_are_the_formulas(shape: tuple[Any, ...], channels_last: bool) -> None:
    """Y = conv(X, soft(W)); dW = m G with G the dense gradient, m = 1 or alpha; ds = -sigma'(s) sum(sign(W) m G)."""
    layer = conv(*shape)
    stock = copy.deepcopy(layer)
    sparse(nn.Sequential(layer))
    assert type(layer) is SparseConv2d
    x = torch.randn(2, 8, 11, 13, dtype=torch.float64)
    if channels_last:
        layer.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    ours = x.clone().requires_grad_()
    y = layer(ours)
    grad = torch.randn_like(y)
    y.backward(grad)

    s = torch.tensor(-2.0, dtype=torch.float64)
    w = stock.weight.detach()
    w_hat = (w.sign() * F.relu(w.abs() - s.sigmoid())).requires_grad_()
    theirs = x.clone().requires_grad_()
    stock.weight = nn.Parameter(w_hat.detach().clone())
    expected = stock(theirs)
    expected.backward(grad)
    kept = w.abs() > s.sigmoid()
    assert 0.2 < kept.double().mean() < 0.8
    multiplied = torch.where(kept, 1.0, 0.5) * stock.weight.grad
    slope = s.sigmoid() * (1 - s.sigmoid())
    assert relative_error(y, expected) < 1e-12
    assert relative_error(ours.grad, theirs.grad) < 1e-12
    assert relative_error(layer.weight.grad, multiplied) < 1e-12
    assert relative_error(layer.bias.grad, stock.bias.grad) < 1e-12
    # The threshold is float32.
    assert float(layer.threshold.grad) == pytest.approx(float(-slope * (w.sign() * multiplied).sum()), rel=1e-5)


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2),
    st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
@quick
def test_masks_prune_in_the_forward_and_in_dw_for_any_convolution(
    kernel: tuple[int, int], stride: int, padding: int, dilation: int, groups: int, last: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = conv(kernel, stride, padding, dilation, groups, "zeros")
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    sparse(model, Static(sparsity=0.5))
    if last:
        model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64, requires_grad=True)
    y = model(x)
    reference = weight.requires_grad_()
    expected = F.conv2d(x, reference * layer.mask, layer.bias, stride, padding, dilation, groups)
    grad = torch.randn_like(y)
    assert relative_error(y, expected) < 1e-12
    (dx,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    y.backward(grad)
    wanted = torch.autograd.grad(expected, (x, reference), grad)
    assert relative_error(dx, wanted[0]) < 1e-12
    assert relative_error(layer.weight.grad, wanted[1]) < 1e-12
    assert not layer.weight.grad[~layer.mask].any()


def test_gradients_reach_b_and_nothing_outside_it() -> None:
    layer = nn.Conv2d(4, 4, 3)
    sparse(nn.Sequential(layer), "topkast", sparsity=0.8)
    layer.grad_mask = torch.rand_like(layer.weight) < 0.5
    layer.alpha = torch.tensor(0.25)
    x = torch.randn(2, 4, 6, 6)
    layer(x).square().sum().backward()
    found = layer.weight.grad != 0
    assert torch.equal(found, layer.mask | layer.grad_mask)


@pytest.mark.parametrize("method", [SOFT, GMP(sparsity=0.6, initial_sparsity=0.5)], ids=["soft", "mask"])
def test_channels_last_moves_masks_along_and_changes_nothing(method: Any) -> None:
    torch.manual_seed(0)
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


def test_autocast_computes_in_its_dtype_and_leaves_masters_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    sparse(model)
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 1e-2
    y.float().square().sum().backward()
    assert model[0].weight.grad.dtype == model[0].weight.dtype == torch.float32


def test_it_compiles_as_one_graph_once_while_thresholds_and_alpha_move() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    sparse(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(2, 3, 6, 6)
    for threshold, alpha in ((-2.0, 0.5), (-1.0, 0.25), (-1.5, 0.0)):
        for layer in (model[0], model[2]):
            with torch.no_grad():
                layer.threshold.fill_(threshold)
                layer.alpha.fill_(alpha)
        model.zero_grad()
        compiled(x).square().sum().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        model(x).square().sum().backward()
        assert all(relative_error(found[name], p.grad) < 1e-5 for name, p in model.named_parameters())
    assert counter.frame_count == 1


def test_as_a_matrix_the_columns_run_over_kernel_positions_and_then_input_channels() -> None:
    layer = nn.Conv2d(3, 2, 2)
    sparse(nn.Sequential(layer))
    matrix = layer.oriented(layer.weight)
    assert matrix.shape == (2, 12)
    for row, (i, j), channel in itertools.product(range(2), itertools.product(range(2), range(2)), range(3)):
        assert matrix[row, (2 * i + j) * 3 + channel] == layer.weight[row, channel, i, j]
    assert torch.equal(layer.stored(matrix), layer.weight)


def test_blocks_span_output_and_input_channels_at_one_kernel_position() -> None:
    layer = nn.Conv2d(8, 8, 3)
    sparse(nn.Sequential(layer), "static", sparsity=0.75, pattern="block:4x2")
    blocks = layer.mask.reshape(2, 4, 4, 2, 3, 3).float().sum(dim=(1, 3))
    assert set(blocks.unique().tolist()) == {0.0, 8.0}
    assert int((blocks > 0).sum()) == 18  # a quarter of 2 x 4 x 9


@pytest.mark.parametrize("groups", [1, 2])
def test_two_of_four_is_along_input_channels(groups: int) -> None:
    layer = nn.Conv2d(8, 4, 3, groups=groups)
    weight = layer.weight.detach().abs()
    phases = Phases([(0, "sparse")], 2)
    sparse(nn.Sequential(layer), ACDC(sparsity=0.5, phases=phases), pattern="2:4")
    kept = layer.mask.reshape(4, -1, 4, 3, 3)
    assert (kept.sum(2) == 2).all()
    grouped = weight.reshape(kept.shape)
    smallest = torch.where(kept, grouped, torch.inf).amin(2)
    assert (smallest >= torch.where(kept, 0.0, grouped).amax(2)).all()


def test_a_channel_is_an_output_channel() -> None:
    layer = nn.Conv2d(4, 8, 3)
    sparse(nn.Sequential(layer), "static", sparsity=0.5, pattern="channel", backend="torch")
    assert sorted(layer.mask.flatten(1).float().mean(1).tolist()) == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize(
    ("layer", "pattern"),
    [
        (nn.Conv2d(3, 8, 4), "2:4"),  # 3 input channels, although a row has 48 weights
        (nn.Conv2d(3, 8, 2), "block:4"),
        (nn.Conv2d(8, 8, 3, groups=4), "block:4"),  # 2 channels a group
    ],
)
def test_units_that_would_straddle_positions_or_groups_are_refused(layer: nn.Conv2d, pattern: str) -> None:
    model = nn.Sequential(layer)
    assert parse(pattern)
    with pytest.raises(ValueError, match="exclude the layer"):
        sparse(model, "static", sparsity=0.5, pattern=pattern)
    assert type(model[0]) is nn.Conv2d


def test_erk_counts_the_kernel_among_the_dimensions() -> None:
    # raw = sum / product of dimensions: 22 / 576 and 34 / 512 of [8, 8, 3, 3] and [16, 16, 1, 2].
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(16, 16, (1, 2)))
    sparse(model, RigL(sparsity=0.9))
    eps = (576 - 518 + 512 - 460) / (22 + 35)
    kept = [int(layer.mask.sum()) for layer in model]
    assert kept == [round(eps * 22), round(eps * 35)]


def test_depthwise_convolutions_stay_dense_unless_they_are_named() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=2))

    assert [is_depthwise(layer) for layer in build()] == [True, False, False]
    sparsifier = sparse(build())
    assert sorted(sparsifier.layers) == ["1", "2"]
    assert [(skip.name, skip.reason) for skip in sparsifier.skipped] == [("0", "depthwise convolution")]
    assert sorted(sparse(build(), include=["*"]).layers) == ["0", "1", "2"]
    depthwise = sparse(build(), "static", sparsity=0.5, include=["0"])
    assert depthwise.sparsity() == 0.5


def test_the_state_of_channels_last_masks_is_plain_and_comes_back_channels_last() -> None:
    def build() -> tuple[nn.Sequential, ts.Sparsifier]:
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        sparsifier = sparse(model, "topkast", sparsity=0.6)
        model.to(memory_format=torch.channels_last)
        return model, sparsifier

    (model, first), (other, second) = build(), build()
    saved = first.state_dict()
    assert saved["tensors"] and all(tensor.is_contiguous() for tensor in saved["tensors"].values())
    second.load_state_dict(saved)
    for ours, theirs in ((other[0], model[0]), (other[2], model[2])):
        assert torch.equal(ours.mask, theirs.mask) and ours.mask.stride() == ours.weight.stride()
        assert not ours.mask.is_contiguous()


def test_what_is_saved_is_an_ordinary_convolution_with_zeros() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model.to(memory_format=torch.channels_last)
    sparsifier = sparse(model)
    x = torch.randn(2, 4, 8, 8)
    model.eval()
    expected, zeros = model(x), sparsifier.sparsity()
    stock = copy.deepcopy(sparsifier.finalize())
    assert [type(module) for module in stock] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert torch.equal(stock(x), expected)
    total = sum(layer.weight.numel() for layer in (stock[0], stock[3]))
    assert sum(int((layer.weight == 0).sum()) for layer in (stock[0], stock[3])) == round(zeros * total)
