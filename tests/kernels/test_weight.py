"""The references of the effective weight, its gradient and PowerPropagation's power: they define the kernels."""

from typing import Any

import pytest
import torch
from cases.matrices import same
from cases.weight import CASES, Case, alike, answer, check_empty, make_view, operands
from cases.weight_exact import EXACT, check_exact, check_untouched
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.backward_many import backward_many
from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.forward_many import cast_many
from tritonsparse.kernels.weight.op import effective_weight
from tritonsparse.kernels.weight.power import power, power_reference, root
from tritonsparse.kernels.weight.table import Viewed, ViewTable
from tritonsparse.kernels.weight.view import View

F64 = torch.float64


@pytest.mark.parametrize("name", EXACT)
def test_by_hand(name: str) -> None:
    check_exact(EXACT[name], threshold_cast, threshold_backward)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_float64_it_is_autograd_of_published_code(case: Case) -> None:
    given, exact = operands(case).double(), answer(operands(case))
    close: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-14}
    w_hat = threshold_cast(given.weight, given.view)
    torch.testing.assert_close(w_hat, exact.w_hat, **close)
    assert torch.equal(w_hat != 0, exact.w_hat != 0) and w_hat.is_contiguous()
    found = threshold_backward(given.grad, given.weight, given.view)
    torch.testing.assert_close(found[0], exact.grad_weight, **close)
    assert found[0].is_contiguous() and (found[1] is None) == (exact.grad_threshold is None)
    if found[1] is not None:
        torch.testing.assert_close(found[1], exact.grad_threshold, rtol=1e-12, atol=1e-13 * (1 + exact.terms))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16, torch.bfloat16])
def test_a_threshold_of_zero_returns_the_weight_bit_for_bit(dtype: torch.dtype) -> None:
    check_untouched(dtype, "torch")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_meet_the_threshold_in_float32(dtype: torch.dtype) -> None:
    # T = sigmoid(-0.0004) = 0.4999, which bfloat16 would round to 0.5 = |W|, pruning both.
    w_hat = threshold_cast(torch.tensor([[0.5, -0.5]], dtype=dtype), View("soft", torch.tensor([-0.0004])))
    torch.testing.assert_close(w_hat.float(), torch.tensor([[1e-4, -1e-4]]), rtol=5e-3, atol=0)
    assert w_hat.dtype == dtype


@pytest.mark.parametrize("kind", ["soft per row", "hard", "step per row", "mask"])
def test_results_are_in_the_master_s_dtypes_and_do_not_depend_on_strides(kind: str) -> None:
    weight = torch.randn(6, 4).bfloat16()
    view = make_view(kind, weight, torch.Generator(), alpha=0.5, restricted=True)
    grad = torch.randn(6, 4, dtype=F64)
    found, again = (
        (threshold_cast(w, view, out_dtype=torch.float32), *threshold_backward(g, w, view))
        for w, g in ((weight, grad), (weight.T.contiguous().T, grad.T.contiguous().T))
    )
    dtypes = [torch.float32, torch.bfloat16, None if kind == "mask" else torch.float32]
    assert [None if t is None else t.dtype for t in again] == dtypes
    assert all(map(alike, found, again)) and all(t is None or t.is_contiguous() for t in again)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_weight_has_an_empty_effective_weight_and_zero_gradients(shape: tuple[int, int]) -> None:
    check_empty(shape, "torch")


def test_a_table_fills_its_buffers_and_multiplies_gradients_in_place() -> None:
    given = [operands(case) for case in CASES if case.layout == case.other_layout == "contiguous"]
    layers = [Viewed(o.weight, o.view, torch.empty(o.weight.shape, dtype=o.product)) for o in given]
    table = ViewTable(layers, "torch")
    cast_many(table)
    dense = [o.grad.to(o.weight.dtype) for o in given]
    grads = [grad.clone() for grad in dense]
    for o, layer, ds, old, new in zip(given, layers, backward_many(table, grads), dense, grads, strict=True):
        assert same(layer.w_hat, threshold_cast(o.weight, o.view, out_dtype=o.product))
        expected = threshold_backward(old, o.weight, o.view)
        assert same(new, expected[0]) and alike(ds, expected[1])
    # A layer that got no gradient leaves zeros for its threshold.
    assert not any(ds is not None and ds.any() for ds in backward_many(table, [None] * len(layers)))


