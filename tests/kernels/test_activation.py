"""Cut-offs, packed activations and the product that reads them: the references, by case, by hand and by rule."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parent))

from cases.activation import PACKS, PRODUCTS, Packs, Product, assert_packs, product_errors

from tritonsparse.kernels.activation.compress import pack_activation, unpack_activation
from tritonsparse.kernels.activation.cutoff import activation_cutoff

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("case", PACKS, ids=str)
def test_what_is_packed_and_unpacked_is_what_the_definition_keeps(case: Packs) -> None:
    assert_packs(case, "torch", torch.bfloat16)


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_the_product_is_that_of_the_dense_matrix(case: Product) -> None:
    assert product_errors(case, "torch", full=torch.float64, half=torch.float32)[0] <= (1e-6 if case.half else 1e-14)


def test_a_matrix_by_hand() -> None:
    """|x| >= 2 keeps 2 and -3 of row 0 (bits 1 and 3: 2 + 8), nothing of row 1, NaN and 2 of row 2 (1 + 4)."""
    x = torch.tensor([[1.0, 2.0, 0.0, -3.0], [1.0, 1.5, -1.0, 0.0], [NAN, -1.0, 2.0, 0.5]])
    bits, values, row_offsets, overflow = pack_activation(x, torch.tensor([2.0]), None, 6)
    assert bits.tolist() == [[10], [0], [5]] and bits.dtype == torch.int32
    torch.testing.assert_close(values, torch.tensor([2.0, -3.0, NAN, 2.0, 0.0, 0.0]), rtol=0, atol=0, equal_nan=True)
    assert row_offsets.tolist() == [0, 2, 2, 4] and overflow.shape == () and not overflow
    # A cut-off for each row, and a row that does not count.
    cutoff, row_mask = torch.tensor([2.0, 1.0, INF, 0.0]), torch.tensor([True, True, True, False])
    bits, values, row_offsets, _ = pack_activation(torch.tensor([[1.0, 2.0]] * 4), cutoff, row_mask, 3)
    assert bits.tolist() == [[2], [3], [0], [0]] and values.tolist() == [2.0, 1.0, 2.0]
    assert row_offsets.tolist() == [0, 1, 3, 3, 3]


def test_an_exact_zero_is_never_stored_and_an_infinity_passes_every_cutoff() -> None:
    x = torch.tensor([[0.0, -0.0, INF, -INF, 1e-45]])
    for cutoff, bits in ((0.0, 0b11100), (INF, 0b01100), (NAN, 0b11100)):
        assert pack_activation(x, torch.tensor([cutoff]), None, 5)[0].tolist() == [[bits]]
    # The thirty-second position is the sign bit.
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


def exact_count(density: str, n: int) -> int:
    return max(1, math.floor(Fraction(density) * n + Fraction(1, 2)))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rows=st.integers(1, 40),
    k=st.integers(1, 9),
    density=st.sampled_from(["1", "0.5", "0.29", "0.35", "0.1", "0.05", "0.001", "1e-9", "0.333333333"]),
    counted=st.integers(0, 40),
    seed=st.integers(0, 2**16),
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
    for scope, rows in (("batch", 1), ("sample", 6), ("plane", 6)):
        assert activation_cutoff(x, 0.5, scope, none).eq(INF).all()
        assert activation_cutoff(x[:, :0], 0.5, scope).tolist() == [INF] * (rows == 1)
        assert activation_cutoff(x[:, :, :0], 0.5, scope).tolist() == [INF] * rows


def test_a_nan_counts_as_the_largest_and_a_half_precision_cutoff_is_exact_in_float32() -> None:
    x = torch.tensor([[NAN, 1.0, 2.0, 3.0]])
    assert activation_cutoff(x, 0.5).tolist() == [3.0] and activation_cutoff(x, 0.25).isnan().all()
    x = torch.randn(64, 8).to(torch.bfloat16)
    cutoff = activation_cutoff(x, 0.2)
    assert cutoff.dtype == torch.float32 and cutoff.item() in x.abs().float()
