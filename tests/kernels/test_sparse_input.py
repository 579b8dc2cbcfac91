"""The ops that keep a packed input: SWAT's gradients, and all that a layer and torch ask of an op."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parent))

from cases.sparse_input import CASES, F64, GROUPED, Case, answer, errors, operands, run

from tritonsparse.kernels.activation.conv2d import sparse_input_conv2d
from tritonsparse.kernels.activation.linear import sparse_input_linear
from tritonsparse.kernels.activation.packing import Packing
from tritonsparse.kernels.weight.op import effective_weight
from tritonsparse.kernels.weight.view import View

FP32 = torch.float32
LINEAR, CONV = Case((2, 3, 70), transposed=True, masked=True, scope="plane"), Case((2, 4, 7, 6), conv=GROUPED)
BOTH = pytest.mark.parametrize("case", [LINEAR, CONV], ids=["linear", "conv2d"])


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_all_gradients_equal_the_plain_formulation(case: Case) -> None:
    o = operands(case)
    wrong = errors(run(o), answer(o))
    assert max(wrong.values()) <= 1e-13, wrong


@pytest.mark.parametrize("kind", ["soft", "hard", "mask"])
def test_keeping_all_of_x_a_layer_s_step_is_the_dense_one_bit_for_bit(kind: str) -> None:
    o = operands(Case((2, 3, 70), density=1.0))
    threshold = None if kind == "mask" else torch.tensor([0.3], dtype=F64, requires_grad=kind == "soft")
    mask = torch.rand(5, 70) < 0.5 if kind == "mask" else None
    view = View(kind, threshold, mask, torch.rand(5, 70) < 0.7, torch.tensor(0.4))
    leaves = [*o.leaves.values(), *([threshold] if kind == "soft" else [])]
    packed = sparse_input_linear(o.x, effective_weight(o.w_hat, view), o.bias, o.packing)[0]
    dense = F.linear(o.x, effective_weight(o.w_hat, view), o.bias)
    ours, theirs = (torch.autograd.grad(y, leaves, o.grad_y) for y in (packed, dense))
    assert torch.equal(packed, dense) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_remembered_cutoff_is_used_as_it_is() -> None:
    """x = (1, -3, 0.5, 2): T = 2 keeps -3 and 2, so dW = dY (0, -3, 0, 2)."""
    x, weight = torch.tensor([[1.0, -3.0, 0.5, 2.0]]), torch.zeros(1, 4, requires_grad=True)
    cutoff = torch.tensor([2.0])
    y, used, overflow = sparse_input_linear(x, weight, None, Packing(0.5, cutoff=cutoff))
    y.backward(torch.tensor([[10.0]]))
    assert weight.grad.tolist() == [[0.0, -30.0, 0.0, 20.0]]
    assert used is cutoff and not overflow


@BOTH
def test_numbers_do_not_depend_on_the_room(case: Case) -> None:
    for cutoff in (0.0, 0.5, math.nan):
        o = operands(case)
        tight, roomy = (Packing(0.1, slack=slack, cutoff=torch.tensor([cutoff])) for slack in (1.25, math.inf))
        ours, theirs = run(o._replace(packing=tight)), run(o._replace(packing=roomy))
        assert ours.pop("overflow") and not theirs.pop("overflow")
        assert ours.pop("cutoff") is tight.cutoff and theirs.pop("cutoff") is roomy.cutoff
        assert equal(ours, theirs) and torch.count_nonzero(ours["w_hat"]) > 0.1 * o.w_hat.numel()


def test_zeros_take_no_room_and_ties_at_the_cutoff_are_all_kept() -> None:
    # After a ReLU nine tenths of x are 0, and so is its k-th magnitude at density 0.2.
    x, w_hat = (torch.randn(20, 70) - 1.2816).relu(), torch.zeros(5, 70, requires_grad=True)
    y, cutoff, overflow = sparse_input_linear(x, w_hat, None, Packing(0.2, slack=1.0))
    grad_y = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, w_hat, grad_y)[0], grad_y.t() @ x)
    assert cutoff.item() == 0 and not overflow
    w_hat = torch.zeros(3, 8, requires_grad=True)
    y, cutoff, overflow = sparse_input_linear(torch.ones(4, 8), w_hat, None, Packing(0.25))
    y.backward(torch.ones(4, 3))
    assert overflow and cutoff.item() == 1 and torch.equal(w_hat.grad, torch.full((3, 8), 4.0))


def saved_bytes(function: Any) -> int:
    """Bytes of distinct storages that autograd holds between the passes, parameters left out."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = function()  # so that no storage is freed and counted twice at one address
    del held
    return sum(sizes.values())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.35), (FP32, 0.30)], ids=str)
