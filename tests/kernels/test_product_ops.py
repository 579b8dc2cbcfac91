"""What torch asks of every op that multiplies by an effective weight, however a step is run."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import semi_structured as two_of_four
from cases import sparse_input
from cases.product import Product, equal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tritonsparse.kernels import semi_structured

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
        # dX = dY W_hat.
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
