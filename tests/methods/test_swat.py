"""SWAT by hand: sparse weights forward, sparse activations in dW, dense updates, momentum shares, padding, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_runs import Run, linear
from torch import nn

from tritonsparse.methods import SWAT

X = torch.tensor([[1.0, -2.0, 3.0, 0.5]])


def made(lr: float = 0.0, **fields: Any) -> Run:
    return Run(linear([4.0, -3.0, 2.0, 1.0], [0.5, -6.0, 0.25, 5.0]), SWAT(**{"sparsity": 0.5, **fields}), lr=lr)


def test_one_step_by_hand() -> None:
    run = made(lr=1.0)
    layer = run.view
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.1, 5.0, -0.2, 4.0]], requires_grad=True)
    y = run.model(x)
    # The four largest weights: 4, -3; -6, 5.     X is dense in the forward.
    w_hat = torch.tensor([[4.0, -3.0, 0.0, 0.0], [0.0, -6.0, 0.0, 5.0]])
    assert torch.equal(y, x.detach() @ w_hat.t())
    grad = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    y.backward(grad)
    assert x.grad is not None and torch.equal(x.grad, grad @ w_hat)
    # The four largest of X: -2, 3; 5, 4.  dW = dY^T Xhat, for pruned weights too.
    expected = grad.t() @ torch.tensor([[0.0, -2.0, 3.0, 0.0], [0.0, 5.0, 0.0, 4.0]])
    assert torch.equal(layer.weight.grad, expected)
    expected = layer.weight.detach() - expected
    run.step()
    assert torch.equal(layer.weight, expected)
    # W = [[4, 4, -1, 5], [.5, -4.5, -5.75, 3]]: the four largest are 5, -4.5, -5.75 and the first 4.
    assert run.masks() == [[[1, 0, 0, 1], [0, 1, 1, 0]]]


def test_activations_may_be_as_sparse_as_one_likes_and_inference_packs_nothing() -> None:
    run = made(activation_sparsity=0.75)
    assert run.view.sparse_input.density == 0.25
    run.model(X).sum().backward()
    assert run.view.weight.grad.tolist() == [[0.0, 0.0, 3.0, 0.0]] * 2
    with torch.no_grad():
        assert not run.view.packs_input()
        assert torch.equal(run.model(torch.ones(1, 4)), run.view.effective_weight().sum(1)[None])
    # The master weights were dense.
    assert run.view.weight.count_nonzero() == 8 and run.sparsifier.finalize().weight.count_nonzero() == 4


def test_between_refreshes_mask_and_cut_off_are_reused_but_blocks_chosen_exactly() -> None:
    run, kept = made(refresh_every=3), []
    for step in range(4):
        run.model(X * (1 + step)).sum().backward()
        kept.append(int(run.view.weight.grad.count_nonzero()) // 2)
        run.step()
        run.optimizer.zero_grad()
    # Exact, 2 of 4, at steps 0 and 3; between, what reaches the cut-off 2 of step 0: 2, 4, 6, 1 and 3, 6, 9, 1.5.
    assert kept == [2, 3, 3, 2]
    # A weight that crosses the cut-off counts at once.
    run = made(lr=1.0, refresh_every=3)
    layer = run.view
    weight = layer.weight.detach().clone()
    cutoff = weight.abs()[layer.mask].min()
    run.step(torch.where(layer.mask, 0.0, weight - cutoff))  # at the cut-off is kept
    assert layer.mask.all()
    run.step(layer.weight.detach())  # to 0: nothing would be left, so nothing changes
    assert layer.mask.all() and layer.weight.count_nonzero() == 0
    run.step(torch.randn(layer.weight.shape))  # the third: a refresh, exact again
    assert run.kept() == [layer.weight.numel() // 2]
    run = Run(nn.Linear(8, 8), SWAT(sparsity=0.5, refresh_every=5), lr=1.0, pattern="block:4")
    for _ in range(3):
        run.step(torch.randn(8, 8))
        norms = run.view.weight.detach().abs().reshape(2, 4, 2, 4).sum((1, 3))
        blocks = run.view.mask.reshape(2, 4, 2, 4).all(3).all(1)
        assert int(blocks.sum()) == 2 and norms[blocks].min() > norms[~blocks].max()


def test_padding_counts_for_no_cut_off_and_for_no_weight_gradient() -> None:
    run = made()
    layer, sparsifier = run.view, run.sparsifier
    x = torch.tensor([[[1.0, -2.0, 3.0, 0.5], [90.0, 90.0, 90.0, 90.0]]])
    sparsifier.set_row_mask(torch.tensor([[True, False]]))
    y = run.model(x)
    assert torch.equal(y, x @ layer.effective_weight().t())
    y.sum().backward()
    assert layer.weight.grad.tolist() == [[0.0, -2.0, 3.0, 0.0]] * 2
    # A mask of another shape concerns another layer; two of one shape count together.
    layer.weight.grad = None
    sparsifier.set_row_mask(torch.ones(3, 3).bool(), torch.tensor([[True, False]]), torch.tensor([[False, True]]))
    run.model(x).sum().backward()
    assert layer.weight.grad.tolist() == [[90.0] * 4] * 2
    with pytest.raises(TypeError, match=r"set_row_mask: expected bool tensors, got torch.int64; pass attention_mask"):
        sparsifier.set_row_mask(torch.ones(1, 2, dtype=torch.int64))


def test_shares_follow_the_mean_momentum_of_kept_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    run = Run(model, SWAT(sparsity=0.5, distribution="momentum"), momentum=0.9, include=["*"])
    run.step(3.0, 1.0)
    # 16 of 32 weights, in shares 3 to 1: 12 and 4.
    assert run.kept() == [12, 4] and [view.sparse_input.density for view in run.views] == [0.75, 0.25]
    run.optimizer.state.clear()
    run.step(31.0, 1.0)
    # 31 to 1 would be 15.5 and 0.5: largest remainder, ties to the earlier layer; a layer keeps one at least.
    assert run.kept() == [16, 1] and [view.sparse_input.density for view in run.views] == [1.0, 1 / 16]
    with pytest.raises(ValueError, match=r'an optimizer with momentum or Adam.s averages for distribution "momentum"'):
        made(distribution="momentum").step(1.0)


@pytest.mark.parametrize("structure", ["channel", "filter"])
def test_structure_keeps_whole_kernels_or_filters(structure: str) -> None:
    layer = Run(nn.Conv2d(4, 6, 3), SWAT(sparsity=0.5, structure=structure)).view
    mask, size = layer.mask, layer.weight.detach().abs()
    over = (2, 3) if structure == "channel" else (1, 2, 3)
    whole = mask.float().mean(over)
    assert set(whole.flatten().tolist()) == {0.0, 1.0} and whole.mean() == 0.5
    score = size.sum(over)
    assert score[whole == 1].min() >= score[whole == 0].max()


@pytest.mark.parametrize("scope", ["batch", "sample", "plane"])
@pytest.mark.parametrize(
    "options",
    [{"padding": 1}, {"stride": 2, "padding": "valid", "dilation": 2},
     {"padding": "same", "padding_mode": "reflect", "groups": 2}],
)  # fmt: skip
def test_a_convolutions_weight_gradient_is_made_of_its_largest_inputs(scope: str, options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 6, 3, **options).double()
    layer = Run(conv, SWAT(sparsity=0.5, activation_sparsity=0.75, activation_scope=scope)).view
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert layer.sparse_input.overflows == 0
    # What goes into the product, padded where the padding is not of zeros.
    reflect = options["padding"] == "same"
    dense = x.detach().requires_grad_()
    inputs = F.pad(dense, (1, 1, 1, 1), mode="reflect") if reflect else dense
    given = inputs.detach()
    size = given.abs().reshape({"batch": (1, -1), "sample": (2, -1), "plane": (8, -1)}[scope])
    cut = size.topk(round(0.25 * size.shape[1]), dim=1).values[:, -1:]
    sparse = torch.where((size >= cut).view_as(given), given, 0.0)
    w_hat, inner = layer.effective_weight().requires_grad_(), int(options["padding"] == 1)
    how = (options.get("stride", 1), inner, options.get("dilation", 1), options.get("groups", 1))
    torch.testing.assert_close(y, F.conv2d(given, w_hat, conv.bias, *how))
    (expected,) = torch.autograd.grad(F.conv2d(sparse, w_hat, conv.bias, *how), w_hat, grad)
    torch.testing.assert_close(conv.weight.grad, expected)
    (expected,) = torch.autograd.grad(F.conv2d(inputs, w_hat.detach(), conv.bias, *how), dense, grad)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("module", [nn.Linear(64, 64, bias=False), nn.Conv2d(64, 64, 1, bias=False)])
def test_the_memory_of_the_saved_input_falls(module: nn.Module) -> None:
    model = Run(module, SWAT(sparsity=0.5, activation_sparsity=0.8)).model
    shape = (512, 64) if isinstance(module, nn.Linear) else (2, 64, 16, 16)
    x = torch.randn(shape, requires_grad=True)
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() and tensor.shape[0] != 64:  # not the weight, its view, or alpha
            saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    # Of 4 bytes an element: 1/8 for the bits, 0.2 * 1.25 of the values, the rows' offsets.
    assert 0.25 < sum(saved) / (x.numel() * 4) < 0.35


def test_an_overflow_loses_nothing_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(linear([4.0, -3.0, 2.0, 1.0], [0.5, -6.0, 0.25, 5.0]))
    run = Run(model, SWAT(sparsity=0.5, slack=1.0, refresh_every=10), include=["*"])
    for factor in (1.0, 10.0, 10.0):
        run.optimizer.zero_grad()
        run.model(factor * X).sum().backward()
        grad = run.view.weight.grad.clone()
        run.step()
    # All of 10, 20, 30, 5 reach the cut-off 2, twice the room.
    assert grad.tolist() == [[10.0, -20.0, 30.0, 5.0]] * 2
    assert run.view.sparse_input.overflows == 2
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "swat: a batch kept more of the input of 0 than slack 1 leaves room for" in caplog.text
