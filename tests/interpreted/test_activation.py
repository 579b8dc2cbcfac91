"""The kernels that pack activations and multiply packed ones, against their references, interpreted."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tritonsparse.kernels.activation.compress import pack_activation, unpack_activation
from tritonsparse.kernels.activation.cutoff import activation_cutoff
from tritonsparse.kernels.activation.grad_weight import packed_grad_weight
from tritonsparse.kernels.activation.linear import packed_linear

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Close = Callable[[str, torch.Tensor, torch.Tensor, float], None]
INF, NAN = math.inf, math.nan

# Sums over at most 70 rows; float16 results are rounded once.
BOUND = {torch.float32: 1e-6, torch.float16: 5e-4}

heights = st.sampled_from([0, 1, 2, 7])
# Around one word, one tile of the product (64) and one of the packing (1,024).
widths = st.sampled_from([1, 31, 32, 33, 64, 70, 1024, 1030])
dtypes = st.sampled_from([torch.float32, torch.float16])
seeds = st.integers(0, 2**16)
few = settings(max_examples=6)


def activation(m: int, k: int, dtype: torch.dtype, strided: bool, seed: int) -> torch.Tensor:
    """Random, with exact zeros, NaN and infinities, in either layout."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=random)
    for value, share in ((0.0, 0.2), (NAN, 0.01), (INF, 0.01), (-INF, 0.01)):
        x = torch.where(torch.rand(m, k, generator=random) < share, value, x)
    return x.to(dtype).t().contiguous().t() if strided else x.to(dtype)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in bits but for the payload of NaNs."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if not actual.is_floating_point():
        return torch.equal(actual, expected)
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(9), expected.nan_to_num(9))


