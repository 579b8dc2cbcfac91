"""Packed activations on a GPU: bfloat16, graphs, compilers, memory, and offsets beyond 2^31.

A bound is 1.1 times the error that the reference makes on the same data, at least that of `tolerances.py`: relative RMS
against the product in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import product_bound
from torch import Tensor

from tritonsparse.kernels.activation.compress import pack_activation, unpack_activation
from tritonsparse.kernels.activation.cutoff import activation_cutoff
from tritonsparse.kernels.activation.grad_weight import packed_grad_weight
from tritonsparse.kernels.activation.linear import packed_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Rows of tokens and features: nothing divisible, single rows and columns, a layer's.
SHAPES = [(1, 1), (1, 2049), (257, 1), (64, 64), (63, 1025), (2000, 511), (8192, 1024)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).norm().item() / (exact.norm().item() or 1.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_and_unpacking_are_the_references_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    x[random(*shape, seed=1) > 1] = 0.0
    row_mask = random(shape[0], seed=2) < 1
    for cutoff in (activation_cutoff(x, 0.2, row_mask=row_mask), random(shape[0], seed=3).abs()):
        for capacity in (x.numel(), x.numel() // 10):
            expected = pack_activation(x, cutoff, row_mask, capacity)
            actual = pack_activation(x, cutoff, row_mask, capacity, backend="triton")
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))
            unpacked = unpack_activation(*actual[:3], shape[1], backend="triton")
            reference = unpack_activation(*expected[:3], shape[1])
            torch.testing.assert_close(unpacked, reference, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scope", ["batch", "sample", "plane"])
def test_a_cutoff_is_the_same_on_the_gpu_as_on_the_cpu(scope: str) -> None:
    x, row_mask = random(6, 50, 70), random(6, 50, seed=1) < 0.5
    row_mask[2] = False
    for mask in (None, row_mask):
        expected = activation_cutoff(x.cpu(), 0.2, scope, None if mask is None else mask.cpu())
        assert torch.equal(activation_cutoff(x, 0.2, scope, mask).cpu(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_is_as_exact_as_the_vendors(shape: tuple[int, int], transposed: bool, dtype: torch.dtype) -> None:
    x, grad_y = random(*shape, dtype=dtype), random(shape[0], 300, dtype=dtype, seed=1)
    packed = pack_activation(x, torch.tensor([1.3], device=DEVICE), None, x.numel(), backend="triton")[:3]
    results = [
        packed_grad_weight(grad_y, *packed, shape[1], transposed=transposed, backend=backend)
        for backend in ("triton", "triton", "torch")
    ]
    exact = grad_y.double().t() @ unpack_activation(*packed, shape[1]).double()
    exact = exact.t() if transposed else exact
    assert torch.equal(results[0], results[1])
    bound = max(1.1 * error(results[2], exact), product_bound(dtype, results[0].dtype, shape[0]))
    assert error(results[0], exact) <= bound


@pytest.mark.parametrize("kind", ["dense", "soft", "mask"])
def test_the_ops_back_ends_agree_also_when_it_overflows(kind: str) -> None:
    x, weight = random(8, 128, 512, dtype=torch.bfloat16), random(256, 512, seed=1)
    mask = weight.abs() > 1 if kind == "mask" else None
    threshold = torch.tensor([-1.0], device=DEVICE) if kind == "soft" else None
    settings: dict[str, Any] = {"kind": kind, "mask": mask, "threshold": threshold, "out_dtype": torch.bfloat16}
    settings["row_mask"] = random(8, 128, seed=2) < 1
    grad_y = random(8, 128, 256, dtype=torch.bfloat16, seed=3)
    for cutoff in (None, torch.tensor([0.5], device=DEVICE)):
        results = []
        for backend in ("torch", "triton"):
            leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            y, used, overflow = packed_linear(*leaves, density=0.2, cutoff=cutoff, backend=backend, **settings)
            assert bool(overflow) == (cutoff is not None)
            results.append([y, used, *torch.autograd.grad(y, leaves, grad_y)])
        for name, expected, actual in zip(("y", "cutoff", "dx", "dW"), *results, strict=True):
            # Each back end rounds once; dW sums over 1024 rows.
            assert error(actual, expected.double()) <= 2 * product_bound(x.dtype, x.dtype, 1024), name


def test_a_captured_pass_follows_x_and_the_cutoff() -> None:
    x, weight = random(64, 256), random(128, 256, seed=1).requires_grad_()
    cutoff, grad_y = torch.tensor([1.0], device=DEVICE), random(64, 128, seed=2)

    def step() -> Tensor:
        y = packed_linear(x, weight, density=0.2, cutoff=cutoff, slack=math.inf, backend="triton")[0]
        return torch.autograd.grad(y, weight, grad_y)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = step()
    for value in (0.3, 2.0):
        cutoff.fill_(value)
        x.copy_(random(64, 256, seed=int(10 * value)))
        graph.replay()
        assert torch.equal(grad, step())


def test_a_capture_without_room_for_all_is_refused_with_the_remedy() -> None:
    x, weight = random(64, 256), random(128, 256, seed=1)
    settings: dict[str, Any] = {"density": 0.2, "cutoff": torch.ones(1, device=DEVICE)}
    packed_linear(x, weight, backend="triton", **settings)
    for backend, slack in (("triton", 1.25), ("torch", math.inf)):
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.raises(RuntimeError, match=r"under CUDA graph capture.*pass slack=math.inf"),
            torch.cuda.graph(graph),
        ):
            packed_linear(x, weight, backend=backend, slack=slack, **settings)


def test_inductor_compiles_one_graph_that_survives_an_overflow() -> None:
    torch.compiler.reset()
    x, weight = random(64, 256), random(128, 256, seed=1).requires_grad_()
    cutoff, grad_y = torch.tensor([1.3], device=DEVICE), random(64, 128, seed=2)

    def step(x: Tensor) -> Tensor:
        return packed_linear(x, weight, density=0.2, cutoff=cutoff, backend="triton")[0]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True)
        for value in (1.3, 0.1, 2.0):
            cutoff.fill_(value)
            grads = [torch.autograd.grad(one(x), weight, grad_y)[0] for one in (compiled, step)]
            assert torch.equal(*grads)


def test_the_memory_between_the_passes_falls_to_a_third() -> None:
    source = random(16384, 1024, dtype=torch.bfloat16)
    weight = random(256, 1024, dtype=torch.bfloat16, seed=1).requires_grad_()

    def held(layer: Callable[[Tensor], Tensor]) -> int:
        before = torch.cuda.memory_allocated()
        y = layer(source * 1.0)  # an input that nobody else holds
        return torch.cuda.memory_allocated() - before - y.nbytes

    assert held(lambda x: F.linear(x, weight)) >= source.nbytes
    assert held(lambda x: packed_linear(x, weight, density=0.2, backend="triton")[0]) < 0.35 * source.nbytes


def test_offsets_beyond_two_to_the_31() -> None:
    m, k = 70_001, 32_768
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    x = torch.zeros(m, k, dtype=torch.bfloat16, device=DEVICE)
    x[:, 5] = x[:, -1] = 2.0
    packed = pack_activation(x, torch.ones(1, device=DEVICE), None, 2 * m, backend="triton")
    assert packed[2][-1] == 2 * m and not packed[3]
    assert torch.equal(unpack_activation(*packed[:3], k, backend="triton"), x)
    grad = packed_grad_weight(torch.ones(m, 1, dtype=torch.bfloat16, device=DEVICE), *packed[:3], k, backend="triton")
    assert grad.count_nonzero() == 2 and grad[0, 5] == grad[0, -1] == torch.tensor(2.0 * m).bfloat16()
