"""The exact top-k on a GPU: identical to the CPU's, in a graph, and beyond 2^31 elements."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from cases.topk import CASES, LARGE, Case, assert_cuts, hinted, tensors

from tritonsparse.kernels.select._keys import TILE, tile_table
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.topk import topk_cutoff

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DEVICE = "cuda"


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_the_masks_are_the_head_of_a_stable_sort(case: Case, half: torch.dtype) -> None:
    weights, n = tensors(case, half, DEVICE), sum(case.sizes)
    found = assert_cuts(weights, case.kept, case.magnitude, "triton", hinted(case.predicted, DEVICE))
    # A good prediction, and a bad one; and every call agrees, bit for bit.
    for kept in (case.kept, max(case.kept - 7, 0), n - case.kept):
        again = assert_cuts(weights, kept, case.magnitude, "triton", found)
        assert kept != case.kept or list(map(int, again)) == list(map(int, found))


@pytest.mark.parametrize("kept", [1, 300, 10_000])
def test_strided_and_unaligned_tensors_are_ranked_by_their_flat_index(kept: int) -> None:
    weights = [torch.randn(70, 90, device=DEVICE).mul(4).round().T, torch.randn(5000, device=DEVICE).round()[1:]]
    assert weights[1].data_ptr() % 16
    assert_cuts(weights, kept, True, "triton")


def test_a_graph_selects_anew_at_each_replay_and_reads_nothing_back() -> None:
    weights = [torch.randn(3000, 1000, device=DEVICE), torch.randn(999, device=DEVICE)]
    out = [torch.empty(weight.shape, dtype=torch.bool, device=DEVICE) for weight in weights]
    table = tile_table(weights, out)
    hint = topk_cutoff(weights, 300_000, magnitude=True, backend="triton")

    def select() -> None:
        cutoff = topk_cutoff(weights, 300_000, magnitude=True, hint=hint, table=table, check=False, backend="triton")
        cutoff_masks(weights, cutoff, magnitude=True, out=out, table=table, backend="triton")

    torch.cuda.set_sync_debug_mode("error")
    try:
        select()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select()
    # A bracket that holds; one that does not; ties without end.
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
