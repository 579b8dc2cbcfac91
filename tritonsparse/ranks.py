"""What ranks that train one model must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layers import SparseLayer

__all__ = ["check_same_masks", "refuse_sharded"]

_PRIME = 2_147_483_647


def refuse_sharded(function: str, layers: Mapping[str, SparseLayer]) -> None:
    """Refuse layers whose weights an engine has cut up since `sparsify`.

    Raises:
        ValueError: a weight is a DTensor (fully_shard, tensor parallel), or no Parameter of its layer's shape (FSDP).
    """
    for name, layer in layers.items():
        weight: Any = layer._parameters.get("weight")
        dims = 3 if layer.compacted else 4 if isinstance(layer, nn.Conv2d) else 2
        if hasattr(weight, "device_mesh") or not isinstance(weight, nn.Parameter) or weight.dim() != dims:
            got = "no Parameter" if weight is None else f"a {type(weight).__name__} of shape {list(weight.shape)}"
            raise ValueError(
                f"{function}: expected whole weights, got {got} in {name!r}; sharding is not supported yet: train "
                f"under DDP, or without fully_shard, FSDP or a tensor-parallel plan"
            )


@torch.no_grad()
def check_same_masks(function: str, layers: Mapping[str, SparseLayer]) -> None:
    """Refuse ranks whose masks differ: chosen by the magnitude of weights that each rank drew for itself.

    One number a rank is sent. Every rank calls.

    Raises:
        RuntimeError: on all ranks, where any differs.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    total = sum(_checksum(layer, place + 1) for place, layer in enumerate(layers.values())) % _PRIME
    device = next(iter(layers.values())).weight.device
    extremes = torch.tensor([total, -total], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if int(extremes[0]) != -int(extremes[1]):
        raise RuntimeError(
            f"{function}: expected the same masks on all {dist.get_world_size()} ranks, got others on some; give every "
            f"rank the same weights (set_seed, or one checkpoint) and the same seed= before sparsify"
        )


def _checksum(layer: SparseLayer, place: int) -> int:
    """A number that differs for masks that differ, almost surely."""
    mask: Tensor | None = layer.view_tensor("mask")
    if mask is None:
        return 0
    flat = mask.flatten()
    # Sums of fewer than 2^31 numbers below 2^31.
    weights = torch.arange(1, len(flat) + 1, device=flat.device) * 48_271 % _PRIME
    return int((weights * flat).sum()) % _PRIME * place
