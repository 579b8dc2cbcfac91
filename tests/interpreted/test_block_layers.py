"""Training with `backend="block"` follows training with the reference, through the interpreter."""

import copy
from typing import Any

import pytest
import torch
from small_runs import Run, assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.layers import linear
from tritonsparse.methods import ACDC, METHODS, Method, Phases, RigL, TopKAST

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
CACHED: dict[str, Any] = {"cache_dtype": torch.float32}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), Conv1D(32, 64))


def loss(net: Any) -> Tensor:
    x, target = torch.randn(2, 5, 32)
    return (net(x) - target).square().mean()


def start(name: str = "static", backend: str = "block", pattern: str = "block:16", **attach: Any) -> Run:
    options: dict[str, Any] = {"include": ["*"], "total_steps": 4, "steps_per_epoch": 1, "groups": {"lr": 0.05}}
    options |= {"pattern": pattern, "backend": backend, "attach": attach}
    return Run(model(), TRAINED[name], lambda groups: torch.optim.SGD(groups, momentum=0.9), loss, **options)


def assert_trained_alike(actual: Run, expected: Run, rtol: float, atol: float) -> None:
    for run in (actual, expected):
        run.train(4)
    torch.testing.assert_close(torch.stack(actual.losses), torch.stack(expected.losses), rtol=rtol / 10, atol=0)
    for ours, theirs in zip(actual.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


OBLONG = [("rigl", "block:16x32"), ("topkast", "block:32x16")]


@pytest.mark.parametrize(("name", "pattern"), [*((name, "block:16") for name in TRAINED), *OBLONG])
def test_four_steps_end_in_the_weights_of_the_reference(name: str, pattern: str) -> None:
    assert_trained_alike(start(name, "block", pattern), start(name, "torch", pattern), 1e-4, 1e-6)


@pytest.mark.parametrize(
    ("name", "defer"), [("rigl", True), *(("topkast, all blocks", each) for each in (True, False))]
)
def test_cached_weights_and_deferred_multipliers_change_nothing(name: str, defer: bool) -> None:
    assert_trained_alike(start(name, defer=defer, **CACHED), start(name), 1e-5, 1e-7)


@pytest.mark.parametrize("name", ["static", "topkast", "topkast, all blocks"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    found = []
    for reentrant in (None, True, False):
        net = start(name).model
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = net(x) if reentrant is None else checkpoint(net, x, use_reentrant=reentrant)
        y.square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in net.parameters())])
    for checkpointed in found[1:]:
        assert_same(found[0], checkpointed)


def test_batched_gradients_are_those_taken_one_by_one() -> None:
    x = torch.randn(3, 32).requires_grad_()
    y = start().model(x)
    rows = torch.eye(y.numel())[:4].view(4, *y.shape)
    batched = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)[0]
    for row, ours in zip(rows, batched, strict=True):
        torch.testing.assert_close(ours, torch.autograd.grad(y, x, row, retain_graph=True)[0])


def test_a_topology_that_is_rewritten_in_inference_mode_can_be_trained_with() -> None:
    run = start(**CACHED)
    layer = run.sparsifier.layers["0"]
    layer.cache = layer.topology = None
    with torch.inference_mode():
        run.sparsifier.refresh()
    run.model(torch.randn(3, 32)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("first", [True, False])
def test_a_training_forward_of_many_rows_casts_its_weight_first(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given, product = list[Tensor | None](), linear.block_linear

    def noted(*args: Any, **options: Any) -> Tensor:
        given.append(options["w_hat"])
        return product(*args, **options)

    monkeypatch.setattr(linear, "CAST_ROWS", 4)
    monkeypatch.setattr(linear, "block_linear", noted)
    layer: Any = start().sparsifier.layers["0"]
    layer.casts_first = first
    with torch.autocast("cpu", torch.float16):
        y = layer(torch.randn(4, 32))
        few = layer(torch.randn(3, 32))
        with torch.no_grad():
            layer(torch.randn(4, 32))
    assert [None if each is None else each.dtype for each in given] == [torch.float16 if first else None, None, None]
    (y.float().sum() + few.float().sum()).backward()
    assert layer.weight.grad.dtype == torch.float32 and (layer.weight.grad[layer.mask] != 0).any()


def test_pruned_blocks_are_not_read_and_their_gradients_are_zero() -> None:
    run, expected = start(), start(backend="torch")
    for layer in run.sparsifier.layers.values():
        layer.weight.data[~layer.mask] = float("nan")
    x = torch.randn(3, 32)
    outputs = [each.model(x) for each in (run, expected)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for y in outputs:
        y.square().sum().backward()
    for name, layer in run.sparsifier.layers.items():
        grad = layer.weight.grad
        assert (grad[~layer.mask] == 0).all() and (grad != 0).any()
        torch.testing.assert_close(grad, expected.sparsifier.layers[name].weight.grad, rtol=1e-4, atol=1e-6)


def test_a_mask_edited_between_steps_is_seen_by_the_next_forward_and_by_a_copy() -> None:
    run = start()
    layer: Any = run.sparsifier.layers["0"]
    layer.mask[:16] = ~layer.mask[:16]
    x = torch.randn(3, 32)
    expected = torch.nn.functional.linear(x, layer.weight * layer.mask, layer.bias)
    before, address = layer.topology.index.clone(), layer.topology.index.data_ptr()
    for seen_by in (layer, copy.deepcopy(run.model)[0]):
        torch.testing.assert_close(seen_by(x), expected, rtol=1e-5, atol=1e-6)
    run.sparsifier.refresh()
    assert layer.topology.index.data_ptr() == address and not torch.equal(layer.topology.index, before)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_moving_blocks_recompiles_nothing() -> None:
    run, counter, x = start(), CompileCounterWithBackend("aot_eager"), torch.randn(4, 32)
    compiled = torch.compile(run.model, backend=counter, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), run.model(x), rtol=1e-5, atol=1e-6)
        for layer in run.sparsifier.layers.values():
            layer.mask.copy_(~layer.mask)
        run.sparsifier.refresh()
    assert counter.frame_count == 1


def test_the_report_counts_what_is_skipped_and_other_patterns_are_refused() -> None:
    report = start().sparsifier.report()
    assert report.exploitable == report.block_sparsity == report.sparsity > 0.4
    assert start(backend="triton").sparsifier.report().exploitable == 0.0
    for pattern in ("unstructured", "2:4", "block:8", "block:16x24"):
        net = model()
        with pytest.raises(ValueError, match="sparsify: expected a pattern of blocks whose sides 16 divides"):
            ts.sparsify(net, METHODS["gmp"](sparsity=0.5), pattern=pattern, backend="block", total_steps=5)
        assert type(net[0]) is nn.Linear
