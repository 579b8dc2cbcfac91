"""2:4 products without a GPU: the reference, the reasons, the refusals, and the op around cuSPARSELt's two calls."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonsparse as ts
from tritonsparse.kernels import semi_structured
from tritonsparse.kernels.fused.linear import masked_linear
from tritonsparse.kernels.select.n_of_m import n_of_m_mask
from tritonsparse.kernels.select.transposable import transposable_mask
from tritonsparse.kernels.semi_structured import (
    pack_semi_structured,
    semi_structured_linear,
    semi_structured_reason,
)

N, K = 64, 96


def operands(dtype: torch.dtype = torch.float16, transposed: bool = False, **more: Any) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=random)
    mask = n_of_m_mask(weight, 2, 4, magnitude=True)
    if transposed:
        weight, mask = weight.t().contiguous(), mask.t().contiguous()
    return {
        "x": torch.randn(3, 7, K, generator=random).to(dtype),
        "weight": weight,
        "bias": torch.randn(N, generator=random).to(dtype),
        "mask": mask,
        "grad_mask": torch.rand(weight.shape, generator=random) < 0.7,
        "alpha": torch.tensor(0.25),
        "transposed": transposed,
    } | more


def with_grads(function: Any, given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The output, and the gradients of x, weight and bias under a random gradient of it."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("x", "weight", "bias")}
    y = function(**(given | leaves), **options)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y), strict=True))


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


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_reference_is_the_masked_product_and_its_gradients(transposed: bool, defer: bool) -> None:
    given = operands(torch.float64, transposed)
    actual = with_grads(semi_structured_linear, given, defer=defer)
    expected = with_grads(masked_linear, given, kind="mask", out_dtype=torch.float64, defer=defer)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("given_views", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_sparse_forward_has_the_reference_s_output_and_gradients(
    transposed: bool, given_views: bool, defer: bool, emulated: dict[str, int]
) -> None:
    given = operands(transposed=transposed)
    if given_views:
        w_hat = (given["weight"] * given["mask"]).half()
        given |= {"w_hat": w_hat, "packed": pack_semi_structured(w_hat, transposed=transposed)}
    actual = with_grads(semi_structured_linear, given, backend="semi_structured", defer=defer)
    given.pop("packed", None)
    expected = with_grads(semi_structured_linear, given, defer=defer)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape
        error = (actual[name].float() - value.float()).norm() / value.float().norm()
        # The same products in half precision, summed by other kernels.
        assert error < 2e-3, name
    assert emulated == {"compress": 1, "multiply": 1}


@pytest.mark.parametrize("given_view", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_transposable_mask_has_a_sparse_grad_input_too(
    transposed: bool, given_view: bool, emulated: dict[str, int]
) -> None:
    given = operands(transposed=transposed)
    given["mask"] = transposable_mask(given["weight"], 2, 4, magnitude=True)
    if given_view:
        given["w_hat"] = (given["weight"] * given["mask"]).half()
    expected = with_grads(semi_structured_linear, given, sparse_grad_input=True)
    actual = with_grads(semi_structured_linear, given, backend="semi_structured", sparse_grad_input=True)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape
        assert (actual[name].float() - value.float()).norm() / value.float().norm() < 2e-3, name
    # The forward and dX; each has packed its own.
    assert emulated == {"compress": 2, "multiply": 2}


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
        assert (ours.float() - theirs.float()).norm() / theirs.float().norm() < 5e-3
    assert emulated["multiply"] == products


def test_a_forward_that_nothing_differentiates_reads_only_what_is_packed(emulated: dict[str, int]) -> None:
    given = operands()
    expected = semi_structured_linear(**given)
    packed = pack_semi_structured((given["weight"] * given["mask"]).half())
    with torch.no_grad():
        poisoned = given | {"weight": torch.full_like(given["weight"], float("nan"))}
        y = semi_structured_linear(**poisoned, packed=packed, backend="semi_structured")
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-2)
    assert emulated == {"compress": 1, "multiply": 1}


@pytest.mark.parametrize("rows", [0, 1, 8, 13])
def test_any_number_of_rows_and_any_strides_are_multiplied(rows: int, emulated: dict[str, int]) -> None:
    wide = torch.randn(K, 2 * rows).half()
    given = operands(x=wide[:, ::2].t(), bias=None, grad_mask=None, alpha=None)
    y = semi_structured_linear(**given, backend="semi_structured")
    assert y.shape == (rows, N)
    torch.testing.assert_close(y, semi_structured_linear(**given), rtol=2e-3, atol=2e-2)


def test_the_op_obeys_the_rules_of_torch_library(emulated: dict[str, int]) -> None:
    given = operands()
    leaves = [given["x"].requires_grad_(), given["weight"].requires_grad_(), given["bias"].requires_grad_()]
    views = (given["mask"], given["grad_mask"], given["alpha"], None, None)
    torch.library.opcheck(
        torch.ops.tritonsparse.semi_structured_linear.default,
        (*leaves, *views, False, False, True, False),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    both = transposable_mask(given["weight"].detach(), 2, 4, magnitude=True)
    w_hat = (given["weight"].detach() * both).half()
    torch.library.opcheck(
        torch.ops.tritonsparse.semi_structured_grad_input.default,
        (torch.randn(3, 7, N).half(), w_hat, False),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_all_that_stands_in_the_way_is_named() -> None:
    x, weight = torch.zeros(8, 90), torch.zeros(64, 90)
    two = torch.tensor([True, True, False, False]).repeat(64, 24)
    three = two.clone()
    three[5, 2] = True
    on_cpu = "2:4 products need a GPU, and the operands are on cpu"
    assert semi_structured_reason(x, weight) == (
        f"2:4 products are in float16 or bfloat16, and x is in torch.float32; {on_cpu}"
    )
    shape = semi_structured_reason(x.half(), weight)
    assert shape is not None and "this one is 64 x 90" in shape and shape.endswith(on_cpu)
    x, weight = torch.zeros(8, 96).half(), torch.zeros(64, 96)
    assert semi_structured_reason(x, weight, two) == on_cpu
    reason = semi_structured_reason(x, weight, three)
    assert reason is not None and reason.startswith("the mask keeps more than 2 of some 4 neighbours along a row")
    # Along the inputs of a weight stored [K, N], and along those only.
    assert semi_structured_reason(x, weight.t(), two.t(), transposed=True) == on_cpu
    square = torch.tensor([True, True, False, False]).repeat(96, 24)
    reason = semi_structured_reason(x, torch.zeros(96, 96), square, transposed=True)
    assert reason is not None and reason.startswith("the mask keeps more than 2")
    # Along the outputs too, where dX is asked for.
    weight, both = torch.zeros(64, 96), transposable_mask(torch.rand(64, 96), 2, 4)
    assert semi_structured_reason(x, weight, both, sparse_grad_input=True) == on_cpu
    assert semi_structured_reason(x, weight.t(), both.t(), transposed=True, sparse_grad_input=True) == on_cpu
    reason = semi_structured_reason(x, weight, two, sparse_grad_input=True)
    assert reason == f"the mask keeps more than 2 of some 4 neighbours along a column of W [N, K]; {on_cpu}"
    # Fewer than two is no obstacle.
    assert semi_structured_reason(x, weight, torch.zeros(64, 96).bool()) == on_cpu


@pytest.mark.parametrize(
    ("change", "kind", "expected", "remedy"),
    [
        ({"backend": "cuda"}, ValueError, 'backend "torch" or "semi_structured", got \'cuda\'', "pass either"),
        ({"x": torch.zeros(2, 64).half()}, ValueError, f"x of shape [..., {K}]", "check the layer's input"),
        ({"bias": torch.zeros(N)}, ValueError, f"bias to be torch.float16 [{N}]", "cast the bias with x"),
        ({"w_hat": torch.zeros(N, K)}, ValueError, f"w_hat to be torch.float16 [{N}, {K}]", "leave it out"),
        ({"mask": torch.zeros(N, K)}, ValueError, f"mask to be bool [{N}, {K}]", "True where kept"),
        ({"x": torch.zeros(2, K), "bias": None}, ValueError, "x is in torch.float32", 'pass backend="torch"'),
        ({}, RuntimeError, "need a GPU, and the operands are on cpu", 'pass backend="torch"'),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(
    change: dict[str, Any], kind: type[Exception], expected: str, remedy: str
) -> None:
    with pytest.raises(kind) as error:
        semi_structured_linear(**operands() | {"backend": "semi_structured"} | change)
    message = str(error.value)
    assert message.startswith("semi_structured_linear: expected ") and expected in message and remedy in message


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pack_semi_structured: .* this one is 64 x 90"):
        pack_semi_structured(torch.zeros(64, 90).half())
    with pytest.raises(RuntimeError, match=r"pack_semi_structured: .* need a GPU"):
        pack_semi_structured(torch.zeros(64, 96).half())
