"""The references of the threshold kernels: they are the definition, so every number here is made by hand."""

from __future__ import annotations

import doctest
import importlib
import math
import sys
from typing import Any

import pytest
import torch

from tritonsparse import kernels
from tritonsparse.kernels import weight
from tritonsparse.kernels.weight import forward as threshold_module
from tritonsparse.kernels.weight.backward import threshold_backward, threshold_backward_reference
from tritonsparse.kernels.weight.forward import threshold_cast, threshold_cast_reference

INF, NAN = float("inf"), float("nan")
F64 = torch.float64


def f64(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=F64)


def test_soft_moves_kept_weights_towards_zero_by_the_threshold_and_prunes_ties() -> None:
    # s = 0: T = sigmoid(0) = 1/2.   |W| - T = [[1/4, -1/4], [1/2, 0]]
    w_hat, kept, occupancy = threshold_cast(f64([0.75, -0.25], [-1.0, 0.5]), torch.zeros(1), kind="soft")
    assert w_hat.tolist() == [[0.25, 0.0], [-0.5, 0.0]]
    assert kept.item() == 2 and kept.dtype == torch.int64 and kept.shape == ()
    assert occupancy.tolist() == [[2]] and occupancy.dtype == torch.int32


def test_soft_takes_one_threshold_per_row() -> None:
    # T = [1/2, sigmoid(log 3) = 3/4, 0]
    s = torch.tensor([0.0, math.log(3.0), -INF], dtype=F64)
    w_hat, kept, _ = threshold_cast(f64([0.625, -1.0], [0.625, -1.0], [0.625, -1.0]), s, kind="soft")
    torch.testing.assert_close(w_hat, f64([0.125, -0.5], [0.0, -0.25], [0.625, -1.0]), rtol=1e-15, atol=0)
    assert kept.item() == 5


