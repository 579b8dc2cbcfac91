"""Training with `backend="block"` follows training with the reference, through the interpreter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse import layers
from tritonsparse.methods import METHODS, Method
from tritonsparse.methods.acdc import ACDC, Phases
from tritonsparse.methods.rigl_set import RigL
from tritonsparse.methods.topkast import TopKAST

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PHASES = Phases([(0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")], epochs=4)
TRAINED: dict[str, Method] = {
    "static": METHODS["static"](sparsity=0.5),
    "acdc": ACDC(sparsity=0.5, phases=PHASES),
    "rigl": RigL(sparsity=0.5, update_every=2),
    "topkast": TopKAST(sparsity=0.6, backward_sparsity=0.3),
    "topkast, all blocks": TopKAST(sparsity=0.6, backward_sparsity=0.0, alpha=0.5),
    "powerprop": METHODS["powerprop"](sparsity=0.5),
    "swat": METHODS["swat"](sparsity=0.5),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), Conv1D(32, 64))


def made(method: Method, backend: str, pattern: str = "block:16") -> tuple[nn.Sequential, ts.Sparsifier]:
    net = model()
    options: dict[str, Any] = {"include": ["*"], "total_steps": 4, "steps_per_epoch": 1}
    return net, ts.sparsify(net, copy.deepcopy(method), pattern=pattern, backend=backend, **options)


def trained(method: Method, backend: str, pattern: str, **attached: Any) -> tuple[list[Tensor], list[float]]:
    net, sparsifier = made(method, backend, pattern)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.05), momentum=0.9)
    sparsifier.attach(optimizer, **attached)
    random = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(4):
        x, target = (torch.randn(5, 32, generator=random) for _ in range(2))
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return [parameter.detach().clone() for parameter in net.parameters()], losses


@pytest.mark.parametrize(
    ("name", "pattern"),
    [*((name, "block:16") for name in TRAINED), ("rigl", "block:16x32"), ("topkast", "block:32x16")],
)
def test_four_steps_end_in_the_weights_of_the_reference(name: str, pattern: str) -> None:
    expected, expected_losses = trained(TRAINED[name], "torch", pattern)
    actual, losses = trained(TRAINED[name], "block", pattern)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attached", [{"cache_dtype": torch.float32}, {"cache_dtype": torch.float32, "defer": True}])
@pytest.mark.parametrize("name", ["rigl", "topkast, all blocks"])
def test_cached_views_and_deferred_multipliers_change_nothing(name: str, attached: dict[str, Any]) -> None:
    expected, _ = trained(TRAINED[name], "block", "block:16")
    actual, _ = trained(TRAINED[name], "block", "block:16", **attached)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["static", "topkast", "topkast, all blocks"])
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        net, _ = made(TRAINED[name], "block")
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)
        y.square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in net.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_batched_gradients_are_those_taken_one_by_one() -> None:
    net, _ = made(TRAINED["static"], "block")
    x = torch.randn(3, 32).requires_grad_()
    y = net(x)
    rows = torch.eye(y.numel())[:4].view(4, *y.shape)
    batched = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)[0]
    for row, ours in zip(rows, batched, strict=True):
        torch.testing.assert_close(ours, torch.autograd.grad(y, x, row, retain_graph=True)[0])


def test_an_index_that_is_rewritten_in_inference_mode_can_be_trained_with() -> None:
    net, sparsifier = made(TRAINED["static"], "block")
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.05))
    sparsifier.attach(optimizer, cache_dtype=torch.float32)
    sparsifier.layers["0"].cache = sparsifier.layers["0"].topology = None
    with torch.inference_mode():
        sparsifier.refresh()
    net(torch.randn(3, 32)).sum().backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("first", [True, False])
def test_a_training_forward_of_many_rows_casts_its_weight_first(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor | None] = []
    product = layers.block_matmul
    monkeypatch.setattr(layers, "CAST_ROWS", 4)
    monkeypatch.setattr(
        layers, "block_matmul", lambda *args, **kwargs: (given.append(kwargs["w_hat"]), product(*args, **kwargs))[1]
    )
    _, sparsifier = made(TRAINED["static"], "block")
    layer = sparsifier.layers["0"]
    layer.casts_first = first
    with torch.autocast("cpu", torch.float16):
        y = layer(torch.randn(4, 32))
        few = layer(torch.randn(3, 32))
        with torch.no_grad():
            layer(torch.randn(4, 32))
    assert [None if each is None else each.dtype for each in given] == [torch.float16 if first else None, None, None]
    (y.float().sum() + few.float().sum()).backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert layer.mask is not None and (layer.weight.grad[layer.mask] != 0).any()


def test_pruned_blocks_are_not_read_and_their_gradients_are_zero() -> None:
    net, sparsifier = made(TRAINED["static"], "block")
    expected, reference = made(TRAINED["static"], "torch")
    for layer in sparsifier.layers.values():
        assert layer.mask is not None
        layer.weight.data[~layer.mask] = float("nan")
    x = torch.randn(3, 32)
    y, y_expected = net(x), expected(x)
    torch.testing.assert_close(y, y_expected, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    y_expected.square().sum().backward()
    for name, layer in sparsifier.layers.items():
        assert layer.mask is not None and layer.weight.grad is not None
        assert (layer.weight.grad[~layer.mask] == 0).all() and (layer.weight.grad != 0).any()
        torch.testing.assert_close(layer.weight.grad, reference.layers[name].weight.grad, rtol=1e-4, atol=1e-6)


def test_a_mask_edited_between_steps_is_seen_by_the_next_forward_and_by_a_copy() -> None:
    net, sparsifier = made(TRAINED["static"], "block")
    layer = sparsifier.layers["0"]
    assert layer.mask is not None and layer.topology is not None
    layer.mask[:16] = ~layer.mask[:16]
    x = torch.randn(3, 32)
    expected = torch.nn.functional.linear(x, layer.weight * layer.mask, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin[0](x), expected, rtol=1e-5, atol=1e-6)
    before = layer.topology.index.clone()
    address = layer.topology.index.data_ptr()
    sparsifier.refresh()
    assert layer.topology.index.data_ptr() == address and not torch.equal(layer.topology.index, before)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_moving_blocks_recompiles_nothing() -> None:
    net, sparsifier = made(TRAINED["static"], "block")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    x = torch.randn(4, 32)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)
        for layer in sparsifier.layers.values():
            assert layer.mask is not None
            layer.mask.copy_(~layer.mask)
        sparsifier.refresh()
    assert counter.frame_count == 1


def test_the_report_counts_what_is_skipped() -> None:
    _, sparsifier = made(TRAINED["static"], "block")
    report = sparsifier.report()
    assert report.exploitable == report.block_sparsity == report.sparsity > 0.4
    assert made(TRAINED["static"], "triton")[1].report().exploitable == 0.0


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:8", "block:16x24"])
def test_patterns_that_no_kernel_skips_are_refused(pattern: str) -> None:
    net = model()
    with pytest.raises(ValueError, match="sparsify: expected a pattern of blocks whose sides 16 divides"):
        ts.sparsify(net, METHODS["gmp"](sparsity=0.5), pattern=pattern, backend="block", total_steps=5)
    assert type(net[0]) is nn.Linear
