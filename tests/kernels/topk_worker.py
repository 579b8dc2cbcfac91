"""Run by torchrun: each rank ranks its tensors with the others', and writes what it found to `<folder>/<rank>.pt`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tritonsparse.kernels import _triton
from tritonsparse.kernels.select import _select, topk
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.topk import topk_cutoff

BACKENDS = ["torch", "triton"] if _triton.INTERPRETED else ["torch"]
KEPT = [0, 700, 2500, 11_000]


def tensors_of(place: int, kind: str) -> list[Tensor]:
    """What the rank at `place` of a group has of 11,000 elements: the first two have all of them."""
    random = torch.Generator().manual_seed(0)
    everything = [torch.randn(50, 100, generator=random), torch.randn(6000, generator=random)]
    if kind == "tied":
        everything = [each.mul(2).round() for each in everything]
    return [[everything[0], torch.empty(0)], [everything[1]], [torch.empty(0, 7)]][place]


def refusal(tensors: list[Tensor], kept: int, group: dist.ProcessGroup, backend: str) -> str:
    try:
        topk_cutoff(tensors, kept, magnitude=True, group=group, backend=backend)
    except ValueError as error:
        return str(error)
    return ""


def run(group: dist.ProcessGroup, backend: str) -> dict[str, object]:
    found: dict[str, object] = {}
    place = dist.get_rank(group)
    for kind in ("distinct", "tied"):
        tensors, hint = tensors_of(place, kind), None
        for kept in KEPT:
            # The second time, the first cut-off is the hint.
            for turn in ("unaided", "hinted"):
                cutoff = topk_cutoff(tensors, kept, magnitude=True, hint=hint, group=group, backend=backend)
                masks = cutoff_masks(tensors, cutoff, magnitude=True, group=group, backend=backend)
                found[f"{kind} {kept} {turn}"] = (list(map(int, cutoff)), masks)
                hint = cutoff if turn == "unaided" else None
    diverged = [torch.tensor([float("nan") if place == 0 else 1.0])]
    found["refusals"] = [refusal(diverged, 1, group, backend), refusal(tensors, 11_001, group, backend)]
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    # Room for so few keys that a tied bracket overflows on one rank, and not on the others.
    topk.CHUNK = _select.SAMPLE_FROM = 500
    rank, pair = dist.get_rank(), dist.new_group([0, 2])
    results = {f"{backend} 3": run(dist.group.WORLD, backend) for backend in BACKENDS}
    if rank != 1:
        results |= {f"{backend} 2": run(pair, backend) for backend in BACKENDS}
    torch.save(results, Path(sys.argv[1]) / f"{rank}.pt")
    dist.destroy_process_group()
