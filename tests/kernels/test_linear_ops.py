"""Linear layers as they are composed of our ops: what autograd, compilers, tracers and memory see of them.

composed    F.linear(x, effective_weight(W, view), bias)
cached      the same with the caller's own Ŵ
deferred    the same, with the dense gradient left for the caller to multiply
fused       fused_linear(x, W, view, bias)
fused dW    the same with the caller's own Ŵ
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.fused import Case, Operands, answer, operands
from cases.product import equal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from tritonsparse.kernels.fused.linear import fused_linear
from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.op import effective_weight
from tritonsparse.kernels.weight.view import View

F64, OPS = torch.float64, torch.ops.tritonsparse
Layer = Callable[..., Tensor]


def composed(x: Tensor, weight: Tensor, view: View, bias: Tensor | None = None, **how: Any) -> Tensor:
    transposed = how.pop("transposed", False)
    w_hat = effective_weight(weight, view, dtype=x.dtype, **how)
    return F.linear(x, w_hat.t() if transposed else w_hat, bias)


def detached(*values: Any) -> list[Any]:
    return [value.detach() if isinstance(value, Tensor) else value for value in values]


def made(weight: Tensor, view: View, dtype: torch.dtype) -> Tensor:
    """Ŵ as its owner keeps it."""
    return effective_weight(weight.detach(), View(*detached(*view)), dtype=dtype)


def cached(x: Tensor, weight: Tensor, view: View, bias: Tensor | None = None, **how: Any) -> Tensor:
    return composed(x, weight, view, bias, cached=made(weight, view, x.dtype), **how)


def deferred(x: Tensor, weight: Tensor, view: View, bias: Tensor | None = None, **how: Any) -> Tensor:
    return composed(x, weight, view, bias, defer=True, **how)


def fused(x: Tensor, weight: Tensor, view: View, bias: Tensor | None = None, **how: Any) -> Tensor:
    return fused_linear(x, weight, view, bias, dtype=x.dtype, backend="torch", **how)


def fused_dw(x: Tensor, weight: Tensor, view: View, bias: Tensor | None = None, **how: Any) -> Tensor:
    return fused(x, weight, view, bias, w_hat=made(weight, view, x.dtype), **how)


LAYERS = [composed, cached, deferred, fused, fused_dw]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
kinds = pytest.mark.parametrize("kind", ["soft", "mask"])
turns = pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])


def given(kind: str, leading: tuple[int, ...] = (4,), dtype: torch.dtype = F64, **changed: Any) -> tuple[Any, ...]:
    """x, the weight, the view and the bias, of which all floating-point ones want a gradient."""
    case = Case(max(1, math.prod(leading)), 5, 7, kind, product="fp32", **changed)
    x, _, weight, view, bias, _ = operands(case)
    if view.threshold is not None:
        view = view._replace(threshold=view.threshold.to(F64 if dtype == F64 else torch.float32).requires_grad_())
    x = x[: math.prod(leading)].reshape(*leading, 7)
    return (*(t.to(dtype).detach().requires_grad_() for t in (x, weight)), view, bias.to(dtype).requires_grad_())


def gradients(y: Tensor, operands: tuple[Any, ...], grad_y: Tensor | None = None) -> dict[str, Tensor]:
    x, weight, view, bias = operands
    leaves = {"x": x, "weight": weight, "threshold": view.threshold, "bias": bias}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    grad_y = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape) if grad_y is None else grad_y
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_y), strict=True))


@pytest.mark.parametrize("leading", [(4,), (2, 3), (), (0,)], ids=["2-D", "3-D", "1-D", "no rows"])
@pytest.mark.parametrize("alpha", [None, 0.4, 1.0])
@turns
@pytest.mark.parametrize("kind", ["soft", "soft per row", "hard", "mask"])
def test_results_are_as_published(kind: str, transposed: bool, alpha: float | None, leading: tuple[int, ...]) -> None:
    for restricted in (False, True):
        args = given(kind, leading, transposed=transposed, alpha=alpha, restricted=restricted)
        x, weight, view, bias = detached(*args)
        grad_y = torch.randn(*leading, 5, dtype=F64)
        flat = Operands(x.reshape(-1, 7), grad_y.reshape(-1, 5), weight, view, bias, transposed)
        exact, _ = answer(flat)
        expected = {"weight": exact["grad_weight"], "bias": flat.grad_y.sum(0), "x": exact["grad_x"].view(x.shape)}
        if view.threshold is not None:
            expected["threshold"] = exact["grad_threshold"]
        for layer in LAYERS:
            y = layer(*args, transposed=transposed)
            found = gradients(y, args, grad_y)
            if layer is deferred:
                assert "threshold" not in found or not found["threshold"].any()
                left = zip(("weight", "threshold"), threshold_backward(found["weight"], weight, view), strict=True)
                found |= {name: grad for name, grad in left if grad is not None}
            torch.testing.assert_close(y, exact["y"].view(y.shape), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11, msg=layer.__name__)


@turns
@kinds
@pytest.mark.parametrize("layer", [composed, fused])
def test_without_alpha_the_backward_is_the_derivative(layer: Layer, kind: str, transposed: bool) -> None:
    # At W = 0 both W and -W are pruned: the derivative is 0 as the op says.
    x, weight, view, bias = given(kind, (3,), transposed=transposed, alpha=None, restricted=False)

    def op(x: Tensor, weight: Tensor, bias: Tensor, *threshold: Tensor) -> Tensor:
        return layer(x, weight, view._replace(threshold=next(iter(threshold), None)), bias, transposed=transposed)

    assert torch.autograd.gradcheck(op, [x, weight, bias, *([] if view.threshold is None else [view.threshold])])


@pytest.mark.parametrize(("kind", "transposed"), [("soft", False), ("soft per row", True), ("mask", False)])
def test_the_registered_ops_pass_opcheck(kind: str, transposed: bool) -> None:
    x, weight, view, bias = given(kind, (2, 3), torch.float32, transposed=transposed)
    rest, how = (view.threshold, view.mask, view.grad_mask, view.alpha), (kind.split()[0], "torch")
    torch.library.opcheck(OPS.effective_weight.default, (weight, *rest, *how, torch.bfloat16))
    grad = torch.randn_like(weight).detach()
    torch.library.opcheck(OPS.effective_weight_backward.default, (grad, *detached(weight, *rest), *how))
    how = (how[0], transposed, "torch")
    for w_hat in (None, torch.randn_like(weight).detach()):
        for b in (bias, None):
            torch.library.opcheck(OPS.fused_linear.default, (x, weight, b, *rest, w_hat, *how, torch.float32))
        saved = (torch.randn(2, 3, 5), *detached(x, weight, *rest), w_hat, *how)
        torch.library.opcheck(OPS.fused_linear_backward.default, (*saved, True, True))
        for needed in ((True, False), (False, True)):
            some = {"test_utils": ("test_schema", "test_faketensor")}
            torch.library.opcheck(OPS.fused_linear_backward.default, (*saved, *needed), **some)


def through_ops(layer: Layer) -> Layer:
    """The layer as what reads programs runs it: through the registered ops."""

    def run(*args: Any, **how: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            for module in ("fused.linear", "weight.op"):
                patch.setattr(sys.modules[f"tritonsparse.kernels.{module}"], "is_eager", lambda *_: False)
            return layer(*args, **how)

    return run


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@kinds
def test_eager_code_and_the_registered_ops_agree_bit_for_bit(kind: str, dtype: torch.dtype, layer: Layer) -> None:
    args = given(kind, (2, 3), dtype)
    eager, op = layer(*args), through_ops(layer)(*args)
    assert torch.equal(eager, op) and equal(gradients(eager, args), gradients(op, args))


@every_layer
def test_tracers_and_transforms_see_the_registered_ops(layer: Layer) -> None:
    x, weight, view, bias = detached(*given("mask", (3,)))

    def op(x: Tensor) -> Tensor:
        return layer(x, weight, view, bias)

    traced = {str(node.target) for node in make_fx(op)(x).graph.nodes}
    names = {fused: ["fused_linear"], fused_dw: ["fused_linear", "effective_weight"]}.get(layer, ["effective_weight"])
    assert {name for name in traced if "tritonsparse" in name} == {f"tritonsparse.{name}.default" for name in names}
    assert not any("aten.where" in target for target in traced)
    batch = torch.stack([x, 2.0 * x])
    torch.testing.assert_close(torch.func.vmap(op)(batch), torch.stack([op(each) for each in batch]))
    weight.requires_grad_()
    y = op(x)
    grad_ys = torch.randn(2, *y.shape, dtype=F64)
    (batched,) = torch.autograd.grad(y, weight, grad_ys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, weight, grad_y, retain_graph=True)[0] for grad_y in grad_ys]
    torch.testing.assert_close(batched, torch.stack(each))


@every_layer
@kinds
def test_beyond_its_operands_a_layer_saves_what_it_built_and_nothing_else(kind: str, layer: Layer) -> None:
    args, saved = given(kind, (2, 3)), {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(*args)
    for operand in (*args, *args[2]):
        if isinstance(operand, Tensor):
            saved.pop(operand.untyped_storage().data_ptr(), None)
    assert sum(saved.values()) == (0 if layer is fused else 8 * 5 * 7)


@pytest.mark.parametrize("layer", [fused, fused_dw])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["fp32", "fp64"])
def test_under_an_autocast_that_is_not_its_dtype_a_layer_computes_as_without(dtype: torch.dtype, layer: Layer) -> None:
    args = given("soft", (3,), dtype)
    expected = layer(*args)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(*args)
        ours = gradients(y, args)
    assert torch.equal(y, expected) and equal(ours, gradients(expected, args))


@every_layer
@kinds
def test_compiled_it_gives_the_same_numbers_and_moving_the_view_does_not_recompile(kind: str, layer: Layer) -> None:
    args = x, weight, view, bias = given(kind, (4,), torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(4):
        y, expected = compiled(*args), layer(*args)
        assert torch.equal(y, expected) and equal(gradients(y, args), gradients(expected, args))
        view.alpha.fill_(0.5 ** (step + 1) if step < 2 else 0.0)
        if view.threshold is not None:
            view.threshold.data.add_(0.3)
        else:
            args = x, weight, view._replace(mask=view.mask.roll(1)), bias
    assert counter.frame_count == 1


@every_layer
def test_a_threshold_gets_zeros_and_never_none_where_no_gradient_is_due(layer: Layer) -> None:
    args = given("soft", (3,), alpha=None)
    args[2].threshold.data.fill_(20.0)  # T = 1 - 2e-9
    args[1].data.clamp_(-0.5, 0.5)  # so that every weight is pruned, and alpha is None
    found = gradients(layer(*args), args)
    assert found["threshold"].tolist() == [0.0]
    assert layer is deferred or not found["weight"].any()


@every_layer
def test_frozen_operands_get_no_gradient_and_the_others_keep_theirs(layer: Layer) -> None:
    args = x, weight, view, bias = given("soft", (3,))
    y = layer(*args)
    expected = gradients(y, args)
    for frozen in ("x", "weight", "bias", "threshold"):
        part = {"x": x, "weight": weight, "bias": bias, "threshold": view.threshold}
        part = {name: leaf.detach().requires_grad_(name != frozen) for name, leaf in part.items()}
        now = part["x"], part["weight"], view._replace(threshold=part["threshold"]), part["bias"]
        assert equal(gradients(layer(*now), now), {name: grad for name, grad in expected.items() if name != frozen})
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            alone = layer(*args)
        assert torch.equal(alone, y) and not alone.requires_grad
        assert alone.is_inference() == (context is torch.inference_mode)


@every_layer
def test_the_output_aliases_nothing_no_operand_is_changed_and_a_second_derivative_is_refused(layer: Layer) -> None:
    args = given("mask", (3,))
    tensors = [t for t in (*args, *args[2]) if isinstance(t, Tensor)]
    before = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        layer(*args).fill_(math.nan)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    args = given("soft", (3,))
    (first,) = torch.autograd.grad(layer(*args).pow(2).sum(), args[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|differentiate"):
        first.sum().backward()


def test_a_cached_effective_weight_is_the_caller_s_own_memory() -> None:
    _, weight, view, _ = given("soft")
    w_hat = made(weight, view, F64)
    assert effective_weight(weight, view, cached=w_hat).data_ptr() == w_hat.data_ptr()
    assert effective_weight(weight, view, cached=w_hat, defer=True).data_ptr() == w_hat.data_ptr()