def test_mask_keeps_what_it_marks_and_nothing_leaks_from_the_rest() -> None:
    weight = torch.tensor([[1.0, NAN, -3.0], [INF, 5.0, -INF]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    w_hat, kept, occupancy = threshold_cast(weight, mask=mask, kind="mask")
    assert w_hat.tolist() == [[1.0, 0.0, -3.0], [0.0, 5.0, 0.0]]
    assert kept.item() == 3 and occupancy.tolist() == [[3]]


def test_a_nan_weight_is_kept_and_stays_nan() -> None:
    w_hat, kept, _ = threshold_cast(torch.tensor([[NAN, 0.25]]), torch.zeros(1), kind="soft")
    assert w_hat[0, 0].isnan() and w_hat[0, 1] == 0
    assert kept.item() == 1


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (torch.float64, torch.int64),
        (torch.float32, torch.int32),
        (torch.float16, torch.int16),
        (torch.bfloat16, torch.int16),
    ],
)
def test_a_threshold_of_minus_infinity_returns_the_weight_bit_for_bit(dtype: torch.dtype, bits: torch.dtype) -> None:
    weight = torch.randn(9, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    # The smallest denormal, infinity, and both zeros: -0 is the one value that changes, to +0.
    weight[0, :6] = torch.tensor([1, -1, 0, 0, 0, 0]).to(dtype) * torch.finfo(dtype).smallest_normal / 4
    weight[0, 4:6] = torch.tensor([INF, -INF]).to(dtype)
    weight[0, 3] = -0.0
    expected = weight.clone()
    expected[0, 3] = 0.0
    w_hat, kept, _ = threshold_cast(weight, torch.tensor([-INF]), kind="soft")
    assert torch.equal(w_hat.view(bits), expected.view(bits))
    assert kept.item() == 9 * 11 - 2


def test_pruned_positions_are_positive_zero() -> None:
    w_hat, _, _ = threshold_cast(torch.tensor([[-0.25, -0.0, 0.25]]), torch.zeros(1), kind="soft")
    assert not w_hat.signbit().any()
    w_hat, _, _ = threshold_cast(torch.full((1, 3), -1.0), mask=torch.zeros(1, 3).bool(), kind="mask")
    assert not w_hat.signbit().any()


def test_occupancy_counts_the_kept_of_each_tile_of_64() -> None:
    # 65 x 130 in tiles: rows 64 + 1, columns 64 + 64 + 2. All kept but the corner.
    mask = torch.ones(65, 130, dtype=torch.bool)
    mask[64, 129] = False
    _, kept, occupancy = threshold_cast(torch.ones(65, 130), mask=mask, kind="mask")
    assert occupancy.tolist() == [[4096, 4096, 128], [64, 64, 1]]
    assert kept.item() == 65 * 130 - 1


def test_low_precision_weights_meet_the_threshold_in_float32() -> None:
    # T = sigmoid(-0.0004) = 0.4999, which bfloat16 would round to 0.5 = |W|, pruning both.
    s = torch.tensor([-0.0004])
    for dtype in (torch.bfloat16, torch.float16):
        w_hat, kept, _ = threshold_cast(torch.tensor([[0.5, -0.5]], dtype=dtype), s, kind="soft")
        assert kept.item() == 2
        torch.testing.assert_close(w_hat.float(), torch.tensor([[1e-4, -1e-4]]), rtol=5e-3, atol=0)
        assert w_hat.dtype == dtype


def test_the_view_is_written_in_out_dtype_and_counted_before_rounding() -> None:
    # 2^-30 is below half the smallest float16 denormal, 2^-24: it rounds to 0, and is kept all the same.
    w_hat, kept, _ = threshold_cast(
        torch.tensor([[2.0**-30, 1.0]]), torch.tensor([-INF]), kind="soft", out_dtype=torch.float16
    )
    assert w_hat.dtype == torch.float16 and w_hat.tolist() == [[0.0, 1.0]]
    assert kept.item() == 2


# One matrix for the hand-made backwards. T = 1/2, kept = [[1, 0, 0], [1, 0, 0]] (0.5 is a tie, hence pruned).
WEIGHT = f64([0.75, -0.25, 0.0], [-1.0, 0.5, 0.25])
GRAD = f64([8.0, 4.0, 2.0], [16.0, 64.0, 32.0])
HALF = torch.tensor(0.5)


def test_pruned_weights_get_alpha_times_the_gradient_and_count_for_the_threshold() -> None:
    # m        = [[1, 1/2, 0], [1, 1/2, 1/2]]       m = 0 where W = 0
    # dW = m g = [[8, 2, 0], [16, 32, 16]]
    # sign(W) dW sums to 8 - 2 = 6 in row 0 and -16 + 32 + 16 = 32 in row 1; sigmoid'(0) = 1/4
    grad_weight, grad_threshold = threshold_backward(GRAD, WEIGHT, torch.zeros(1), alpha=HALF, kind="soft")
    assert grad_weight.tolist() == [[8.0, 2.0, 0.0], [16.0, 32.0, 16.0]]
    assert grad_threshold.tolist() == [-38 / 4]

    _, grad_threshold = threshold_backward(GRAD, WEIGHT, torch.zeros(2), alpha=HALF, kind="soft")
    assert grad_threshold.tolist() == [-6 / 4, -32 / 4]


def test_the_gradient_mask_takes_alpha_from_pruned_weights_and_nothing_from_kept_ones() -> None:
    # Outside B: (0, 0), which is kept and so counts as inside, and (1, 2), which loses its 16.
    grad_mask = torch.tensor([[False, True, True], [True, True, False]])
    grad_weight, grad_threshold = threshold_backward(
        GRAD, WEIGHT, torch.zeros(2), grad_mask=grad_mask, alpha=HALF, kind="soft"
    )
    assert grad_weight.tolist() == [[8.0, 2.0, 0.0], [16.0, 32.0, 0.0]]
    assert grad_threshold.tolist() == [-6 / 4, -16 / 4]


def test_without_alpha_only_kept_weights_get_a_gradient() -> None:
    # sign(W) dW = 8 in row 0 and -16 in row 1
    for alpha in (None, torch.tensor(0.0), torch.tensor([0.0])):
        grad_weight, grad_threshold = threshold_backward(GRAD, WEIGHT, torch.zeros(2), alpha=alpha, kind="soft")
        assert grad_weight.tolist() == [[8.0, 0.0, 0.0], [16.0, 0.0, 0.0]]
        assert grad_threshold.tolist() == [-8 / 4, 16 / 4]


def test_with_alpha_one_every_weight_but_zero_gets_the_dense_gradient() -> None:
    # sign(W) dW = 8 - 4 in row 0 and -16 + 64 + 32 in row 1
    grad_weight, grad_threshold = threshold_backward(GRAD, WEIGHT, torch.zeros(2), alpha=torch.tensor(1.0), kind="soft")
    assert grad_weight.tolist() == [[8.0, 4.0, 0.0], [16.0, 64.0, 32.0]]
    assert grad_threshold.tolist() == [-4 / 4, -80 / 4]


def test_a_mask_passes_the_gradient_where_it_keeps_and_alpha_of_it_inside_the_gradient_mask() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    grad_mask = torch.tensor([[False, True, False], [True, False, False]])
    # W = 0 at (0, 2) is kept and gets its gradient: for a mask, zero is a value like any other.
    grad_weight, grad_threshold = threshold_backward(GRAD, WEIGHT, mask=mask, kind="mask")
    assert grad_weight.tolist() == [[8.0, 0.0, 2.0], [0.0, 0.0, 32.0]]
    assert grad_threshold.shape == (0,) and grad_threshold.dtype == torch.float32

    grad_weight, _ = threshold_backward(GRAD, WEIGHT, mask=mask, grad_mask=grad_mask, alpha=HALF, kind="mask")
    assert grad_weight.tolist() == [[8.0, 2.0, 2.0], [8.0, 0.0, 32.0]]


@pytest.mark.parametrize("rows", [1, 5])
def test_soft_without_alpha_is_the_derivative_of_the_soft_threshold(rows: int) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=random, dtype=F64, requires_grad=True)
    s = torch.randn(rows, generator=random, dtype=F64, requires_grad=True)
    grad = torch.randn(5, 7, generator=random, dtype=F64)
    w_hat = weight.sign() * (weight.abs() - s.sigmoid()[:, None]).relu()
    expected = torch.autograd.grad(w_hat, (weight, s), grad)

    with torch.no_grad():
        assert torch.equal(threshold_cast(weight, s, kind="soft")[0], w_hat)
        actual = threshold_backward(grad, weight, s, kind="soft")
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)