def test_a_fifth_of_the_elements_is_held_in_a_third_of_the_memory(dtype: torch.dtype, bound: float) -> None:
    """bf16: bits 1/16, values 1/5 with a quarter of slack, offsets 8 bytes a row; fp32: bits 1/32."""
    x = torch.randn(8, 64, 512, dtype=dtype)
    weight = torch.nn.Parameter(torch.randn(64, 512, dtype=dtype))
    assert saved_bytes(lambda: F.linear(x.clone(), weight)) == x.nbytes
    packed = saved_bytes(lambda: sparse_input_linear(x.clone(), weight, None, Packing(0.2))[0])
    assert packed < bound * x.nbytes
    # The effective weight is held on top, and the mask by its own gradient.
    view = View("mask", mask=torch.rand(weight.shape) < 0.5)
    masked = saved_bytes(lambda: sparse_input_linear(x.clone(), effective_weight(weight, view), None, Packing(0.2))[0])
    assert masked == packed + weight.nbytes + view.mask.nbytes
    image, kernel = x.view(8, 64, 16, 32), torch.nn.Parameter(torch.randn(64, 64, 1, 1, dtype=dtype))
    assert saved_bytes(lambda: sparse_input_conv2d(image.clone(), kernel, None, Packing(0.2))[0]) == packed


@BOTH
def test_frozen_operands_get_no_gradient_and_the_others_keep_theirs(case: Case) -> None:
    o = operands(case)
    expected = run(o)
    for frozen in ("x", "w_hat", "bias"):
        part = {name: leaf.detach().requires_grad_(name != frozen) for name, leaf in o.leaves.items()}
        y = case.function(*part.values(), o.packing, **case.options)[0]
        y.backward(o.grad_y)
        assert part[frozen].grad is None
        assert all(torch.equal(leaf.grad, expected[name]) for name, leaf in part.items() if name != frozen)
    with torch.no_grad():
        y, cutoff, _ = case.function(*o.leaves.values(), o.packing, **case.options)
        assert torch.equal(y, expected["y"]) and torch.equal(cutoff, expected["cutoff"])


@BOTH
def test_nan_in_x_reaches_the_gradient_of_its_own_input(case: Case) -> None:
    o = operands(case)._replace(packing=Packing(0.2))
    o.x.data[(1, 1, 3)[: o.x.dim()]] = math.nan
    grad = run(o)["w_hat"].isnan()
    where = grad[3] if case is LINEAR else grad[:5, 1]
    assert where.any() and grad.sum() == where.sum()


@pytest.mark.parametrize("reentrant", [False, True])
@BOTH
def test_checkpointing_runs_it_twice_and_changes_nothing(case: Case, reentrant: bool) -> None:
    o = operands(case)
    for cutoff in (None, torch.tensor([1.0])):
        packing, expected = Packing(0.2, cutoff=cutoff), run(o._replace(packing=Packing(0.2, cutoff=cutoff)))

        def forward(x: Tensor, packing: Packing = packing) -> Tensor:
            return case.function(x, o.w_hat, o.bias, packing, **case.options)[0]

        for leaf in o.leaves.values():
            leaf.grad = None
        checkpoint(forward, o.x, use_reentrant=reentrant).backward(o.grad_y)
        assert all(torch.equal(leaf.grad, expected[name]) for name, leaf in o.leaves.items())


@BOTH
def test_under_autocast_the_products_stay_in_the_dtype_of_x(case: Case) -> None:
    o = operands(case, FP32)
    plain = run(o)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(run(o), plain)


@BOTH
@pytest.mark.parametrize("slack", [1.25, math.inf], ids=["slack", "room for all"])
def test_both_ops_pass_opcheck(case: Case, slack: float) -> None:
    o = operands(case, FP32)
    p, how = o.packing, [list(value) if isinstance(value, tuple) else value for value in case.options.values()]
    ops = torch.ops.tritonsparse
    forward, backward = (
        (ops.sparse_input_conv2d, ops.sparse_input_conv2d_backward)
        if case.conv
        else (ops.sparse_input_linear, ops.sparse_input_linear_backward)
    )
    args = (o.x, o.w_hat, o.bias, p.cutoff, p.row_mask, p.density, p.scope, slack, *how, "torch")
    torch.library.opcheck(forward.default, args)
    _, *packed, _, _ = (tensor.detach() for tensor in forward(*args))
    shape = [list(case.shape)] if case.conv else []
    saved = (o.grad_y, o.w_hat.detach(), *packed, *shape, *how, "torch")
    torch.library.opcheck(backward.default, (*saved, True, True))
    for needs in ((True, False), (False, True)):
        torch.library.opcheck(backward.default, (*saved, *needs), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("roomy", [False, True], ids=["slack", "room for all"])
@BOTH
def test_compiled_it_is_one_graph_with_the_same_numbers_also_when_it_overflows(case: Case, roomy: bool) -> None:
    counter, cutoff = CompileCounterWithBackend("aot_eager"), torch.tensor([1.3])
    compiled = torch.compile(case.function, fullgraph=True, backend=counter)
    o = operands(case, FP32)._replace(packing=Packing(0.25, slack=math.inf if roomy else 1.25, cutoff=cutoff))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=not roomy):
        for value, overflows in ((1.3, False), (0.1, not roomy), (2.0, False)):
            cutoff.fill_(value)
            ours = run(o, function=compiled)
            assert equal(ours, run(o)) and bool(ours["overflow"]) == overflows
            # A layer builds another object for each batch.
            o = o._replace(packing=Packing(0.25, slack=o.packing.slack, cutoff=cutoff))
    assert counter.frame_count == 1


