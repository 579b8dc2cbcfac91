"""2:4 products without a GPU: the reference, the reasons, the refusals, and the op around cuSPARSELt's two calls."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import tritonsparse as ts

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parent))

from cases.matrices import error
from cases.semi_structured import CASES, Case, answer, operands, run

from tritonsparse.kernels import semi_structured
from tritonsparse.kernels.select.transposable import transposable_mask
from tritonsparse.kernels.semi_structured import semi_structured_linear, semi_structured_reason

FP16 = torch.float16
N, K = 64, 96


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """cuSPARSELt's two calls in plain torch, strict about what they are given; counts them."""
    calls = {"compress": 0, "multiply": 0}

    def compress(dense: Tensor) -> Tensor:
        calls["compress"] += 1
        assert dense.is_contiguous()
        groups = dense.view(-1, 4)
        assert int((groups != 0).sum(1).max()) <= 2, "no 2:4 matrix"
        # Two values and two places of each four, as the GPU's form has them.
        order = (groups != 0).to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :2]
        return torch.stack([groups.gather(1, order), order.to(dense.dtype)])

    def multiply(packed: Tensor, dense: Tensor, bias: Tensor | None, transpose_result: bool) -> Tensor:
        calls["multiply"] += 1
        k, count = dense.shape
        # What the library assumes of an operand that is not contiguous.
        assert dense.t().is_contiguous() and count % 8 == 0 and transpose_result
        values, places = packed
        matrix = torch.zeros(values.shape[0], 4, dtype=dense.dtype).scatter_(1, places.long(), values).view(-1, k)
        y = matrix @ dense
        return (y if bias is None else y + bias[:, None]).t().contiguous()

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(semi_structured, "hardware_reason", lambda device: None)
    return calls


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_dense_product(case: Case) -> None:
    o = operands(case, torch.float64)
    found, exact = run(o, "torch"), answer(o)
    assert found.keys() == exact.keys() and all(torch.equal(found[name], exact[name]) for name in exact)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sparse_op_has_the_reference_s_output_and_gradients(case: Case, emulated: dict[str, int]) -> None:
    o = operands(case, FP16)
    found, reference, exact = run(o, "semi_structured"), run(o, "torch"), answer(o)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.dtype == FP16 and value.shape == reference[name].shape
        # The same products in half precision, summed by other kernels.
        assert error(value, exact[name]) < 1e-3, name
    # The forward, and dX where it is sparse; each compresses its own. Of no rows nothing is multiplied.
    products = (2 if case.both else 1) if o.x.numel() else 0
    assert emulated == {"compress": products, "multiply": products}


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_compiled_it_is_one_graph_with_the_same_numbers(case: Case, emulated: dict[str, int]) -> None:
    o, counter = operands(case, FP16), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(semi_structured_linear, fullgraph=True, backend=counter)
    for _ in range(2):
        ours, theirs = run(o, "semi_structured", compiled), run(o, "semi_structured")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        o.w_hat.data.mul_(0.5)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("pattern", "products"), [("2:4", 1), ("2:4:transposable", 2)])
def test_layers_multiply_sparsely_what_their_pattern_allows(
    pattern: str, products: int, emulated: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("tritonsparse.sparsify"), "hardware_reason", lambda device: None)
    torch.manual_seed(0)
    layer = torch.nn.Linear(K, N).half()
    expected = copy.deepcopy(layer)
    ts.sparsify(layer, "static", sparsity=0.5, pattern=pattern, total_steps=4, backend="semi_structured")
    ts.sparsify(expected, "static", sparsity=0.5, pattern=pattern, total_steps=4, backend="torch")
    x, grads = torch.randn(5, K).half(), {}
    for name, each in (("ours", layer), ("theirs", expected)):
        leaf = x.clone().requires_grad_()
        each(leaf).float().square().sum().backward()
        grads[name] = (leaf.grad, each.weight.grad, each.bias.grad)
    for ours, theirs in zip(grads["ours"], grads["theirs"], strict=True):
        assert error(ours, theirs) < 5e-3
    assert emulated["multiply"] == products


