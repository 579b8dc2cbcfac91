"""N:M masks against their reference, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels.select.n_of_m import n_of_m_mask

pytestmark = pytest.mark.usefixtures("poisoned_memory")

patterns = st.integers(2, 64).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@settings(max_examples=60)
@given(
    rows=st.sampled_from([0, 1, 5, 33]),
    groups=st.sampled_from([1, 3, 40]),
    pattern=st.one_of(st.sampled_from([(2, 4), (1, 4), (3, 4), (2, 3), (1, 2), (63, 64), (1, 64)]), patterns),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    ties=st.booleans(),
    magnitude=st.booleans(),
    seed=st.integers(0, 3),
)
def test_the_mask_is_that_of_the_reference(
    rows: int,
    groups: int,
    pattern: tuple[int, int],
    dtype: torch.dtype,
    layout: str,
    ties: bool,
    magnitude: bool,
    seed: int,
) -> None:
    n, m = pattern
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, groups * m, generator=random).to(dtype)
    if ties:
        # Few distinct values, among them both zeros and both infinities.
        values = torch.tensor([-0.0, 0.0, 1.0, -1.0, float("inf"), -float("inf"), 1e-40]).to(dtype)
        scores = values[torch.randint(0, 7, scores.shape, generator=random)]
    if layout == "transposed":
        scores = scores.t().contiguous().t()
    elif layout == "strided":
        wide = torch.full((rows, 2 * groups * m + 1), float("nan"), dtype=dtype)
        wide[:, 1::2] = scores
        scores = wide[:, 1::2]
    mask = n_of_m_mask(scores, n, m, magnitude=magnitude, backend="triton")
    assert torch.equal(mask, n_of_m_mask(scores, n, m, magnitude=magnitude)) and mask.is_contiguous()
    assert bool((mask.reshape(-1, m).sum(1) == n).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("place", [0, 2049, 4095])
def test_one_nan_anywhere_is_refused(place: int, sign: float) -> None:
    scores = torch.randn(8, 512)
    scores.view(-1)[place] = torch.copysign(torch.tensor(float("nan")), torch.tensor(sign))
    with pytest.raises(ValueError, match="without NaN"):
        n_of_m_mask(scores, 2, 4, backend="triton")
