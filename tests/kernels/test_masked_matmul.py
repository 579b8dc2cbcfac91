"""The op of every sparse linear layer against the plain formulation that autograd differentiates by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from tritonsparse.kernels.fused.linear import masked_linear

F64 = torch.float64
N, K = 5, 7


def operands(kind: str, transposed: bool, *x_shape: int, dtype: torch.dtype = F64) -> dict[str, Any]:
    """Random operands; W holds an exact 0, and for "soft" no |W| lies within 1e-3 of T = 0.2689."""
    shape = (K, N) if transposed else (N, K)
    weight = torch.randn(shape, dtype=dtype)
    cutoff = 1 / (1 + math.e)
    weight = torch.where((weight.abs() - cutoff).abs() < 1e-3, weight + 0.01, weight)
    weight[0, 0] = 0.0
    soft = kind == "soft"
    return {
        "x": torch.randn(*x_shape, K, dtype=dtype, requires_grad=True),
        "weight": weight.requires_grad_(),
        "bias": torch.randn(N, dtype=dtype, requires_grad=True),
        "threshold": torch.tensor([-1.0], dtype=dtype, requires_grad=True) if soft else None,
        "mask": None if soft else torch.rand(shape) < 0.5,
    }


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor,
    transposed: bool,
) -> Tensor:
    """u - u.detach() is worth 0 and has gradient 1: `leak` of it is the annealed gradient of pruned weights."""
    b = torch.ones_like(weight, dtype=torch.bool) if grad_mask is None else grad_mask
    if threshold is not None:
        u = weight.abs() - torch.sigmoid(threshold)
        leak = alpha * (b & (u <= 0))
        w_hat = weight.sign() * (u.relu() + leak * (u - u.detach()))
    else:
        assert mask is not None
        w_hat = weight * mask + alpha * (b & ~mask) * (weight - weight.detach())
    return F.linear(x, w_hat.t() if transposed else w_hat, bias)


def grads(y: Tensor, grad_y: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: value for name, value in given.items() if value is not None and value.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y), strict=True))


@pytest.mark.parametrize("x_shape", [(4,), (2, 3), (), (0,)], ids=["2-D", "3-D", "1-D", "no rows"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_value_and_all_gradients_equal_the_plain_formulation(
    kind: str, transposed: bool, alpha: float, x_shape: tuple[int, ...]
) -> None:
    given = operands(kind, transposed, *x_shape)
    # alpha is float32: the comparison reads 0.4 as the op does.
    a = torch.tensor(alpha)
    for grad_mask in (None, torch.rand(given["weight"].shape) < 0.7):
        y = masked_linear(**given, kind=kind, alpha=a, grad_mask=grad_mask, transposed=transposed)
        expected = plain(**given, grad_mask=grad_mask, alpha=a.double(), transposed=transposed)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        grad_y = torch.randn_like(y)
        ours, theirs = grads(y, grad_y, given), grads(expected, grad_y, given)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11, msg=f"d{name}")


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_without_annealing_the_backward_is_the_derivative(kind: str, transposed: bool) -> None:
    given = operands(kind, transposed, 3)
    # At W = 0 both W and -W are pruned: the derivative is 0 as the op says.
    leaves = [name for name in given if given[name] is not None and given[name].requires_grad]

    def op(*values: Tensor) -> Tensor:
        return masked_linear(**given | dict(zip(leaves, values, strict=True)), kind=kind, transposed=transposed)

    assert torch.autograd.gradcheck(op, [given[name] for name in leaves])


def test_one_threshold_per_row_gets_one_gradient_per_row() -> None:
    given = operands("soft", False, 4)
    given["threshold"] = torch.linspace(-2, 0, N, dtype=F64).requires_grad_()
    a = torch.tensor(0.5)
    y = masked_linear(**given, kind="soft", alpha=a)
    columns = given | {"threshold": given["threshold"][:, None]}
    expected = plain(**columns, grad_mask=None, alpha=a.double(), transposed=False)
    grad_y = torch.randn_like(y)
    ours, theirs = grads(y, grad_y, given), grads(expected, grad_y, given)
    assert ours["threshold"].shape == (N,)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_both_ops_pass_opcheck(kind: str, transposed: bool, bias: bool) -> None:
    given = operands(kind, transposed, 2, 3, dtype=torch.float32)
    shape, alpha = given["weight"].shape, torch.tensor(0.5)
    grad_mask = torch.rand(shape) < 0.7
    view = (given["threshold"], given["mask"], grad_mask, alpha)
    how = (kind, transposed, "torch")
    for w_hat, defer in ((None, False), (torch.randn(shape), False), (None, True)):
        args = (given["x"], given["weight"], given["bias"] if bias else None, *view, w_hat)
        torch.library.opcheck(torch.ops.tritonsparse.masked_linear.default, (*args, *how, torch.float32, defer, True))
    tensors = [torch.randn(2, 3, N), given["x"].detach(), given["weight"].detach(), torch.randn(shape)]
    threshold = None if given["threshold"] is None else given["threshold"].detach()
    for need_x, need_weight, defer in ((1, 1, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1)):
        backward = (*tensors, threshold, *view[1:], *how, bool(need_x), bool(need_weight), bool(defer))
        torch.library.opcheck(torch.ops.tritonsparse.masked_linear_backward.default, backward)


@pytest.mark.parametrize("defer", [False, True], ids=["", "deferred"])
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_eager_code_and_the_registered_op_agree_bit_for_bit(
    kind: str, dtype: torch.dtype, cached: bool, defer: bool
) -> None:
    given = operands(kind, False, 2, 3, dtype=dtype)
    if given["threshold"] is not None:
        given["threshold"] = given["threshold"].detach().float().requires_grad_()
    shape = given["weight"].shape
    view = {"grad_mask": torch.rand(shape) < 0.7, "alpha": torch.tensor(0.5)}
    w_hat = torch.randn(shape, dtype=dtype) if cached else None
    eager = masked_linear(**given, **view, kind=kind, w_hat=w_hat, defer=defer)
    tensors = (*given.values(), *view.values(), w_hat)
    op, _ = torch.ops.tritonsparse.masked_linear(*tensors, kind, False, "torch", dtype, defer, True)
    grad_y = torch.randn_like(eager)
    ours, theirs = grads(eager, grad_y, given), grads(op, grad_y, given)
    assert torch.equal(eager, op)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tracers_and_transforms_see_the_registered_op() -> None:
    given = operands("mask", False, 3)
    weight, mask = given["weight"].detach(), given["mask"]

    def op(x: Tensor) -> Tensor:
        return masked_linear(x, weight, kind="mask", mask=mask)

    x = given["x"].detach()
    traced = [str(node.target) for node in make_fx(op)(x).graph.nodes]
    assert "tritonsparse.masked_linear.default" in traced and not any("aten.addmm" in target for target in traced)
    batch = torch.stack([x, 2.0 * x])
    assert torch.equal(torch.func.vmap(op)(batch), torch.stack([op(each) for each in batch]))
    y = masked_linear(**given, kind="mask")
    grad_ys = torch.randn(2, *y.shape, dtype=F64)
    (batched,) = torch.autograd.grad(y, given["weight"], grad_ys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, given["weight"], grad_y, retain_graph=True)[0] for grad_y in grad_ys]
    assert torch.equal(batched, torch.stack(each))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_where_nothing_is_differentiated_nothing_is_saved(context: Any) -> None:
    given = operands("soft", False, 3)
    expected = masked_linear(**given, kind="soft")
    with context():
        y = masked_linear(**given, kind="soft")
    assert torch.equal(y, expected) and not y.requires_grad and y.is_inference() == (context is torch.inference_mode)


@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_beyond_its_operands_it_keeps_what_it_built_and_nothing_else(kind: str, cached: bool) -> None:
    given = operands(kind, False, 2, 3)
    shape = given["weight"].shape
    view = {"grad_mask": torch.rand(shape) < 0.7, "alpha": torch.tensor(0.5)}
    w_hat = torch.randn(shape, dtype=F64) if cached else None
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masked_linear(**given, **view, kind=kind, w_hat=w_hat)
    for operand in (*given.values(), *view.values(), w_hat):
        if operand is not None:
            kept.pop(operand.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == (0 if cached else 8 * N * K)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["fp32", "fp64"])
def test_under_an_autocast_that_is_not_its_dtype_it_computes_as_without(dtype: torch.dtype) -> None:
    given = operands("soft", False, 3, dtype=dtype)
    plain_y = masked_linear(**given, kind="soft")
    grad_y = torch.randn_like(plain_y)
    expected = grads(plain_y, grad_y, given)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(**given, kind="soft")
        ours = grads(y, grad_y, given)
    assert torch.equal(y, plain_y)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_compiled_it_gives_the_same_numbers_and_moving_the_view_does_not_recompile(kind: str) -> None:
    given = operands(kind, False, 4, dtype=torch.float32)
    alpha = torch.tensor(0.75)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(masked_linear, fullgraph=True, backend=counter)
    for step in range(4):
        y, expected = (op(**given, kind=kind, alpha=alpha) for op in (compiled, masked_linear))
        grad_y = torch.randn_like(y)
        ours, theirs = grads(y, grad_y, given), grads(expected, grad_y, given)
        assert torch.equal(y, expected)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        alpha.fill_(0.5 ** (step + 1) if step < 2 else 0.0)
        if given["threshold"] is not None:
            given["threshold"].data.add_(0.3)
        else:
            given["mask"] = given["mask"].roll(1)
    assert counter.frame_count == 1


def test_threshold_gets_zeros_and_never_none_where_no_gradient_is_due() -> None:
    given = operands("soft", False, 3)
    given["threshold"].data.fill_(20.0)  # T = 1 - 2e-9
    given["weight"].data.clamp_(-0.5, 0.5)  # so that every weight is pruned, and alpha is None
    y = masked_linear(**given, kind="soft")
    y.backward(torch.randn_like(y))
    assert given["threshold"].grad.tolist() == [0.0]
    assert not given["weight"].grad.any()


def test_frozen_operands_get_no_gradient_and_the_others_keep_theirs() -> None:
    given = operands("soft", False, 3)
    full = masked_linear(**given, kind="soft")
    grad_y = torch.randn_like(full)
    expected = grads(full, grad_y, given)
    for frozen in ("x", "weight", "bias", "threshold"):
        part = {name: None if t is None else t.detach().requires_grad_(name != frozen) for name, t in given.items()}
        ours = grads(masked_linear(**part, kind="soft"), grad_y, part)
        assert ours.keys() == expected.keys() - {frozen}
        assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_the_output_aliases_nothing_and_no_operand_is_changed() -> None:
    given = operands("mask", False, 3)
    before = {name: value.detach().clone() for name, value in given.items() if value is not None}
    y = masked_linear(**given, kind="mask")
    with torch.no_grad():
        y.fill_(math.nan)
    assert all(torch.equal(given[name], before[name]) for name in before)


def test_a_second_derivative_is_refused() -> None:
    given = operands("soft", False, 3)
    y = masked_linear(**given, kind="soft")
    (first,) = torch.autograd.grad(y.pow(2).sum(), given["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        first.sum().backward()


def test_x_of_another_dtype_is_refused_with_the_remedy() -> None:
    given = operands("mask", False, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"expected x in torch.float32.*got torch.float64.*autocast"):
        masked_linear(**given | {"x": given["x"].double()}, kind="mask")


@pytest.mark.parametrize("x", [torch.zeros(3, K + 1, dtype=F64), torch.zeros((), dtype=F64)], ids=["K + 1", "0-D"])
def test_x_of_another_width_is_refused_with_the_width_it_should_have(x: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"expected x of shape \[..., {K}\].*check the layer's input"):
        masked_linear(**operands("mask", False, 3) | {"x": x}, kind="mask")