def test_the_multiplier_commutes_with_accumulation() -> None:
    weight, view = torch.randn(8, 8, dtype=F64), View("soft", torch.zeros(1), alpha=torch.tensor(0.5))
    parts = torch.randn(4, 8, 8, dtype=F64)
    each = [threshold_backward(part, weight, view) for part in parts]
    total = parts.sum(0)
    (of_threshold,) = backward_many(ViewTable([Viewed(weight, view)], "torch"), [total])
    torch.testing.assert_close(total, sum(part[0] for part in each))
    torch.testing.assert_close(of_threshold, sum(part[1] for part in each))


W, S, M = torch.ones(2, 3), torch.zeros(1), torch.ones(2, 3, dtype=torch.bool)
SOFT, PRUNED = View("soft", S), View("soft", torch.tensor([float("inf")]))
ON_CPU, KEEP = "got float32 [2, 3] on cpu; ", "keep the schedule's value in a float32"
VIEWS = {
    'kind "soft", "hard" or "step" with a threshold, or kind "mask" with a mask, got kind \'harder\' with threshold; '
    "pass only what the kind reads": View("harder", S),
    "got kind 'soft' with neither; pass only what the kind reads": View("soft"),
    "got kind 'soft' with threshold and mask; pass only": View("soft", S, M),
    "got kind 'mask' with threshold; pass only": View("mask", S),
    'neither grad_mask nor alpha with kind "step", got alpha; leave them out': View("step", S, alpha=S),
    'neither grad_mask nor alpha with kind "step", got grad_mask': View("step", S, grad_mask=M),
    "threshold to be float32 [1], [2], or [R, C] that divide [2, 3], on cpu, got float32 [3] on cpu; keep one float32 "
    "value": View("soft", torch.zeros(3)),
    "divide [2, 3], on cpu, got float32 [2, 2]": View("soft", torch.zeros(2, 2)),
    "divide [2, 3], on cpu, got float32 [0, 3]": View("soft", torch.zeros(0, 3)),
    "got float16 [1] on cpu; keep one float32 value": View("soft", S.half()),
    "got float64 [1] on cpu; keep one float32 value": View("soft", S.double()),
    "got float32 [1] on meta; keep one float32 value": View("soft", S.to("meta")),
    "mask to be bool [2, 3] on cpu, got bool [3, 2] on cpu; make it of the weight's": View("mask", mask=M.T),
    "got int32 [2, 3] on cpu; make it of the weight's shape": View("mask", mask=M.int()),
    f"grad_mask to be bool [2, 3] on cpu, {ON_CPU}": View("soft", S, grad_mask=W),
    f"alpha to be one float32 value on cpu, got float32 [2] on cpu; {KEEP}": View("soft", S, alpha=torch.ones(2)),
    f"got int64 [] on cpu; {KEEP}": View("soft", S, alpha=torch.tensor(1)),
}


@pytest.mark.parametrize("message", VIEWS)
def test_a_view_that_does_not_fit_is_refused_by_every_function(message: str) -> None:
    view = VIEWS[message]
    for function, call in {
        "threshold_cast": lambda: threshold_cast(W, view),
        "threshold_backward": lambda: threshold_backward(W, W, view),
        "effective_weight": lambda: effective_weight(W, view),
        "ViewTable": lambda: ViewTable([Viewed(W, view)], "torch"),
    }.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(f"{function}: expected ") and message in str(error.value)


def table(*layers: Viewed) -> ViewTable:
    return ViewTable(layers, "torch")