def test_eager_code_goes_around_torch_library_and_nothing_is_saved_without_a_gradient(emulated: dict[str, int]) -> None:
    o = operands(CASES[3], FP16)
    with torch.autograd.profiler.profile() as profile:
        expected = run(o, "semi_structured")["y"]
    assert not [event.name for event in profile.function_events if event.name.startswith("tritonsparse")]
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("saved"), lambda each: each):
        y = semi_structured_linear(o.x, o.w_hat, o.bias, backend="semi_structured", **o.options)
    assert torch.equal(y, expected)


def test_the_ops_obey_the_rules_of_torch_library(emulated: dict[str, int]) -> None:
    o, utilities = operands(CASES[3], FP16), ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (o.x, o.w_hat, o.bias, o.case.transposed, o.case.both)
    torch.library.opcheck(torch.ops.tritonsparse.semi_structured_linear.default, args, test_utils=utilities)
    args = (o.grad_y, o.w_hat.detach(), o.case.transposed)
    torch.library.opcheck(
        torch.ops.tritonsparse.semi_structured_grad_input.default, args, test_utils=("test_schema", "test_faketensor")
    )


def test_all_that_stands_in_the_way_is_named() -> None:
    two = torch.tensor([True, True, False, False]).repeat(64, 24)
    three, square, both = two.clone(), two.repeat(2, 1)[:96], transposable_mask(torch.rand(64, 96), 2, 4)
    three[5, 2] = True
    on_cpu = "2:4 products need a GPU, and the operands are on cpu"
    along = "the mask keeps more than 2 of some 4 neighbours along a {} of W [N, K]; " + on_cpu
    x, narrow, weight = torch.zeros(8, 96).half(), torch.zeros(64, 90), torch.zeros(64, 96)
    reason = semi_structured_reason
    assert reason(x.float(), weight) == f"2:4 products are in float16 or bfloat16, and x is in torch.float32; {on_cpu}"
    shape = reason(x[:, :90], narrow)
    assert shape is not None and "this one is 64 x 90" in shape and shape.endswith(on_cpu)
    assert reason(x, weight, two) == on_cpu and reason(x, weight, three) == along.format("row")
    # Along the inputs of a weight stored [K, N], and along those only.
    assert reason(x, weight.t(), two.t(), transposed=True) == on_cpu
    assert reason(x, torch.zeros(96, 96), square, transposed=True) == along.format("row")
    # Along the outputs too, where dX is asked for.
    assert reason(x, weight, both, sparse_grad_input=True) == on_cpu
    assert reason(x, weight.t(), both.t(), transposed=True, sparse_grad_input=True) == on_cpu
    assert reason(x, weight, two, sparse_grad_input=True) == along.format("column")
    # Fewer than two is no obstacle.
    assert reason(x, weight, torch.zeros(64, 96).bool()) == on_cpu


@pytest.mark.parametrize(
    ("change", "kind", "expected", "remedy"),
    [
        ({"backend": "cuda"}, ValueError, 'backend "torch" or "semi_structured", got \'cuda\'', "pass either"),
        ({"x": torch.zeros(2, 64).half()}, ValueError, f"x of shape [..., {K}]", "check the layer's input"),
        ({"x": torch.zeros(2, K)}, ValueError, "x in torch.float16 ", "cast x or run under torch.autocast"),
        ({"bias": torch.zeros(N)}, ValueError, f"bias to be torch.float16 [{N}]", "cast the bias with x"),
        ({"w_hat": torch.zeros(N)}, ValueError, "w_hat to be a floating-point matrix [N, K]", "effective weight"),
        ({"x": torch.zeros(2, K), "w_hat": torch.zeros(N, K), "bias": None}, ValueError, "torch.float32", '"torch"'),
        ({"x": torch.zeros(2, 90).half(), "w_hat": torch.zeros(N, 90).half()}, ValueError, "is 64 x 90", '"torch"'),
        ({}, RuntimeError, "need a GPU, and the operands are on cpu", 'pass backend="torch"'),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(
    change: dict[str, Any], kind: type[Exception], expected: str, remedy: str
) -> None:
    o = operands(CASES[0], FP16)
    given = {"x": o.x, "w_hat": o.w_hat, "bias": o.bias, "backend": "semi_structured"} | change
    with pytest.raises(kind) as caught:
        semi_structured_linear(**given)
    message = str(caught.value)
    assert message.startswith("semi_structured_linear: expected ") and expected in message and remedy in message
