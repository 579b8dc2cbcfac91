"""The exact top-k on a GPU: identical to the CPU's, in a graph, and beyond 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tritonsparse.kernels.select._keys import TILE, tile_table
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.topk import Cutoff, topk_cutoff

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element, around a tile, layers of a model, nothing.
SIZES = [1, TILE - 1, TILE, TILE + 1, 1000 * 511, 0, 2048 * 2048]


def weights(kind: str, dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=random) for size in SIZES]
    if kind == "tied":
        tensors = [tensor.mul(2).round() for tensor in tensors]
    elif kind == "pruned":
        tensors = [tensor.where(torch.rand(tensor.shape, generator=random) < 0.05, 0.0) for tensor in tensors]
    return [tensor.to(dtype) for tensor in tensors]


def assert_same_as_on_the_cpu(tensors: list[Tensor], kept: int, magnitude: bool, hint: Cutoff | None = None) -> Cutoff:
    expected = topk_cutoff(tensors, kept, magnitude=magnitude)
    there = [tensor.cuda() for tensor in tensors]
    actual = topk_cutoff(there, kept, magnitude=magnitude, hint=hint, backend="triton")
    assert list(map(int, actual)) == list(map(int, expected))
    masks = cutoff_masks(there, actual, magnitude=magnitude, backend="triton")
    for mask, other in zip(masks, cutoff_masks(tensors, expected, magnitude=magnitude), strict=True):
        assert torch.equal(mask.cpu(), other)
    return actual


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["distinct", "tied", "pruned"])
def test_cutoff_and_masks_are_those_of_the_cpu(kind: str, dtype: torch.dtype, magnitude: bool) -> None:
    tensors = weights(kind, dtype)
    n = sum(SIZES)
    for kept in (0, n // 100, n // 10, n // 2, n):
        hint = assert_same_as_on_the_cpu(tensors, kept, magnitude)
        # A good prediction, and a bad one.
        for near in (max(kept - 7, 0), n - kept):
            assert_same_as_on_the_cpu(tensors, near, magnitude, hint)


@pytest.mark.parametrize("kept", [1, 300, 10_000])
def test_strided_and_unaligned_tensors_are_ranked_by_their_flat_index(kept: int) -> None:
    there = [torch.randn(70, 90, device="cuda").mul(4).round().T, torch.randn(5000, device="cuda").round()[1:]]
    cutoff = topk_cutoff(there, kept, magnitude=True, backend="triton")
    masks = cutoff_masks(there, cutoff, magnitude=True, backend="triton")
    here = [tensor.cpu() for tensor in there]
    expected = cutoff_masks(here, topk_cutoff(here, kept, magnitude=True), magnitude=True)
    assert all(torch.equal(mask.cpu(), other) for mask, other in zip(masks, expected, strict=True))


def test_a_graph_selects_anew_at_each_replay_and_reads_nothing_back() -> None:
    tensors = [torch.randn(3000, 1000, device="cuda"), torch.randn(999, device="cuda")]
    out = [torch.empty(tensor.shape, dtype=torch.bool, device="cuda") for tensor in tensors]
    table = tile_table(tensors, out)
    hint = topk_cutoff(tensors, 300_000, magnitude=True, backend="triton")

    def select() -> None:
        cutoff = topk_cutoff(tensors, 300_000, magnitude=True, hint=hint, table=table, check=False, backend="triton")
        cutoff_masks(tensors, cutoff, magnitude=True, out=out, table=table, backend="triton")

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
        for tensor in tensors:
            tensor.mul_(change)
        graph.replay()
        here = [tensor.cpu() for tensor in tensors]
        expected = cutoff_masks(here, topk_cutoff(here, 300_000, magnitude=True), magnitude=True)
        assert all(torch.equal(mask.cpu(), other) for mask, other in zip(out, expected, strict=True))


def test_calls_agree_bit_for_bit() -> None:
    tensors = [torch.randn(5_000_000, device="cuda").mul(8).round()]
    first, second = (topk_cutoff(tensors, 1_000_000, magnitude=True, backend="triton") for _ in range(2))
    assert list(map(int, first)) == list(map(int, second))
    masks = [cutoff_masks(tensors, cut, magnitude=True, backend="triton")[0] for cut in (first, second)]
    assert torch.equal(*masks)


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