REFUSED: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (threshold_cast, (W, SOFT), {"backend": "cuda"},
     'expected backend "torch" or "triton", got \'cuda\'; pass either'),
    (threshold_cast, (W[:, :, None], SOFT), {}, "expected weight to be a floating-point matrix [N, K], got float32 "
     "[2, 3, 1] on cpu; flatten a convolution's weight"),
    (threshold_cast, (M, SOFT), {}, "got bool [2, 3] on cpu; flatten"),
    (threshold_cast, (W, SOFT), {"out_dtype": torch.int8},
     "expected a floating-point out_dtype, got torch.int8; leave it"),
    (threshold_cast, (W.double(), SOFT), {"backend": "triton"}, "expected weight in float16, bfloat16 or float32 for "
     'backend="triton", got torch.float64; pass backend="torch"'),
    (threshold_cast, (W, SOFT), {"out_dtype": F64, "backend": "triton"}, "expected out_dtype in float16"),
    (threshold_backward, (W.T, W, SOFT), {}, "expected grad to be floating-point [2, 3] on cpu, got float32 [3, 2] on "
     "cpu; pass the gradient of the effective weight"),
    (threshold_backward, (W.double(), W, SOFT), {"backend": "triton"}, "expected grad in float16, bfloat16"),
    (effective_weight, (W, SOFT), {"dtype": torch.int8},
     "expected a floating-point dtype, got torch.int8; leave it out"),
    (effective_weight, (W, SOFT), {"cached": W.half()},
     "expected cached to be torch.float32 [2, 3] on cpu, got float16 [2, 3] on cpu; leave it out, and the op builds"),
    (ViewTable, ([Viewed(W.T.contiguous().T, SOFT)], "torch"), {}, f"expected a contiguous weight, {ON_CPU}copy it"),
    (ViewTable, ([Viewed(W, SOFT, torch.ones(3, 2))], "torch"), {}, "expected w_hat of [2, 3] on cpu"),
    (ViewTable, ([Viewed(W.double(), View("soft", S, alpha=S.double()))], "torch"), {},
     "expected alpha to be one float32 value, got float64 [1] on cpu; keep"),
    (ViewTable, ([Viewed(W, SOFT), Viewed(W.to("meta"), View("soft", S.to("meta")))], "torch"), {},
     "expected all weights on cpu, got float32 [2, 3] on meta; make one table"),
    (cast_many, (ViewTable([Viewed(W, SOFT, W.clone()), Viewed(W, SOFT)], "torch"),), {},
     "expected a w_hat in every layer, got none in layer 1; allocate it"),
    (backward_many, (ViewTable([Viewed(W, PRUNED), Viewed(W.double(), SOFT)], "torch"), [W, W]), {},
     f"expected a contiguous grad of torch.float64 [2, 3] on cpu, {ON_CPU}pass"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "given", "options", "message"), REFUSED)
def test_refusals_change_nothing(function: Any, given: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        function(*given, **options)
    assert str(error.value).startswith(f"{function.__name__}: ") and message in str(error.value)
    assert torch.equal(W, torch.ones(2, 3))


@pytest.mark.parametrize("exponent", [1.25, 1.5, 1.9])
def test_by_hand_and_the_gradient_at_zero_is_zero_where_autograd_of_the_formula_has_none(exponent: float) -> None:
    theta = torch.tensor([3.0, -2.0, 0.0, 0.5], requires_grad=True)
    weight = power(theta, 2.0)
    assert weight.tolist() == [9.0, -4.0, 0.0, 0.25]
    weight.backward(torch.tensor([1.0, 10.0, 100.0, -1.0]))
    assert theta.grad is not None and theta.grad.tolist() == [6.0, 40.0, 0.0, -1.0]

    theta = torch.zeros(3, requires_grad=True)
    power(theta, exponent).backward(torch.ones(3))
    assert theta.grad is not None and theta.grad.tolist() == [0.0, 0.0, 0.0]
    naive = torch.zeros(3, requires_grad=True)
    power_reference(naive, exponent).backward(torch.ones(3))
    assert naive.grad is not None and naive.grad.isnan().all(), "the op of its own would not be needed"


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    exponent=st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.75]),
    seed=st.integers(0, 999),
)
def test_it_is_autograd_of_the_formula_away_from_zero(shape: list[int], exponent: float, seed: int) -> None:
    torch.manual_seed(seed)
    start = torch.randn(shape, dtype=torch.float64)
    start = start + 0.1 * start.sign()
    grad = torch.randn_like(start)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    left, right = power(ours, exponent), power_reference(theirs, exponent)
    left.backward(grad)
    right.backward(grad)
    assert torch.equal(left, right)
    assert ours.grad is not None and theirs.grad is not None
    error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-300)
    assert error < 1e-14, f"dtheta: {error}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_root_is_undone_by_the_power(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64, dtype=torch.float64).mul(0.05).to(dtype)
    weight[0, :5] = 0.0
    for exponent in (1.0, 1.5, 2.0, 4.0):
        back = power(root(weight, exponent), exponent)
        assert back.dtype == dtype
        error = (back - weight).double().norm() / weight.double().norm()
        assert error < 4 * exponent * torch.finfo(dtype).eps, f"a = {exponent}: {error}"
        assert torch.equal(back == 0, weight == 0)


def test_opcheck() -> None:
    theta = torch.randn(6, 4, dtype=torch.float64)
    for each in (theta, theta[:, ::2]):
        torch.library.opcheck(torch.ops.tritonsparse.power.default, (each.detach().requires_grad_(), 1.5))
        torch.library.opcheck(torch.ops.tritonsparse.power_backward.default, (torch.randn_like(each), each, 1.5))


def test_an_exponent_below_one_and_integers_are_refused() -> None:
    for exponent in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"an exponent of at least 1.*2 is the paper's"):
            power(torch.ones(2), exponent)
    with pytest.raises(ValueError, match=r"floating-point theta, got torch\.int64; convert it"):
        power(torch.ones(2, dtype=torch.int64), 2.0)
