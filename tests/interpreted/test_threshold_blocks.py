"""A threshold per block through the threshold kernels, against the references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.forward import threshold_cast

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    block=st.sampled_from([(1, 16), (3, 32), (16, 16), (64, 64), (5, 48)]),
    kind=st.sampled_from(["soft", "hard", "step"]),
    alpha=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_blocks_equal_the_reference(
    assert_close: Callable[[str, torch.Tensor, torch.Tensor, float], None],
    rows: int,
    columns: int,
    block: tuple[int, int],
    kind: str,
    alpha: float | None,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(rows * block[0], columns * block[1], generator=random)
    g = torch.randn(w.shape, generator=random)
    t = torch.randn(rows, columns, generator=random)
    expected = threshold_cast(w, t, kind=kind)
    actual = threshold_cast(w, t, kind=kind, backend="triton")
    assert_close("w_hat", actual[0], expected[0], 1e-6)
    assert torch.equal(actual[1], expected[1]) and torch.equal(actual[2], expected[2])

    multiplier = None if alpha is None or kind == "step" else torch.tensor(alpha)
    expected_grads = threshold_backward(g, w, t, alpha=multiplier, kind=kind)
    grads = threshold_backward(g, w, t, alpha=multiplier, kind=kind, backend="triton")
    assert_close("grad_weight", grads[0], expected_grads[0], 1e-6)
    assert grads[1].shape == t.shape
    assert (grads[1] - expected_grads[1]).abs().max().item() <= 4e-6 * (block[0] * block[1]) ** 0.5


def test_narrower_blocks_than_the_kernel_sums_are_refused() -> None:
    w = torch.ones(4, 32)
    with pytest.raises(ValueError, match='blocks of a multiple of 16 columns for backend="triton"'):
        threshold_backward(w, w, torch.zeros(4, 4), kind="soft", backend="triton")
