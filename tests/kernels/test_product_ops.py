"""What torch asks of every op that multiplies by an effective weight; and 2:4 products, emulated."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import semi_structured as two_of_four
from cases import sparse_input
from cases.matrices import error
from cases.product import Product, equal
from cases.semi_structured import CASES, Case, Emulated, product
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import tritonsparse as ts
from tritonsparse.kernels import semi_structured
from tritonsparse.kernels.select.transposable import transposable_mask
from tritonsparse.kernels.semi_structured import semi_structured_linear, semi_structured_reason
from tritonsparse.layers import backend

FP16, FP32, INF = torch.float16, torch.float32, math.inf
LINEAR, CONV = (replace(case, cutoff=1.3, density=0.25) for case in (sparse_input.LINEAR, sparse_input.CONV))
PRODUCTS: dict[str, Callable[[], Product]] = {
    "packed": lambda: sparse_input.product(LINEAR, FP32),
    "packed, room for all": lambda: sparse_input.product(replace(LINEAR, slack=INF), FP32),
    "packed conv2d": lambda: sparse_input.product(CONV, FP32),
    "packed conv2d, room for all, fresh": lambda: sparse_input.product(replace(CONV, slack=INF, cutoff=None), FP32),
    "2:4": lambda: two_of_four.product(two_of_four.CASES[0], FP16),
    "2:4 both, Conv1D": lambda: two_of_four.product(two_of_four.CASES[3], FP16),
}


@pytest.fixture(params=PRODUCTS)
def p(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Product:
    two_of_four.Emulated(monkeypatch)
    return PRODUCTS[request.param]()


def y_of(p: Product, *operands: Tensor) -> Tensor:
    found = p.function(*operands, *p.rest, backend=p.backend, **p.options)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("way", ["autocast", "checkpoint", "reentrant checkpoint"])
def test_autocast_and_checkpoints_change_no_number(p: Product, way: str) -> None:
    def step(x: Tensor, w_hat: Tensor, bias: Tensor, *rest: Any, **options: Any) -> Tensor:
        if way == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return y_of(p, x, w_hat, bias)
        return checkpoint(lambda *leaves: y_of(p, *leaves), x, w_hat, bias, use_reentrant=way != "checkpoint")

    expected = p.run()
    assert equal(replace(p, also={}).run(function=step), {name: expected[name] for name in ("y", *p.leaves)})


def test_frozen_operands_get_no_gradient_and_the_others_keep_theirs(p: Product) -> None:
    expected = p.run()
    for frozen in p.leaves:
        leaves = {name: leaf.detach().requires_grad_(name != frozen) for name, leaf in p.leaves.items()}
        y_of(p, *leaves.values()).backward(p.grad_y)
        assert leaves[frozen].grad is None
        assert all(torch.equal(leaf.grad, expected[name]) for name, leaf in leaves.items() if name != frozen)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("saved"), lambda each: each):
        assert torch.equal(y_of(p, *p.leaves.values()), expected["y"])


def test_eager_code_goes_around_torch_library(p: Product) -> None:
    with torch.autograd.profiler.profile() as profile:
        p.run()
    assert not [event.name for event in profile.function_events if event.name.startswith("tritonsparse")]


def test_a_second_derivative_is_right_or_an_error(p: Product) -> None:
    x, w_hat, bias = p.leaves.values()
    (grad_x,) = torch.autograd.grad(y_of(p, x, w_hat, bias), x, p.grad_y, create_graph=True)
    if p.function is semi_structured.semi_structured_linear and not p.options["sparse_grad_input"]:
        (second,) = torch.autograd.grad(grad_x.sum(), w_hat)
        torch.testing.assert_close(second, p.grad_y.flatten(0, -2).sum(0)[:, None].expand_as(w_hat))
    else:
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            grad_x.sum().backward()


def test_the_ops_pass_opcheck(p: Product) -> None:
    forward = getattr(torch.ops.tritonsparse, p.function.__name__).default
    how = [list(value) if isinstance(value, tuple) else value for value in p.options.values()]
    args, some = [*p.leaves.values()], ("test_schema", "test_faketensor")
    if not p.rest:
        # The emulation reads what a fake has not.
        torch.library.opcheck(forward, (*args, *how), test_utils=(*some, "test_autograd_registration"))
        backward = torch.ops.tritonsparse.semi_structured_grad_input.default
        if p.options["sparse_grad_input"]:
            torch.library.opcheck(backward, (p.grad_y, p.w_hat.detach(), how[0]), test_utils=some)
        return
    (packing,) = p.rest
    given = (packing.cutoff, packing.row_mask, packing.density, packing.scope, packing.slack)
    torch.library.opcheck(forward, (*args, *given, *how, "torch"))
    _, *packed, _, _ = (tensor.detach() for tensor in forward(*args, *given, *how, "torch"))
    shape = [list(p.x.shape)] if p.x.dim() == 4 else []
    saved = (p.grad_y, p.w_hat.detach(), *packed, *shape, *how, "torch")
    backward = getattr(torch.ops.tritonsparse, f"{p.function.__name__}_backward").default
    torch.library.opcheck(backward, (*saved, True, True))
    for needs in ((True, False), (False, True)):
        torch.library.opcheck(backward, (*saved, *needs), test_utils=some)


def test_compiled_it_is_one_graph_with_the_same_numbers_also_when_it_overflows(p: Product) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(p.function, fullgraph=True, backend=counter)
    overflows = []
    tight = bool(p.rest) and p.rest[0].slack < INF
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=tight):
        for value in (1.3, 0.1, 2.0):
            p.w_hat.data.mul_(0.9)
            if p.rest and p.rest[0].cutoff is not None:
                p.rest[0].cutoff.fill_(value)
                # A layer makes another object for each batch.
                p = replace(p, rest=(replace(p.rest[0]),))
            ours = p.run(function=compiled)
            assert equal(ours, p.run())
            overflows.append(bool(ours.get("overflow")))
    assert counter.frame_count == 1 and overflows == [False, tight, False]


N, K = 64, 96


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_and_sparse_op_give_the_dense_product(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    p = product(case, torch.float64)
    assert set(p.errors(p.run("torch")).values()) == {0.0}
    p, emulated = product(case, FP16), Emulated(monkeypatch)
    # The same products in half precision, summed by other kernels.
    wrong = p.errors(p.run())
    assert max(wrong.values()) < 1e-3, wrong
    # The forward, and dX where it is sparse; each compresses its own. Of no rows nothing is multiplied.
    products = (2 if case.both else 1) if p.x.numel() else 0
    assert emulated.compressed == emulated.multiplied == products


@pytest.mark.parametrize(("pattern", "products"), [("2:4", 1), ("2:4:transposable", 2)])
def test_layers_multiply_what_patterns_allow(pattern: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = Emulated(monkeypatch)
    monkeypatch.setattr(backend, "hardware_reason", lambda device: None)
    # As it would run on a GPU, but for Triton's kernel in front.
    monkeypatch.setattr(backend.Backend, "elementwise", "torch")
    layer = torch.nn.Linear(K, N).half()
    dense, x, grads = copy.deepcopy(layer), torch.randn(5, K).half(), []
    for each, name in ((layer, "semi_structured"), (dense, "torch")):
        ts.sparsify(each, "static", sparsity=0.5, pattern=pattern, total_steps=4, backend=name)
        leaf = x.clone().requires_grad_()
        each(leaf).float().square().sum().backward()
        grads.append((leaf.grad, each.weight.grad, each.bias.grad))
    assert all(error(ours, theirs) < 5e-3 for ours, theirs in zip(*grads, strict=True))
    assert emulated.multiplied == products


def test_all_that_stands_in_the_way_is_named() -> None:
    two = torch.tensor([True, True, False, False]).repeat(64, 24)
    three, square, both = two.clone(), two.repeat(2, 1)[:96], transposable_mask(torch.rand(64, 96), 2, 4)
    three[5, 2] = True
    x, weight, reason = torch.zeros(8, 96).half(), torch.zeros(64, 96), semi_structured_reason
    on_cpu = "2:4 products need a GPU, and the operands are on cpu"
    along = "the mask keeps more than 2 of some 4 neighbours along a {} of W [N, K]; " + on_cpu
    assert reason(x.float(), weight) == f"2:4 products are in float16 or bfloat16, and x is in torch.float32; {on_cpu}"
    shape = reason(x[:, :90], torch.zeros(64, 90))
    assert shape is not None and "this one is 64 x 90" in shape and shape.endswith(on_cpu)
    # Fewer than two is no obstacle; three are.
    assert reason(x, weight, two) == reason(x, weight, weight.bool()) == on_cpu
    assert reason(x, weight, three) == along.format("row")
    # Along the inputs of a weight stored [K, N], and along those only.
    assert reason(x, weight.t(), two.t(), transposed=True) == on_cpu
    assert reason(x, torch.zeros(96, 96), square, transposed=True) == along.format("row")
    # Along the outputs too, where dX is asked for.
    assert reason(x, weight, both, sparse_grad_input=True) == on_cpu
    assert reason(x, weight.t(), both.t(), transposed=True, sparse_grad_input=True) == on_cpu
    assert reason(x, weight, two, sparse_grad_input=True) == along.format("column")


X, W_HAT = torch.zeros(2, K), torch.zeros(N, K)


@pytest.mark.parametrize(("kind", "words", "change"), [
    (ValueError, 'backend "torch" or "semi_structured", got \'cuda\'; pass either', {"backend": "cuda"}),
    (ValueError, r"x of shape \[..., 96\].*check the layer's input", {"x": X[:, :64].half()}),
    (ValueError, "x in torch.float16 .*cast x or run under torch.autocast", {"x": X}),
    (ValueError, r"bias to be torch.float16 \[64\].*cast the bias with x", {"bias": torch.zeros(N)}),
    (ValueError, r"w_hat to be a floating-point matrix \[N, K\].*effective weight", {"w_hat": W_HAT[0]}),
    (ValueError, 'x is in torch.float32; pass backend="torch"', {"x": X, "w_hat": W_HAT}),
    (ValueError, 'is 64 x 90; pass backend="torch"', {"x": X[:, :90].half(), "w_hat": W_HAT[:, :90].half()}),
    (RuntimeError, 'need a GPU, and the operands are on cpu; pass backend="torch"', {}),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_remedy(kind: type[Exception], words: str, change: dict[str, Any]) -> None:
    given = {"x": X.half(), "w_hat": W_HAT.half(), "backend": "semi_structured"}
    with pytest.raises(kind, match=f"^semi_structured_linear: expected .*{words}"):
        semi_structured_linear(**given | change)