def test_no_nan_leaks_from_where_no_gradient_is_due() -> None:
    # Kept; pruned with alpha = 0; W = 0.
    grad = torch.tensor([[2.0, NAN, INF]])
    grad_weight, grad_threshold = threshold_backward(
        grad, torch.tensor([[1.0, 0.25, 0.0]]), torch.zeros(1), alpha=torch.zeros(1), kind="soft"
    )
    assert grad_weight.tolist() == [[2.0, 0.0, 0.0]]
    assert grad_threshold.tolist() == [-2 / 4]


def test_a_nan_gradient_reaches_the_weights_that_are_due_one() -> None:
    grad_weight, grad_threshold = threshold_backward(
        torch.tensor([[NAN, NAN]]), torch.tensor([[1.0, 0.25]]), torch.zeros(1), alpha=HALF, kind="soft"
    )
    assert grad_weight.isnan().all() and grad_threshold.isnan().all()


@pytest.mark.parametrize("s", [-INF, INF])
def test_an_infinite_threshold_gets_a_gradient_of_zero(s: float) -> None:
    grad, weight = torch.tensor([[INF, 1.0]]), torch.tensor([[1.0, -2.0]])
    _, grad_threshold = threshold_backward(grad, weight, torch.tensor([s]), kind="soft")
    assert grad_threshold.tolist() == [0.0]


