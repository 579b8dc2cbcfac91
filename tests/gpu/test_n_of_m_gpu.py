"""N:M masks on a GPU: every dtype, any strides, ties, and offsets beyond 2^31."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from cases.n_of_m import CASES, LARGE, Case, assert_masks

from tritonsparse.kernels.select.n_of_m import n_of_m_mask
from tritonsparse.masks.units import choose_masks
from tritonsparse.pattern import NM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DEVICE = "cuda"


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_a_score_is_kept_where_fewer_than_n_of_its_group_come_before_it(case: Case, half: torch.dtype) -> None:
    assert_masks(case, "triton", half, DEVICE)


def test_methods_choose_by_the_kernel_what_they_choose_without() -> None:
    scores = torch.randn(256, 512, device=DEVICE).abs()
    on_gpu = choose_masks({"w": scores}, 0.5, NM(2, 4))["w"]
    assert torch.equal(on_gpu.cpu(), choose_masks({"w": scores.cpu()}, 0.5, NM(2, 4))["w"])
    # Rounded: many masks of a tile have equal sums.
    rounded, both = (4 * scores).round(), NM(2, 4, transposable=True)
    assert torch.equal(
        choose_masks({"w": rounded}, 0.5, both)["w"].cpu(), choose_masks({"w": rounded.cpu()}, 0.5, both)["w"]
    )
    scores[-1, -1] = float("nan")
    with pytest.raises(ValueError, match="choose_masks: expected scores without NaN"):
        choose_masks({"w": scores}, 0.5, NM(2, 4))


def test_offsets_beyond_two_to_the_31_reach_their_element() -> None:
    rows, columns = 70_000, 32_768
    assert rows * columns > 2**31
    scores = torch.zeros(rows, columns, device=DEVICE, dtype=torch.bfloat16)
    scores[-1, -1] = scores[-1, -2] = 1.0
    mask = n_of_m_mask(scores, 2, 4, backend="triton")
    # Elsewhere the first two of four zeros.
    assert mask[-1, -4:].tolist() == [False, False, True, True] and mask[-1, :4].tolist() == [True, True, False, False]
    assert int(mask[:, 0].sum()) == rows
