"""Three processes: each ranks its tensors with the others', and holds what it finds to one stable sort of all."""

import sys
import tempfile
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from tritonsparse.kernels import _triton
from tritonsparse.kernels.select import _select, topk
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.topk import topk_cutoff


def parts_of(kind: str) -> list[list[Tensor]]:
    """What each place of a group has of 11,000 elements: the first two have all of them."""
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, 100, generator=random), torch.randn(6000, generator=random)]
    tensors = [each.mul(2).round() for each in tensors] if kind == "tied" else tensors
    return [[tensors[0], torch.empty(0)], [tensors[1]], [torch.empty(0, 7)]]


def run(group: dist.ProcessGroup, backend: str, kinds: Sequence[str], counts: Sequence[int]) -> int:
    place, checked = dist.get_rank(group), 0
    for kind in kinds:
        parts, hint = parts_of(kind), None
        values = torch.cat([each.reshape(-1) for part in parts for each in part]).abs()
        order = values.argsort(descending=True, stable=True)
        for kept in counts:
            expected = torch.zeros(11_000, dtype=torch.bool)
            expected[order[:kept]] = True
            last = values[order[kept - 1]] if kept else torch.tensor(torch.inf)
            above = int((values > last).sum())
            key = int(last.view(torch.int32)) if kept else 2**31 - 1
            mine = expected.split([sum(each.numel() for each in part) for part in parts])[place]
            for turn in ("unaided", "hinted"):
                cutoff = topk_cutoff(parts[place], kept, magnitude=True, hint=hint, group=group, backend=backend)
                masks = cutoff_masks(parts[place], cutoff, magnitude=True, group=group, backend=backend)
                assert list(map(int, cutoff)) == [key, above, kept - above, 0, 11_000], (kind, kept, turn)
                assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks]), mine), (kind, kept, turn)
                hint, checked = cutoff if turn == "unaided" else None, checked + 1
    diverged = [torch.tensor([float("nan") if place == 0 else 1.0])]
    for tensors, kept, words in (
        (diverged, 1, "got NaN; the weights have diverged"),
        (parts[place], 11_001, "expected 0 <= kept <= 11000, got 11001"),
    ):
        try:
            topk_cutoff(tensors, kept, magnitude=True, group=group, backend=backend)
        except ValueError as error:
            checked += words in str(error)
    return checked


def work(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    # All three ranks; and two of them, whose places in their group are not their ranks.
    pair, both = dist.new_group([0, 2]), ("distinct", "tied")
    for group in (dist.group.WORLD, pair):
        if group is not pair or rank != 1:
            sys.stdout.write(f"torch {run(group, 'torch', both, (0, 700, 2500, 11_000))}\n")
            if _triton.INTERPRETED:
                # Slow, and the same communication.
                kinds = both[1:] if group is pair else both
                sys.stdout.write(f"triton {run(group, 'triton', kinds, (2500, 11_000))}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Room for so few keys that a tied bracket overflows on one rank, and not on the others.
    topk.CHUNK = _select.SAMPLE_FROM = 500
    with tempfile.TemporaryDirectory() as folder:
        # Forked: what is imported is imported once.
        torch.multiprocessing.start_processes(work, (f"{folder}/store",), nprocs=3, start_method="fork")