def test_results_are_contiguous_and_in_the_masters_dtypes_whatever_the_strides() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    grad = weight.flip(0).double()
    s = torch.zeros(6)
    straight = (
        *threshold_cast(weight, s, kind="soft", out_dtype=torch.float32),
        *threshold_backward(grad, weight, s, alpha=HALF, kind="soft"),
    )
    turned_weight, turned_grad = weight.T.contiguous().T, grad.T.contiguous().T
    turned = (
        *threshold_cast(turned_weight, s, kind="soft", out_dtype=torch.float32),
        *threshold_backward(turned_grad, turned_weight, s, alpha=HALF, kind="soft"),
    )
    assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(straight, turned, strict=True))
    assert [t.dtype for t in turned] == [
        torch.float32,
        torch.int64,
        torch.int32,
        torch.bfloat16,
        torch.float32,
    ]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_weight_has_an_empty_view_and_zero_gradients(shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape)
    w_hat, kept, occupancy = threshold_cast(weight, torch.zeros(1), kind="soft")
    assert w_hat.shape == shape and kept.item() == 0 and occupancy.numel() == 0
    for s in (torch.zeros(1), torch.zeros(shape[0])):
        grad_weight, grad_threshold = threshold_backward(weight, weight, s, kind="soft")
        assert grad_weight.shape == shape
        assert torch.equal(grad_threshold, torch.zeros_like(s))