@BOTH
def test_eager_code_goes_around_torch_library_and_a_second_derivative_is_an_error(case: Case) -> None:
    o = operands(case)
    with torch.autograd.profiler.profile() as profile:
        run(o)
    assert not [event.name for event in profile.function_events if event.name.startswith("tritonsparse")]
    y = case.function(*o.leaves.values(), o.packing, **case.options)[0]
    (grad,) = torch.autograd.grad(y, o.w_hat, o.grad_y, create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        grad.sum().backward()


def refused(error: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        error()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            ({"density": d}, r"^Packing: expected a density in \(0, 1\], .*write 0.2")
            for d in (0.0, 1.1, math.nan, True)
        ),
        ({"density": "0.2"}, r"^Packing: expected a density in \(0, 1\], .*got '0.2'; write 0.2 to keep 20 %"),
        ({"slack": 0.5}, r"^Packing: expected slack of at least 1, got 0.5; pass 1.25"),
        ({"slack": math.nan}, r"^Packing: expected slack of at least 1, got nan"),
        ({"scope": "token"}, r'^Packing: expected scope "batch", "sample" or "plane", got \'token\'; pass one'),
    ],
    ids=str,
)
def test_a_packing_out_of_range_is_refused(change: dict[str, Any], words: str) -> None:
    refused(lambda: Packing(**{"density": 0.2} | change), words)


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        (LINEAR, {"backend": "cuda"}, r'backend "torch" or "triton", got \'cuda\'; pass either'),
        (LINEAR, {"backend": "triton"}, r'x in float16, .* got torch.float64; pass backend="torch"'),
        (LINEAR, {"x": torch.zeros(3, 71, dtype=F64)}, r"x of shape \[..., 70\].*check the layer's input"),
        (LINEAR, {"x": torch.zeros(3, 70)}, r"x in torch.float64 .*got torch.float32; cast x or run under .*autocast"),
        (LINEAR, {"w_hat": torch.zeros(3)}, r"w_hat to be a floating-point matrix \[N, K\], got float32 \[3\]"),
        (LINEAR, {"cutoff": torch.ones(2)}, r"cutoff to be float32 \[1\] or \[6\] on cpu, got float32 \[2\]"),
        (LINEAR, {"cutoff": torch.ones(1).half()}, r"cutoff to be float32 .* got float16 \[1\].*remember one"),
        (LINEAR, {"row_mask": torch.ones(4, dtype=torch.bool)}, r"row_mask to be bool \[2, 3\] on cpu, got bool \[4\]"),
        (LINEAR, {"row_mask": torch.ones(2, 3)}, r"got float32 \[2, 3\] on cpu; make it True for rows that count"),
        (CONV, {"backend": "cuda"}, r'backend "torch" or "triton", got \'cuda\''),
        (CONV, {"x": torch.zeros(2, 3, 7, 6, dtype=F64)}, r"x to be torch.float64 \[B, 4, H, W\].*check the layer's"),
        (CONV, {"x": torch.zeros(2, 4, 7, 6)}, r"x to be torch.float64 .* got float32 \[2, 4, 7, 6\]"),
        (CONV, {"w_hat": torch.zeros(10, 4, dtype=F64)}, r"\[B, C, H, W\] beside w_hat \[F, C/groups, kh, kw\]"),
        (CONV, {"cutoff": torch.ones(2)}, r"cutoff to be float32 \[1\] or \[8\] on cpu, got float32 \[2\]"),
        (CONV, {"row_mask": torch.ones(8, dtype=torch.bool)}, r"row_mask to be bool \[2, 4\] on cpu, got bool \[8\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_together_is_refused_with_the_remedy(case: Case, change: dict[str, Any], words: str) -> None:
    o = operands(case)
    packing = Packing(0.2, cutoff=change.pop("cutoff", None), row_mask=change.pop("row_mask", None))
    given = {"x": o.x, "w_hat": o.w_hat, "bias": o.bias, "packing": packing} | case.options | change
    refused(lambda: case.function(**given), f"^{case.function.__name__}: expected .*{words}")
