"""Sparse layers inside what PyTorch does to modules: dtypes, devices, copies, checkpointing, autocast, compile."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from small_runs import Build, Run, assert_same, gradients, relative_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import tritonsparse as ts
from tritonsparse.kernels import _triton
from tritonsparse.methods import GMP, STR, AutoSparse, Method

METHODS: dict[str, Method] = {
    "soft": AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="linear", backward_density=0.6),
    "mask": GMP(sparsity=0.9, initial_sparsity=0.5, update_every=1),
    "dense": STR(threshold_init=-float("inf")),
}
every_kind = pytest.mark.parametrize("kind", METHODS)
every_model = pytest.mark.parametrize("model", ["linear", "convolution"])


def build(model: str) -> tuple[nn.Sequential, Tensor]:
    """A model whose first layer is sparse, and an input."""
    torch.manual_seed(0)
    if model == "linear":
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(5, 8)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 6, 6)


def sparse(model: nn.Module, kind: str) -> ts.Sparsifier:
    sparsifier = ts.sparsify(model, METHODS[kind], include=["*"], total_steps=10, steps_per_epoch=5)
    assert {layer.kind for layer in sparsifier.layers.values()} == {kind}
    return sparsifier


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_the_weights_and_leaves_the_threshold_in_float32(dtype: torch.dtype) -> None:
    model, x = build("linear")
    layer = sparse(model, "soft").layers["0"]
    layer.threshold.data.fill_(-2.00123)
    threshold = layer.threshold
    model.to(dtype)
    assert layer.weight.dtype == dtype and layer.threshold is threshold and threshold.dtype == torch.float32
    assert threshold.item() == pytest.approx(-2.00123, abs=1e-6)
    assert layer.alpha.dtype == torch.float32 and layer.grad_mask.dtype == torch.bool
    grads = gradients(model, x.to(dtype))
    assert grads["0.weight"].dtype == dtype and grads["0.threshold"].dtype == torch.float32


def test_gmp_chooses_its_masks_in_every_dtype_and_views_follow_the_weights_to_another_device() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model, x = build("linear")
        assert sparse(model.to(dtype), "mask").sparsity() == 0.5
        assert gradients(model, x.to(dtype))["0.weight"].dtype == dtype
    for kind, held in (("soft", {"threshold", "grad_mask", "alpha"}), ("mask", {"mask"})):
        model, _ = build("linear")
        layer = sparse(model, kind).layers["0"]
        model.to("meta")
        tensors = {name: getattr(layer, name) for name in ("threshold", "mask", "grad_mask", "alpha")}
        assert {name: t.device.type for name, t in tensors.items() if t is not None} == dict.fromkeys(held, "meta")


@every_model
@every_kind
def test_a_pickled_model_and_a_copy_compute_the_same_and_are_independent(model: str, kind: str) -> None:
    net, x = build(model)
    sparsifier = sparse(net, kind)
    before = copy.deepcopy([sparsifier.state_dict(), {**net.state_dict()}])
    expected = gradients(net, x)
    net.eval()(x)
    net.train()
    assert_same([sparsifier.state_dict(), {**net.state_dict()}], before)  # a forward changes no state
    twins = [pickle.loads(pickle.dumps(net)), copy.deepcopy(net)]
    for layer in sparsifier.layers.values():
        for tensor in (layer.mask, layer.alpha, layer.threshold):
            if tensor is not None:
                tensor.data.zero_()
    sparsifier.finalize()
    for twin in twins:
        assert_same(gradients(twin, x), expected)
    if kind == "soft":  # a frozen weight still lets its threshold learn
        twins[0][0].weight.requires_grad_(False)
        assert "0.threshold" in gradients(twins[0], x)


@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(bert: Build, kind: str, reentrant: bool) -> None:
    model, ids = bert().train(), torch.randint(3, 30, (2, 6))
    ts.sparsify(model, METHODS[kind], total_steps=10, steps_per_epoch=5)
    plain = gradients(model, input_ids=ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert any(name.endswith(".threshold") for name in plain) == (kind == "soft")
    assert_same(gradients(model, input_ids=ids), plain)


@every_model
@every_kind
def test_autocast_computes_in_bfloat16_and_keeps_the_master_in_float32(model: str, kind: str) -> None:
    net, x = build(model)
    sparse(net, kind)
    exact = gradients(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradients(net, x)
    assert rounded.pop("y").dtype == torch.bfloat16 and net[0].weight.dtype == torch.float32
    # bfloat16 has 8 bits: 2^-8 per rounding, a handful of roundings on the way. Some pixels pass or leave the ReLU.
    bound = 0.03 if model == "linear" else 0.05
    for name, grad in rounded.items():
        assert grad.dtype == torch.float32 and 0.0 < relative_error(grad, exact[name]) < bound, name
    if model == "linear" and kind == "soft":
        # T = sigma(0) = .5 and W = .501 are one number in bfloat16; in float32 W passes T by .001.
        net[0].weight.data.fill_(0.501)
        for zero in (net[0].threshold, net[0].bias):
            zero.data.zero_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net[0](torch.eye(8))
        assert y.float().flatten().tolist() == pytest.approx([0.001] * 128, rel=1e-2)


@every_model
@every_kind
def test_compiled_whole_it_gives_the_same_gradients_and_trains_without_recompiling(model: str, kind: str) -> None:
    (net, x), counter = build(model), CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(net, fullgraph=True, backend=counter)
    run = Run(
        net, METHODS[kind], loss=lambda _: compiled(x).square().sum(), groups={"lr": 0.01},
        include=["*"], total_steps=50, steps_per_epoch=1,
    )  # fmt: skip
    eager = gradients(net, x)
    for name, grad in gradients(net, x, call=compiled).items():
        assert torch.equal(grad, eager[name]) if model == "linear" else relative_error(grad, eager[name]) < 1e-5
    layer, seen = run.sparsifier.layers["0"], set()
    for _ in range(6):
        run.train(1)
        mask = b"" if layer.mask is None else layer.mask.numpy().tobytes()
        seen.add((float(layer.alpha), layer.threshold.item()) if kind == "soft" else mask)
    # Masks, or thresholds and alpha, have moved.
    assert len(seen) == (1 if kind == "dense" else 6) and counter.frame_count == 1


INTERPRETED = """
import copy, torch, tritonsparse as ts
from tritonsparse.methods import GMP, AutoSparse
torch.manual_seed(0)
for method in (
    AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="constant", backward_density=0.6),
    GMP(sparsity=0.6, initial_sparsity=0.5),
):
    stock = torch.nn.Sequential(torch.nn.Linear(70, 66), torch.nn.ReLU(), torch.nn.Linear(66, 3))
    x, grad_y, results = torch.randn(5, 70), torch.randn(5, 3), []
    for backend in ("torch", "triton"):
        model = copy.deepcopy(stock)
        sparsifier = ts.sparsify(model, method, backend=backend, total_steps=10)
        assert {layer.backend.name for layer in sparsifier.layers.values()} == {backend}
        y = model(x)
        y.backward(grad_y)
        results.append([y, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
print("equal")
"""


@pytest.mark.skipif(not _triton.AVAILABLE, reason="triton is not installed")
def test_the_triton_back_end_trains_as_the_torch_one_through_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert run.stdout == "equal\n", run.stderr