W, S, M = torch.ones(2, 3), torch.zeros(1), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "harder", "threshold": S},
            'threshold_cast: expected kind "soft", "hard" or "step" with a threshold, or kind "mask" with a mask, '
            "got kind 'harder' with threshold; pass only what the kind reads",
        ),
        ({"kind": "soft"}, "got kind 'soft' with neither; pass only what the kind reads"),
        ({"kind": "soft", "threshold": S, "mask": M}, "got kind 'soft' with threshold and mask; pass only"),
        ({"kind": "mask", "threshold": S}, "got kind 'mask' with threshold; pass only"),
        (
            {"kind": "soft", "threshold": S, "backend": "cuda"},
            'threshold_cast: expected backend "torch" or "triton", got \'cuda\'; pass either',
        ),
        (
            {"weight": torch.ones(2, 3, 1), "kind": "soft", "threshold": S},
            "threshold_cast: expected weight to be a floating-point matrix [N, K], "
            "got float32 [2, 3, 1] on cpu; flatten a convolution's weight",
        ),
        ({"weight": M, "kind": "soft", "threshold": S}, "got bool [2, 3] on cpu; flatten"),
        (
            {"kind": "soft", "threshold": torch.zeros(3)},
            "threshold_cast: expected threshold to be float32 [1], [2], or [R, C] that divide [2, 3], on cpu, "
            "got float32 [3] on cpu; keep one float32 value",
        ),
        ({"kind": "soft", "threshold": S.half()}, "got float16 [1] on cpu; keep one float32 value"),
        ({"kind": "soft", "threshold": S.double()}, "got float64 [1] on cpu; keep one float32 value"),
        ({"kind": "soft", "threshold": S.to("meta")}, "got float32 [1] on meta; keep one float32 value"),
        (
            {"kind": "mask", "mask": M.T},
            "threshold_cast: expected mask to be bool [2, 3] on cpu, got bool [3, 2] on cpu; "
            "make it of the weight's shape",
        ),
        ({"kind": "mask", "mask": M.int()}, "got int32 [2, 3] on cpu; make it of the weight's shape"),
        (
            {"kind": "mask", "mask": M, "out_dtype": torch.int8},
            "threshold_cast: expected a floating-point out_dtype, got torch.int8; pass the dtype",
        ),
        (
            {"weight": W.double(), "kind": "mask", "mask": M, "backend": "triton"},
            'threshold_cast: expected weight in float16, bfloat16 or float32 for backend="triton", '
            'got torch.float64; pass backend="torch"',
        ),
        (
            {"kind": "mask", "mask": M, "out_dtype": F64, "backend": "triton"},
            'expected out_dtype in float16, bfloat16 or float32 for backend="triton"',
        ),
    ],
)
def test_threshold_cast_says_what_it_expected_what_it_got_and_what_to_do(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        threshold_cast(**{"weight": W, **arguments})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"grad": W.T},
            "threshold_backward: expected grad to be floating-point [2, 3] on cpu, "
            "got float32 [3, 2] on cpu; pass the gradient of w_hat",
        ),
        (
            {"grad_mask": W},
            "threshold_backward: expected grad_mask to be bool [2, 3] on cpu, "
            "got float32 [2, 3] on cpu; make it of the weight's shape",
        ),
        (
            {"alpha": torch.ones(2)},
            "threshold_backward: expected alpha to be one float32 value on cpu, got float32 [2] on cpu; "
            "keep the schedule's value in a float32 tensor",
        ),
        ({"alpha": torch.tensor(1)}, "got int64 [] on cpu; keep the schedule's value"),
        ({"threshold": torch.zeros(3)}, "threshold_backward: expected threshold to be float32 [1], [2], or [R, C]"),
        ({"kind": "mask"}, "threshold_backward: expected kind"),
        (
            {"grad": W.double(), "backend": "triton"},
            'threshold_backward: expected grad in float16, bfloat16 or float32 for backend="triton"',
        ),
    ],
)
def test_threshold_backward_says_what_it_expected_what_it_got_and_what_to_do(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        threshold_backward(**{"grad": W, "weight": W, "threshold": S, "kind": "soft", **arguments})
    assert message in str(error.value)


def test_the_references_refuse_other_kinds_themselves() -> None:
    with pytest.raises(ValueError, match="view_reference: expected kind"):
        threshold_cast_reference(W, S, None, "harder", torch.float32)
    with pytest.raises(ValueError, match="threshold_backward_reference: expected kind"):
        threshold_backward_reference(W, W, S, None, None, None, "harder")


def test_triton_off_the_gpu_is_an_error_that_names_the_other_back_end() -> None:
    pytest.importorskip("triton")
    expected = (
        'expected tensors on a GPU for backend="triton", got device cpu; move them to a GPU or pass backend="torch"'
    )
    with pytest.raises(RuntimeError) as error:
        threshold_cast(W, S, kind="soft", backend="triton")
    assert str(error.value) == f"threshold_cast: {expected}"
    with pytest.raises(RuntimeError) as error:
        threshold_backward(W, W, S, kind="soft", backend="triton")
    assert str(error.value) == f"threshold_backward: {expected}"


def test_without_triton_the_module_imports_and_only_its_triton_back_end_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package, name in ((kernels, "_triton"), (weight, "forward")):
        # The fresh import rebinds both, and both must come back.
        monkeypatch.setattr(package, name, getattr(package, name))
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}")
    monkeypatch.setitem(sys.modules, "triton", None)  # makes `import triton` fail as if it were not there
    fresh = importlib.import_module("tritonsparse.kernels.weight.forward")
    assert fresh is not threshold_module

    assert fresh.threshold_cast(W, S, kind="soft")[0].tolist() == [[0.5] * 3] * 2
    with pytest.raises(RuntimeError) as error:
        fresh.threshold_cast(W, S, kind="soft", backend="triton")
    message = str(error.value)
    assert message.startswith('threshold_cast: expected triton to be importable for backend="triton", got "')
    assert message.endswith('; install triton or pass backend="torch"')


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_examples_in_the_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tritonsparse.kernels.weight.{name}"))
    assert result.attempted >= 3 and result.failed == 0