@few
@given(
    m=heights, k=widths, dtype=dtypes, strided=st.booleans(), per_row=st.booleans(), masked=st.booleans(), seed=seeds
)
@example(m=7, k=70, dtype=torch.float32, strided=False, per_row=True, masked=True, seed=0)
@example(m=0, k=33, dtype=torch.float16, strided=False, per_row=False, masked=False, seed=0)
def test_packing_and_unpacking_are_the_references_bit_for_bit(
    m: int, k: int, dtype: torch.dtype, strided: bool, per_row: bool, masked: bool, seed: int
) -> None:
    x = activation(m, k, dtype, strided, seed)
    random = torch.Generator().manual_seed(seed)
    cutoff = torch.rand(m if per_row else 1, generator=random)
    row_mask = torch.rand(2 * m, generator=random)[::2] < 0.7 if masked else None
    for capacity in (x.numel(), x.numel() // 3) if m < 7 else (x.numel() // 3,):
        expected = pack_activation(x, cutoff, row_mask, capacity)
        actual = pack_activation(x, cutoff, row_mask, capacity, backend="triton")
        for name, ours, theirs in zip(("bits", "values", "row_offsets", "overflow"), actual, expected, strict=True):
            assert same(ours, theirs), name
        unpacked = unpack_activation(*expected[:3], k, backend="triton")
        assert same(unpacked, unpack_activation(*expected[:3], k))


@pytest.mark.parametrize("cutoff", [0.0, INF, NAN], ids=["everything", "nothing finite", "NaN"])
def test_everything_and_nothing_can_be_kept(cutoff: float) -> None:
    for x in (activation(5, 40, torch.float32, False, 0), torch.ones(3, 33), torch.zeros(3, 33)):
        expected = pack_activation(x, torch.tensor([cutoff]), None, x.numel())
        actual = pack_activation(x, torch.tensor([cutoff]), None, x.numel(), backend="triton")
        assert all(same(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


@few
@given(
    m=st.sampled_from([0, 1, 7, 33, 40]),
    n=st.sampled_from([1, 5, 64, 130]),
    k=st.sampled_from([1, 31, 64, 70, 131]),
    dtype=dtypes,
    transposed=st.booleans(),
    strided=st.booleans(),
    seed=seeds,
)
@example(m=33, n=130, k=131, dtype=torch.float16, transposed=True, strided=True, seed=1)
@example(m=0, n=5, k=70, dtype=torch.float32, transposed=False, strided=False, seed=1)
def test_the_product_equals_that_of_the_unpacked_matrix_in_float64(
    assert_close: Close, m: int, n: int, k: int, dtype: torch.dtype, transposed: bool, strided: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=random).to(dtype)
    grad_y = (torch.randn(n, m, generator=random).t() if strided else torch.randn(m, n, generator=random)).to(dtype)
    row_mask = torch.rand(m, generator=random) < 0.8
    packed = pack_activation(x, torch.tensor([0.8]), row_mask, x.numel())[:3]
    expected = grad_y.double().t() @ unpack_activation(*packed, k).double()
    actual = packed_grad_weight(grad_y, *packed, k, transposed=transposed, backend="triton")
    assert actual.is_contiguous() and actual.dtype == dtype
    exact = expected.t() if transposed else expected
    # Rounding a result of float16 costs at most 2^-11 of it, and is part of the comparison's bound.
    assert_close("dW", actual.double(), exact, BOUND[dtype])


def test_a_value_that_was_not_stored_makes_its_column_nan() -> None:
    x = torch.ones(4, 40)
    packed = pack_activation(x, torch.zeros(1), None, 3 * 40 + 5)[:3]
    grad = packed_grad_weight(torch.ones(4, 2), *packed, 40, backend="triton")
    assert grad[:, :5].eq(4).all() and grad[:, 5:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_cutoff_selected_without_sorting_is_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 41, dtype=dtype)
    for density in (0.001, 0.2, 1.0):
        assert torch.equal(activation_cutoff(x, density, backend="triton"), activation_cutoff(x, density))
    tied = torch.ones(4, 8, dtype=dtype)
    assert activation_cutoff(tied, 0.5, backend="triton").tolist() == [1.0]
    for scope in ("sample", "plane"):
        assert torch.equal(activation_cutoff(x, 0.2, scope, backend="triton"), activation_cutoff(x, 0.2, scope))


def test_repeated_calls_agree_bit_for_bit() -> None:
    x, grad_y = torch.randn(9, 70), torch.randn(9, 5)
    results = [pack_activation(x, torch.tensor([0.5]), None, 2000, backend="triton") for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    products = [packed_grad_weight(grad_y, *results[0][:3], 70, backend="triton") for _ in range(2)]
    assert torch.equal(*products)


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("kind", ["dense", "soft", "mask"])
@pytest.mark.parametrize("cutoff", [None, 0.2], ids=["fresh", "remembered, overflowing"])
def test_the_op_agrees_with_its_reference_back_end(
    assert_close: Close, kind: str, transposed: bool, cutoff: float | None
) -> None:
    shape = (70, 9) if transposed else (9, 70)
    x, weight = torch.randn(2, 5, 70, requires_grad=True), torch.randn(shape, requires_grad=True)
    threshold = torch.tensor([-1.0], requires_grad=True) if kind == "soft" else None
    view = {
        "threshold": threshold,
        "mask": torch.rand(shape) < 0.5 if kind == "mask" else None,
        "alpha": None if kind == "dense" else torch.tensor(0.5),
        "row_mask": torch.rand(2, 5) < 0.8,
        "cutoff": None if cutoff is None else torch.tensor([cutoff]),
    }
    leaves = [leaf for leaf in (x, weight, threshold) if leaf is not None]
    grad_y, results = torch.randn(2, 5, 9), []
    for backend in ("torch", "triton"):
        y, used, overflow = packed_linear(
            x, weight, density=0.2, kind=kind, transposed=transposed, backend=backend, **view
        )
        assert bool(overflow) == (cutoff is not None)
        results.append([y.detach(), used, *torch.autograd.grad(y, leaves, grad_y)])
    for name, actual, expected in zip(("y", "cutoff", "dx", "dW", "ds"), results[1], results[0], strict=False):
        assert_close(name, actual, expected, 1e-5 if name == "ds" else 1e-6)
