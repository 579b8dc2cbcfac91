"""The threshold kernels against their references, through the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritonsparse.kernels import _triton
from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.forward import threshold_cast

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Close = Callable[[str, torch.Tensor, torch.Tensor, float], None]

# The kernel's exp and torch's may differ in the last bit of T, which float16 rounding amplifies now and then.
BOUND = {torch.float32: 1e-6, torch.float16: 1e-4}

# Sizes around one tile of 64 and its multiples, and single rows and columns.
sizes = st.sampled_from([1, 2, 7, 63, 64, 65, 100, 128, 131])
dtypes = st.sampled_from([torch.float32, torch.float16])
layouts = st.sampled_from(["contiguous", "transposed", "strided"])
seeds = st.integers(0, 2**16)


def laid_out(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values behind other strides."""
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "strided":
        wide = matrix.new_zeros(matrix.shape[0] + 1, 2 * matrix.shape[1])
        wide[1:, ::2] = matrix
        return wide[1:, ::2]
    return matrix


@given(n=sizes, k=sizes, per_row=st.booleans(), weight=dtypes, out=dtypes, layout=layouts, seed=seeds)
def test_soft_cast_equals_the_reference(
    assert_close: Close,
    n: int,
    k: int,
    per_row: bool,
    weight: torch.dtype,
    out: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    w = laid_out(torch.randn(n, k, generator=random).to(weight), layout)
    s = torch.randn(n if per_row else 1, generator=random)
    expected = threshold_cast(w, s, kind="soft", out_dtype=out)
    actual = threshold_cast(w, s, kind="soft", out_dtype=out, backend="triton")
    assert_close("w_hat", actual[0], expected[0], BOUND[out])
    assert torch.equal(actual[1], expected[1]) and actual[1].dtype == torch.int64
    assert torch.equal(actual[2], expected[2]) and actual[2].dtype == torch.int32
    assert actual[0].is_contiguous()


@given(n=sizes, k=sizes, weight=dtypes, out=dtypes, layout=layouts, mask_layout=layouts, seed=seeds)
def test_masked_cast_is_the_reference_bit_for_bit(
    n: int,
    k: int,
    weight: torch.dtype,
    out: torch.dtype,
    layout: str,
    mask_layout: str,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    w = laid_out(torch.randn(n, k, generator=random).to(weight), layout)
    mask = laid_out(torch.rand(n, k, generator=random) < 0.3, mask_layout)
    expected = threshold_cast(w, mask=mask, kind="mask", out_dtype=out)
    actual = threshold_cast(w, mask=mask, kind="mask", out_dtype=out, backend="triton")
    assert all(torch.equal(a, e) and a.dtype == e.dtype for a, e in zip(actual, expected, strict=True))


@given(
    n=sizes,
    k=sizes,
    kind=st.sampled_from(["soft", "soft per row", "hard", "step per row", "step", "mask"]),
    dtype=dtypes,
    grad_dtype=dtypes,
    layout=layouts,
    grad_layout=layouts,
    alpha=st.sampled_from([None, 0.0, 0.25, 1.0]),
    restricted=st.booleans(),
    seed=seeds,
)
def test_backward_equals_the_reference(
    assert_close: Close,
    n: int,
    k: int,
    kind: str,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    layout: str,
    grad_layout: str,
    alpha: float | None,
    restricted: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    w = laid_out(torch.randn(n, k, generator=random).to(dtype), layout)
    w[torch.rand(n, k, generator=random) < 0.1] = 0.0
    g = laid_out(torch.randn(n, k, generator=random).to(grad_dtype), grad_layout)
    operands = {
        "threshold": torch.randn(n if kind.endswith("per row") else 1, generator=random),
        "grad_mask": laid_out(torch.rand(n, k, generator=random) < 0.5, layout) if restricted else None,
        "alpha": None if alpha is None else torch.tensor(alpha),
    }
    if kind == "mask":
        operands |= {
            "threshold": None,
            "mask": laid_out(torch.rand(n, k, generator=random) < 0.3, grad_layout),
        }
    if kind.startswith("step"):
        operands |= {"grad_mask": None, "alpha": None}
    kind = kind.removesuffix(" per row")
    expected = threshold_backward(g, w, **operands, kind=kind)
    actual = threshold_backward(g, w, **operands, kind=kind, backend="triton")
    assert_close("grad_weight", actual[0], expected[0], BOUND[dtype])
    # The sum may cancel: its error is measured against the terms, of which each is about sigmoid' <= 1/4.
    scale = (n * k) ** 0.5
    assert actual[1].shape == expected[1].shape and actual[1].dtype == expected[1].dtype
    assert (actual[1] - expected[1]).abs().max().item() <= 1e-6 * scale if actual[1].numel() else True
    assert actual[0].is_contiguous()

    again = threshold_backward(g, w, **operands, kind=kind, backend="triton")
    assert torch.equal(actual[0], again[0]) and torch.equal(actual[1], again[1])


def test_the_threshold_itself_zeros_nan_and_infinity_are_treated_as_the_reference_does() -> None:
    inf, nan = float("inf"), float("nan")
    # T = sigmoid(0) = 0.5, without rounding.
    w = torch.tensor([[0.5, -0.5, 0.0, -0.0, nan, inf, -inf, 0.50000006, -0.50000006, 1e-40]])
    s = torch.zeros(1)
    expected = threshold_cast(w, s, kind="soft")
    actual = threshold_cast(w, s, kind="soft", backend="triton")
    assert torch.equal(actual[1], expected[1]) and expected[1] == 5
    assert torch.equal(actual[0].isnan(), expected[0].isnan())
    assert torch.equal(actual[0].nan_to_num().view(torch.int32), expected[0].nan_to_num().view(torch.int32))

    g = torch.arange(1.0, 11.0)[None]
    expected = threshold_backward(g, w, s, alpha=torch.tensor(0.5), kind="soft")
    actual = threshold_backward(g, w, s, alpha=torch.tensor(0.5), kind="soft", backend="triton")
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_threshold_of_minus_infinity_returns_the_weight_bit_for_bit(dtype: torch.dtype) -> None:
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    w = torch.randn(70, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[0, :4] = torch.tensor([0.0, -0.0, 6e-8, -6e-8]).to(dtype)  # 6e-8 is a denormal of float16
    w_hat, kept, _ = threshold_cast(w, torch.tensor([-float("inf")]), kind="soft", backend="triton")
    expected = w.clone()
    expected[0, 1] = 0.0
    assert torch.equal(w_hat.view(bits), expected.view(bits))
    assert kept == w.numel() - 2


@pytest.mark.parametrize("s", [-float("inf"), float("inf")])
def test_an_infinite_threshold_gets_a_gradient_of_zero(s: float) -> None:
    w = torch.tensor([[1.0, -2.0]])
    g = torch.tensor([[float("inf"), 1.0]])
    _, grad_threshold = threshold_backward(g, w, torch.tensor([s]), kind="soft", backend="triton")
    assert grad_threshold.tolist() == [0.0]


def test_what_is_pruned_or_outside_the_gradient_mask_leaks_neither_nan_nor_infinity() -> None:
    inf, nan = float("inf"), float("nan")
    mask = torch.tensor([[True, False, False]])
    w_hat, _, _ = threshold_cast(torch.tensor([[1.0, nan, inf]]), mask=mask, kind="mask", backend="triton")
    assert w_hat.tolist() == [[1.0, 0.0, 0.0]]

    # Kept; pruned inside B with alpha = 0.5; pruned outside B; W = 0. sigmoid'(0) = 1/4.
    w = torch.tensor([[1.0, -0.25, 0.25, 0.0]])
    g = torch.tensor([[2.0, 4.0, nan, inf]])
    grad_mask = torch.tensor([[False, True, False, True]])
    grad_weight, grad_threshold = threshold_backward(
        g, w, torch.zeros(1), grad_mask=grad_mask, alpha=torch.tensor([0.5]), kind="soft", backend="triton"
    )
    assert grad_weight.tolist() == [[2.0, 2.0, 0.0, 0.0]]
    assert grad_threshold.tolist() == [-0.25 * (2.0 - 2.0)]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("per_row", [False, True])
def test_an_empty_weight_launches_nothing(shape: tuple[int, int], per_row: bool) -> None:
    w = torch.zeros(shape)
    s = torch.zeros(shape[0] if per_row else 1)
    for actual, expected in (
        (
            threshold_cast(w, s, kind="soft", backend="triton"),
            threshold_cast(w, s, kind="soft"),
        ),
        (
            threshold_backward(w, w, s, kind="soft", backend="triton"),
            threshold_backward(w, w, s, kind="soft"),
        ),
    ):
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_memory_is_poisoned_and_kernels_are_interpreted() -> None:
    assert _triton.INTERPRETED
    assert torch.empty(3).isnan().all()
    assert torch.zeros(1).new_empty(3, dtype=torch.int32).max() < 0
