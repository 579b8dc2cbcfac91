"""Run by torchrun: each rank ranks its tensors with the others', and holds what it finds to one stable sort of all."""

import sys

import torch
import torch.distributed as dist
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


def run(group: dist.ProcessGroup, backend: str) -> int:
    place, checked = dist.get_rank(group), 0
    for kind in ("distinct", "tied"):
        parts, hint = parts_of(kind), None
        values = torch.cat([each.reshape(-1) for part in parts for each in part]).abs()
        order = values.argsort(descending=True, stable=True)
        for kept in (0, 700, 2500, 11_000):
            expected = torch.zeros(11_000, dtype=torch.bool)
            expected[order[:kept]] = True
            last = values[order[kept - 1]] if kept else torch.tensor(torch.inf)
            above = int((values > last).sum())
            key = int(last.view(torch.int32)) if kept else 2**31 - 1
            mine = expected.split([sum(each.numel() for each in part) for part in parts])[place]
            # The second time, the first cut-off is the hint.
            for turn in ("unaided", "hinted"):
                cutoff = topk_cutoff(parts[place], kept, magnitude=True, hint=hint, group=group, backend=backend)
                masks = cutoff_masks(parts[place], cutoff, magnitude=True, group=group, backend=backend)
                assert list(map(int, cutoff)) == [key, above, kept - above, 0, 11_000], (kind, kept, turn)
                assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks]), mine), (kind, kept, turn)
                hint, checked = cutoff if turn == "unaided" else None, checked + 1
    # What one rank cannot rank every rank refuses.
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


if __name__ == "__main__":
    dist.init_process_group("gloo")
    # Room for so few keys that a tied bracket overflows on one rank, and not on the others.
    topk.CHUNK = _select.SAMPLE_FROM = 500
    # All three ranks; and two of them, whose places in their group are not their ranks.
    pair = dist.new_group([0, 2])
    for backend in ["torch", "triton"] if _triton.INTERPRETED else ["torch"]:
        for group in (dist.group.WORLD, pair):
            if group is not pair or dist.get_rank() != 1:
                sys.stdout.write(f"checked {run(group, backend)}\n")
    dist.destroy_process_group()
