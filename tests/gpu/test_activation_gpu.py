"""Packed activations on a GPU: bfloat16, graphs, compilers, memory, and offsets beyond 2^31.

A bound is 1.1 times the error that the reference makes on the same data, at least that of `tolerances.py`: relative RMS
against the product in float64.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import activation, sparse_input
from cases.block import no_synchronization
from graphs import captured
from tolerances import product_bound
from torch import Tensor

from tritonsparse.kernels.activation.compress import pack_activation, unpack_activation
from tritonsparse.kernels.activation.cutoff import activation_cutoff
from tritonsparse.kernels.activation.grad_weight import packed_grad_weight
from tritonsparse.kernels.activation.linear import sparse_input_linear
from tritonsparse.kernels.activation.packing import Packing

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


@pytest.mark.parametrize("half", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", [*activation.CASES, *activation.LARGE], ids=str)
def test_what_is_packed_and_multiplied_is_what_the_definition_keeps(case: activation.Case, half: torch.dtype) -> None:
    dtype = half if case.half else FP32
    ours, reference = activation.packed_errors(case, "triton", "torch", half=half, device=DEVICE, calls=2)
    assert ours <= max(1.1 * reference, product_bound(dtype, dtype, case.shape[0]))


@pytest.mark.parametrize("scope", ["batch", "sample", "plane"])
def test_a_cutoff_is_the_same_on_the_gpu_as_on_the_cpu(scope: str) -> None:
    x, row_mask = random(6, 50, 70), random(6, 50, seed=1) < 0.5
    row_mask[2] = False
    for mask in (None, row_mask):
        expected = activation_cutoff(x.cpu(), 0.2, scope, None if mask is None else mask.cpu())
        for backend in ("torch", "triton"):
            assert torch.equal(activation_cutoff(x, 0.2, scope, mask, backend).cpu(), expected)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("case", [*sparse_input.CASES, *sparse_input.LARGE], ids=str)
def test_the_ops_are_as_exact_as_their_reference(case: sparse_input.Case, dtype: torch.dtype) -> None:
    p = sparse_input.product(case, dtype, DEVICE)
    reference, length = p.errors(p.run("torch")), max(p.x.numel() // p.x.shape[-1], p.w_hat.numel() // case.out)
    for name, error in p.errors(p.run("triton")).items():
        assert error <= max(1.1 * reference[name], product_bound(dtype, dtype, length)), name


def step_of(x: Tensor, cutoff: Tensor, slack: float = math.inf, backend: str = "triton") -> Callable[[], Tensor]:
    weight, grad_y = random(128, 256, seed=1).requires_grad_(), random(64, 128, seed=2)
    packing = Packing(0.2, slack=slack, cutoff=cutoff)

    def step() -> Tensor:
        y = sparse_input_linear(x, weight, None, packing, backend=backend)[0]
        return torch.autograd.grad(y, weight, grad_y)[0]

    return step


def test_a_captured_pass_waits_for_nothing_and_follows_x_and_the_cutoff() -> None:
    x, cutoff = random(64, 256), torch.tensor([1.0], device=DEVICE)
    step = step_of(x, cutoff)
    step()
    with no_synchronization():
        step()
    graph, grad = captured(step)
    for value in (0.3, 2.0):
        cutoff.fill_(value)
        x.copy_(random(64, 256, seed=int(10 * value)))
        graph.replay()
        assert torch.equal(grad, step())
    for slack, backend in ((1.25, "triton"), (math.inf, "torch")):
        refused, words = step_of(x, cutoff, slack, backend), r"under CUDA graph capture.*pass slack=math\.inf"
        with pytest.raises(RuntimeError, match=words), torch.cuda.graph(torch.cuda.CUDAGraph()):
            refused()


def test_inductor_compiles_one_graph_that_survives_an_overflow() -> None:
    torch.compiler.reset()
    cutoff = torch.tensor([1.3], device=DEVICE)
    step = step_of(random(64, 256), cutoff, slack=1.25)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True)
        for value in (1.3, 0.1, 2.0):
            cutoff.fill_(value)
            assert torch.equal(compiled(), step())


def test_the_memory_between_the_passes_falls_to_a_third() -> None:
    source = random(16384, 1024, dtype=BF16)
    weight = random(256, 1024, dtype=BF16, seed=1).requires_grad_()

    def held(layer: Callable[[Tensor], Tensor]) -> int:
        before = torch.cuda.memory_allocated()
        y = layer(source * 1.0)  # an input that nobody else holds
        return torch.cuda.memory_allocated() - before - y.nbytes

    assert held(lambda x: F.linear(x, weight)) >= source.nbytes
    packed = held(lambda x: sparse_input_linear(x, weight, None, Packing(0.2), backend="triton")[0])
    assert packed < 0.35 * source.nbytes


def test_offsets_beyond_two_to_the_31() -> None:
    m, k = 70_001, 32_768
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    x = torch.zeros(m, k, dtype=BF16, device=DEVICE)
    x[:, 5] = x[:, -1] = 2.0
    packed = pack_activation(x, torch.ones(1, device=DEVICE), None, 2 * m, backend="triton")
    assert packed[2][-1] == 2 * m and not packed[3]
    assert torch.equal(unpack_activation(*packed[:3], k, backend="triton"), x)
    grad = packed_grad_weight(torch.ones(m, 1, dtype=BF16, device=DEVICE), *packed[:3], k, backend="triton")
    assert grad.count_nonzero() == 2 and grad[0, 5] == grad[0, -1] == torch.tensor(2.0 * m).bfloat16()
