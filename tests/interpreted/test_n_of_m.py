"""N:M masks through the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from cases.n_of_m import CASES, Case, assert_masks

from tritonsparse.kernels.select.n_of_m import n_of_m_mask

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_score_is_kept_where_fewer_than_n_of_its_group_come_before_it(case: Case) -> None:
    assert_masks(case, "triton")


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("place", [0, 2049, 4095])
def test_one_nan_anywhere_is_refused(place: int, sign: float) -> None:
    scores = torch.randn(8, 512)
    scores.view(-1)[place] = torch.copysign(torch.tensor(float("nan")), torch.tensor(sign))
    with pytest.raises(ValueError, match="without NaN"):
        n_of_m_mask(scores, 2, 4, backend="triton")
