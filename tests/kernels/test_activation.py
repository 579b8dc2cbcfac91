"""Cut-offs, packed activations and the product that reads them: the references, by hand and by rule."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels.activation.compress import pack_activation, unpack_activation
from tritonsparse.kernels.activation.cutoff import activation_cutoff
from tritonsparse.kernels.activation.grad_weight import packed_grad_weight

INF, NAN = math.inf, math.nan

searched = settings(deadline=None, derandomize=True, max_examples=40)

sizes = st.sampled_from([0, 1, 2, 7, 31, 32, 33, 64, 70])
seeds = st.integers(0, 2**16)


def test_a_matrix_by_hand() -> None:
    """|x| >= 2 keeps 2 and -3 of row 0 (bits 1 and 3: 2 + 8), nothing of row 1, NaN and 2 of row 2 (1 + 4)."""
    x = torch.tensor([[1.0, 2.0, 0.0, -3.0], [1.0, 1.5, -1.0, 0.0], [NAN, -1.0, 2.0, 0.5]])
    bits, values, row_offsets, overflow = pack_activation(x, torch.tensor([2.0]), None, 6)
    assert bits.tolist() == [[10], [0], [5]] and bits.dtype == torch.int32
    torch.testing.assert_close(values, torch.tensor([2.0, -3.0, NAN, 2.0, 0.0, 0.0]), rtol=0, atol=0, equal_nan=True)
    assert row_offsets.tolist() == [0, 2, 2, 4] and row_offsets.dtype == torch.int64
    assert overflow.shape == () and not overflow


def test_a_cutoff_for_each_row_and_rows_that_do_not_count() -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    cutoff = torch.tensor([2.0, 1.0, INF, 0.0])
    bits, values, row_offsets, _ = pack_activation(x, cutoff, torch.tensor([True, True, True, False]), 3)
    assert bits.tolist() == [[2], [3], [0], [0]]
    assert values.tolist() == [2.0, 1.0, 2.0]
    assert row_offsets.tolist() == [0, 1, 3, 3, 3]


def test_an_exact_zero_is_never_stored_and_an_infinity_passes_every_cutoff() -> None:
    x = torch.tensor([[0.0, -0.0, INF, -INF, 1e-45]])
    assert pack_activation(x, torch.zeros(1), None, 5)[0].tolist() == [[0b11100]]
    assert pack_activation(x, torch.tensor([INF]), None, 5)[0].tolist() == [[0b01100]]
    assert pack_activation(x, torch.tensor([NAN]), None, 5)[0].tolist() == [[0b11100]]


def test_the_thirty_second_position_is_the_sign_bit() -> None:
    x = torch.zeros(1, 33)
    x[0, 31] = x[0, 32] = 1.0
    assert pack_activation(x, torch.ones(1), None, 2)[0].tolist() == [[-(2**31), 1]]


def test_what_does_not_fit_is_flagged_and_unpacks_as_nan() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0], [4.0, 5.0]])
    bits, values, row_offsets, overflow = pack_activation(x, torch.zeros(1), None, 3)
    assert overflow and row_offsets[-1] == 5 and values.tolist() == [1.0, 2.0, 3.0]
    x_hat = unpack_activation(bits, values, row_offsets, 2)
    assert x_hat[:2].tolist() == [[1.0, 2.0], [3.0, 0.0]] and x_hat[2].isnan().all()
    nothing = pack_activation(x, torch.zeros(1), None, 0)
    assert nothing[3] and unpack_activation(*nothing[:3], 2)[0].isnan().all()


@searched
@given(m=sizes, k=sizes, per_row=st.booleans(), masked=st.booleans(), strided=st.booleans(), seed=seeds)
def test_unpacking_gives_what_the_definition_keeps(
    m: int, k: int, per_row: bool, masked: bool, strided: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(k, m, generator=random, dtype=torch.float64).t() if strided else torch.randn(m, k, generator=random)
    x = torch.where(torch.rand(m, k, generator=random) < 0.2, 0.0, x)
    cutoff = torch.rand(m if per_row else 1, generator=random)
    row_mask = torch.rand(m, generator=random) < 0.7 if masked else None
    kept = x.abs() >= cutoff[:, None]
    expected = torch.where(kept if row_mask is None else kept & row_mask[:, None], x, 0.0)
    bits, values, row_offsets, overflow = pack_activation(x, cutoff, row_mask, x.numel())
    assert torch.equal(unpack_activation(bits, values, row_offsets, k), expected)
    assert row_offsets.diff().tolist() == (expected != 0).sum(1).tolist()
    assert torch.equal(values[: int(row_offsets[-1])], expected[expected != 0])
    assert not overflow and not values[int(row_offsets[-1]) :].any()


@searched
@given(m=sizes, n=st.sampled_from([0, 1, 5, 33]), k=sizes, transposed=st.booleans(), seed=seeds)
def test_the_product_is_that_of_the_dense_matrix(m: int, n: int, k: int, transposed: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x, grad_y = (torch.randn(m, size, generator=random, dtype=torch.float64) for size in (k, n))
    x_hat = torch.where(x.abs() < 0.5, 0.0, x)
    packed = pack_activation(x, torch.tensor([0.5]), None, x.numel())[:3]
    result = packed_grad_weight(grad_y, *packed, k, transposed=transposed)
    expected = grad_y.t() @ x_hat
    torch.testing.assert_close(result, expected.t() if transposed else expected, rtol=1e-12, atol=1e-12)
    assert result.is_contiguous()


def exact_count(density: str, n: int) -> int:
    return max(1, math.floor(Fraction(density) * n + Fraction(1, 2)))


@searched
@given(
    rows=st.integers(1, 40),
    k=st.integers(1, 9),
    density=st.sampled_from(["1", "0.5", "0.29", "0.35", "0.1", "0.05", "0.001", "1e-9", "0.333333333"]),
    counted=st.integers(0, 40),
    seed=seeds,
)
def test_a_cutoff_keeps_the_exact_count_of_what_counts(
    rows: int, k: int, density: str, counted: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=random, dtype=torch.float64)  # no ties
    row_mask = torch.randperm(rows, generator=random) < counted
    for mask, n in ((None, x.numel()), (row_mask, int(row_mask.sum()) * k)):
        cutoff = activation_cutoff(x, float(density), row_mask=mask)
        kept = int(pack_activation(x, cutoff, mask, x.numel())[2][-1])
        assert kept == (exact_count(density, n) if n else 0)
        assert cutoff.shape == (1,) and cutoff.dtype == torch.float64


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "row mask"])
def test_scopes_are_the_batch_each_sample_and_each_row(masked: bool) -> None:
    """Density one half of [2, 2, 2]: 4 of 8, 2 of 4, 1 of 2; the last row of sample 1 does not count if masked."""
    x = torch.tensor([[[1.0, -2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, -8.0]]])
    row_mask = torch.tensor([[True, True], [True, False]]) if masked else None
    cutoffs = {scope: activation_cutoff(x, 0.5, scope, row_mask).tolist() for scope in ("batch", "sample", "plane")}
    if masked:
        assert cutoffs == {"batch": [4.0], "sample": [3.0, 3.0, 6.0, 6.0], "plane": [2.0, 4.0, 6.0, INF]}
    else:
        assert cutoffs == {"batch": [5.0], "sample": [3.0, 3.0, 7.0, 7.0], "plane": [2.0, 4.0, 6.0, 8.0]}


def test_a_group_without_anything_that_counts_keeps_nothing() -> None:
    x, none = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
    for scope in ("batch", "sample", "plane"):
        assert activation_cutoff(x, 0.5, scope, none).eq(INF).all()
        assert activation_cutoff(x[:, :0], 0.5, scope).eq(INF).all()
    assert activation_cutoff(x[:, :0], 0.5).shape == (1,)
    assert activation_cutoff(x[:, :0], 0.5, "plane").shape == (0,)


def test_a_nan_counts_as_the_largest() -> None:
    x = torch.tensor([[NAN, 1.0, 2.0, 3.0]])
    assert activation_cutoff(x, 0.5).tolist() == [3.0]
    assert activation_cutoff(x, 0.25).isnan().all()


def test_a_half_precision_cutoff_is_exact_in_float32() -> None:
    x = torch.randn(64, 8).to(torch.bfloat16)
    cutoff = activation_cutoff(x, 0.2)
    assert cutoff.dtype == torch.float32 and cutoff.item() in x.abs().float()


PACKED = {
    "bits": torch.zeros(3, 2, dtype=torch.int32),
    "values": torch.zeros(5),
    "row_offsets": torch.zeros(4, dtype=torch.int64),
    "k": 40,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": torch.zeros(3, 3, dtype=torch.int32)}, r"bits to be contiguous int32 \[M, 2\], got int32 \[3, 3\]"),
        ({"bits": torch.zeros(3, 2)}, r"got float32 \[3, 2\] on cpu; pass what pack_activation returned"),
        ({"values": torch.zeros(5, dtype=torch.int32)}, r"values to be contiguous floating-point \[capacity\]"),
        ({"values": torch.zeros(10)[::2]}, r"values to be contiguous"),
        ({"row_offsets": torch.zeros(3, dtype=torch.int64)}, r"row_offsets to be contiguous int64 \[4\]"),
        ({"backend": "cuda"}, r'backend "torch" or "triton", got \'cuda\''),
    ],
    ids=["width", "dtype", "integers", "strides", "rows", "backend"],
)
def test_parts_that_do_not_belong_together_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        unpack_activation(**{**PACKED, **change})
    with pytest.raises(ValueError, match=words):
        packed_grad_weight(torch.zeros(3, 2), **{**PACKED, **change})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3), torch.zeros(1), None, 1), r"matrix \[M, K\], got float32 \[3\].*flatten the leading"),
        ((torch.zeros(3, 2), torch.zeros(2), None, 1), r"cutoff to be float32 \[1\] or \[3\].*activation_cutoff"),
        ((torch.zeros(3, 2), torch.zeros(1), torch.ones(3), 1), r"row_mask to be bool \[3\] on cpu, got float32 \[3\]"),
        ((torch.zeros(3, 2), torch.zeros(1), None, -1), r"capacity of at least 0, got -1; pass x.numel\(\) for all"),
    ],
    ids=["rank", "cutoff", "row mask", "capacity"],
)
def test_what_cannot_be_packed_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack_activation(*arguments)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, NAN, True, "0.2"])
def test_a_density_outside_its_interval_is_refused(density: Any) -> None:
    with pytest.raises(ValueError, match=r"density in \(0, 1\].*write 0.2 to keep 20 %"):
        activation_cutoff(torch.zeros(2, 2), density)


def test_a_cutoff_of_what_it_cannot_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r'scope "batch", "sample" or "plane", got \'row\''):
        activation_cutoff(torch.zeros(2, 2), 0.5, "row")
    with pytest.raises(ValueError, match=r"row_mask to be bool \[2\] on cpu, got bool \[3\]"):
        activation_cutoff(torch.zeros(2, 2), 0.5, "batch", torch.ones(3, dtype=torch.bool))


def test_a_gradient_of_another_dtype_or_height_is_refused() -> None:
    for grad_y in (torch.zeros(4, 2), torch.zeros(3, 2, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"grad_y to be float32 \[3, N\].*flatten the leading dimensions"):
            packed_grad_weight(grad_y, **PACKED)
