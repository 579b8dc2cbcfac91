"""Top-k and N:M masks on a GPU: every dtype, in a graph, and beyond 2^31 elements."""

import pytest
import torch
from cases import selection
from cases.block import no_synchronization
from graphs import captured

from tritonsparse.kernels.select._keys import TILE, tile_table
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.n_of_m import n_of_m_mask
from tritonsparse.kernels.select.topk import topk_cutoff
from tritonsparse.masks.units import choose_masks
from tritonsparse.pattern import NM

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda"
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


@HALVES
@pytest.mark.parametrize("case", [*selection.TOPK, *selection.LARGE_TOPK], ids=str)
def test_the_masks_of_a_top_k_are_the_head_of_a_stable_sort(case: selection.TopK, half: torch.dtype) -> None:
    selection.assert_topk(case, "triton", half, DEVICE)


@HALVES
@pytest.mark.parametrize("case", [*selection.N_OF_M, *selection.LARGE_N_OF_M], ids=str)
def test_a_score_is_kept_where_fewer_than_n_of_its_group_come_first(case: selection.NOfM, half: torch.dtype) -> None:
    selection.assert_n_of_m(case, "triton", half, DEVICE)


def test_nan_is_refused_or_counted() -> None:
    selection.assert_nan_is_refused_or_counted("triton", DEVICE)


def test_a_graph_selects_anew_at_each_replay_and_reads_nothing_back() -> None:
    weights = [torch.randn(3000, 1000, device=DEVICE), torch.randn(999, device=DEVICE)]
    out = [torch.empty(weight.shape, dtype=torch.bool, device=DEVICE) for weight in weights]
    table = tile_table(weights, out)
    hint = topk_cutoff(weights, 300_000, magnitude=True, backend="triton")

    def select() -> None:
        cutoff = topk_cutoff(weights, 300_000, magnitude=True, hint=hint, table=table, check=False, backend="triton")
        cutoff_masks(weights, cutoff, magnitude=True, out=out, table=table, backend="triton")

    with no_synchronization():
        select()
    graph, _ = captured(select)
    for change in (1.01, 3.0, 0.0):
        for weight in weights:
            weight.mul_(change)
        graph.replay()
        here = [weight.cpu() for weight in weights]
        expected = cutoff_masks(here, topk_cutoff(here, 300_000, magnitude=True), magnitude=True)
        assert all(torch.equal(mask.cpu(), other) for mask, other in zip(out, expected, strict=True))


@pytest.mark.parametrize("kind", ["distinct", "tied"])
def test_beyond_two_to_the_31_elements(kind: str) -> None:
    n = 2**31 + 3 * TILE + 5
    if torch.cuda.mem_get_info()[0] < 12 * n:
        pytest.skip(f"needs {12 * n / 2**30:.0f} GiB of GPU memory")
    random = torch.Generator("cuda").manual_seed(0)
    weight = torch.empty(n, device="cuda", dtype=torch.bfloat16).normal_(generator=random)
    if kind == "tied":
        weight.mul_(2).round_()
    kept = n // 10
    cutoff = topk_cutoff([weight], kept, magnitude=True, backend="triton")
    (mask,) = cutoff_masks([weight], cutoff, magnitude=True, backend="triton")
    last = torch.tensor(int(cutoff.key), dtype=torch.int32).view(torch.float32).to("cuda", torch.bfloat16)
    room = int(cutoff.ties_kept)
    above = 0
    # By its definition, a piece at a time: all above the cut-off, none below, the first that tie.
    for values, kept_here in zip(weight.split(2**28), mask.split(2**28), strict=True):
        magnitude = values.abs()
        tie = magnitude == last
        above += int((magnitude > last).sum())
        assert torch.equal(kept_here & ~tie, magnitude > last)
        places = tie.nonzero().flatten()
        assert torch.equal((kept_here & tie).nonzero().flatten(), places[: max(room, 0)])
        room -= places.numel()
    assert above == cutoff.above and above + int(cutoff.ties_kept) == kept and room <= 0


def test_methods_choose_by_the_kernel_what_they_choose_without() -> None:
    scores = torch.randn(256, 512, device=DEVICE).abs()
    on_gpu = choose_masks({"w": scores}, 0.5, NM(2, 4))["w"]
    assert torch.equal(on_gpu.cpu(), choose_masks({"w": scores.cpu()}, 0.5, NM(2, 4))["w"])
    # Rounded: many masks of a tile have equal sums.
    rounded, both = (4 * scores).round(), NM(2, 4, transposable=True)
    on_gpu = choose_masks({"w": rounded}, 0.5, both)["w"]
    assert torch.equal(on_gpu.cpu(), choose_masks({"w": rounded.cpu()}, 0.5, both)["w"])
    scores[-1, -1] = float("nan")
    with pytest.raises(ValueError, match="choose_masks: expected scores without NaN"):
        choose_masks({"w": scores}, 0.5, NM(2, 4))


def test_offsets_beyond_two_to_the_31_reach_their_n_of_m() -> None:
    rows, columns = 70_000, 32_768
    assert rows * columns > 2**31
    scores = torch.zeros(rows, columns, device=DEVICE, dtype=torch.bfloat16)
    scores[-1, -1] = scores[-1, -2] = 1.0
    mask = n_of_m_mask(scores, 2, 4, backend="triton")
    # Elsewhere the first two of four zeros.
    assert mask[-1, -4:].tolist() == [False, False, True, True] and mask[-1, :4].tolist() == [True, True, False, False]
    assert int(mask[:, 0].sum()) == rows
