"""Cut-offs, packed activations and the product that reads them: the references, by case, by hand and by rule."""

import math
from fractions import Fraction

import pytest
import torch
from cases.activation import CASES, Case, packed_errors
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels.activation.compress import pack_activation
from tritonsparse.kernels.activation.cutoff import activation_cutoff

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_packed_unpacked_and_multiplied_is_what_the_definition_keeps(case: Case) -> None:
    packed_errors(case, "torch", half=torch.bfloat16)
    assert packed_errors(case, "torch", half=torch.float64, full=torch.float64)[0] <= 1e-13


def test_a_matrix_by_hand() -> None:
    """|x| >= 2 keeps 2 and -3 of row 0 (bits 1 and 3: 2 + 8), nothing of row 1, NaN and 2 of row 2 (1 + 4)."""
    x = torch.tensor([[1.0, 2.0, 0.0, -3.0], [1.0, 1.5, -1.0, 0.0], [NAN, -1.0, 2.0, 0.5]])
    bits, values, row_offsets, overflow = pack_activation(x, torch.tensor([2.0]), None, 6)
    assert bits.tolist() == [[10], [0], [5]] and bits.dtype == torch.int32
    torch.testing.assert_close(values, torch.tensor([2.0, -3.0, NAN, 2.0, 0.0, 0.0]), rtol=0, atol=0, equal_nan=True)
    assert row_offsets.tolist() == [0, 2, 2, 4] and overflow.shape == () and not overflow


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
        assert kept == (max(1, math.floor(Fraction(density) * n + Fraction(1, 2))) if n else 0)
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
