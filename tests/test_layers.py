"""Sparse layers inside what PyTorch does to modules: dtypes, devices, copies, checkpointing, autocast, compile."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import tritonsparse as ts
from tritonsparse.kernels import _triton
from tritonsparse.methods import GMP, STR, AutoSparse

Build = Callable[..., Any]

METHODS = {
    "soft": AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="constant", backward_density=0.6),
    "mask": GMP(sparsity=0.6, initial_sparsity=0.5),
    "dense": STR(threshold_init=-float("inf")),
}


def sparse(model: nn.Module, kind: str) -> ts.Sparsifier:
    sparsifier = ts.sparsify(model, METHODS[kind], total_steps=10, steps_per_epoch=5)
    assert {layer.kind for layer in sparsifier.layers.values()} == {kind}
    return sparsifier


def gradients(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Gradients of a loss whose own gradient is random but the same at every call."""
    torch.manual_seed(1)
    model.zero_grad()
    y = model(*args, **kwargs)
    y = getattr(y, "logits", y)
    (y.float() * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_the_weights_and_leaves_the_threshold_in_float32(mlp: Build, dtype: torch.dtype) -> None:
    model = mlp()
    layer = sparse(model, "soft").layers["0"]
    layer.threshold.data.fill_(-2.00123)
    threshold = layer.threshold
    model.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.threshold is threshold and threshold.dtype == torch.float32
    assert threshold.item() == pytest.approx(-2.00123, abs=1e-6)
    assert layer.alpha.dtype == torch.float32 and layer.grad_mask.dtype == torch.bool
    grads = gradients(model, torch.randn(3, 8, dtype=dtype))
    assert grads["0.weight"].dtype == dtype and grads["0.threshold"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gmp_chooses_its_masks_in_every_dtype(mlp: Build, dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    sparsifier = sparse(model, "mask")
    assert sparsifier.sparsity() == 0.5
    assert gradients(model, torch.randn(3, 8, dtype=dtype))["0.weight"].dtype == dtype


@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_views_follow_the_weights_to_another_device(mlp: Build, kind: str) -> None:
    model = mlp()
    layer = sparse(model, kind).layers["0"]
    model.to("meta")
    tensors = {name: getattr(layer, name) for name in ("threshold", "mask", "grad_mask", "alpha")}
    assert {t.device.type for t in tensors.values() if t is not None} == {"meta"}
    assert {name for name, t in tensors.items() if t is not None} == (
        {"threshold", "grad_mask", "alpha"} if kind == "soft" else {"mask"}
    )


@pytest.mark.parametrize("kind", METHODS)
def test_a_pickled_model_computes_the_same(mlp: Build, kind: str) -> None:
    model = mlp().eval()
    sparse(model, kind)
    twin, x = pickle.loads(pickle.dumps(model)), torch.randn(3, 8)
    assert_same(gradients(twin, x), gradients(model, x))


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(bert: Build, kind: str, reentrant: bool) -> None:
    model, ids = bert().train(), torch.randint(3, 30, (2, 6))
    sparse(model, kind)
    plain = gradients(model, input_ids=ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients(model, input_ids=ids)
    assert any(name.endswith(".threshold") for name in plain) == (kind == "soft")
    assert_same(checkpointed, plain)


@pytest.mark.parametrize("kind", METHODS)
def test_autocast_computes_in_bfloat16_and_keeps_the_master_in_float32(mlp: Build, kind: str) -> None:
    model, x = mlp().eval(), torch.randn(5, 8)
    sparse(model, kind)
    exact = gradients(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0](x).dtype == torch.bfloat16
        rounded = gradients(model, x)
    assert model[0].weight.dtype == torch.float32
    assert {grad.dtype for grad in rounded.values()} == {torch.float32}
    for name, grad in rounded.items():
        # bfloat16 has 8 bits: 2^-8 per rounding, a handful of roundings on the way.
        error = (grad - exact[name]).norm() / exact[name].norm()
        assert 0.0 < error < 0.03, f"{name}: relative error {error:.2e}"


def test_the_threshold_is_compared_in_float32_under_autocast() -> None:
    layer = nn.Linear(1, 1, bias=False)
    sparse(layer, "soft")
    # T = sigma(0) = .5 and W = .501 are one number in bfloat16; in float32 W passes T by .001.
    layer.weight.data.fill_(0.501)
    layer.threshold.data.fill_(0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(1, 1)).item() == pytest.approx(0.001, rel=1e-2)


@pytest.mark.parametrize("kind", METHODS)
def test_compiled_whole_it_gives_the_same_gradients(mlp: Build, kind: str) -> None:
    model, x = mlp().eval(), torch.randn(3, 8)
    sparse(model, kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = gradients(model, x)
    torch.manual_seed(1)
    model.zero_grad()
    y = compiled(x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, eager)


@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_training_moves_masks_thresholds_and_alpha_without_recompiling(mlp: Build, kind: str) -> None:
    model, x = mlp(), torch.randn(3, 8)
    method: ts.methods.Method = GMP(sparsity=0.9, update_every=1)
    if kind == "soft":
        method = AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="linear", backward_density=0.6)
    sparsifier = ts.sparsify(model, method, total_steps=50, steps_per_epoch=1)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    sparsifier.attach(optimizer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    seen = set()
    for _ in range(6):
        compiled(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer = sparsifier.layers["0"]
        seen.add((float(layer.alpha), layer.threshold.item()) if kind == "soft" else layer.mask.numpy().tobytes())
    assert len(seen) == 6
    assert counter.frame_count == 1


def test_a_frozen_weight_still_lets_its_threshold_learn(mlp: Build) -> None:
    model = mlp()
    sparse(model, "soft")
    model[0].weight.requires_grad_(False)
    assert "0.threshold" in gradients(model, torch.randn(3, 8))


def test_the_forward_changes_no_state_in_training_or_evaluation(mlp: Build) -> None:
    model = mlp()
    sparsifier = sparse(model, "soft")
    before = {key: value.clone() for key, value in sparsifier.state_dict()["tensors"].items()}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)(torch.randn(3, 8))
    assert_same(sparsifier.state_dict()["tensors"], before)
    assert_same(model.state_dict(), weights)


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
    for reference, triton in zip(*results, strict=True):
        torch.testing.assert_close(triton, reference, rtol=1e-5, atol=1e-6)
print("equal")
"""


@pytest.mark.skipif(not _triton.AVAILABLE, reason="triton is not installed")
def test_the_triton_back_end_trains_as_the_torch_one_through_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert run.stdout == "equal\n", run.stderr
