"""Masks on disk: a bit a weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["packed", "unpacked"]


def packed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Bool tensors as uint8 `[ceil(n / 8)]`, lowest bit first, and their shapes by key; others as they are."""
    shapes = {key: list(value.shape) for key, value in tensors.items() if value.dtype == torch.bool}
    return {key: _pack(value) if key in shapes else value for key, value in tensors.items()}, shapes


def unpacked(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """`packed` undone.

    Raises:
        ValueError: a tensor is missing, or of another size or dtype than its shape asks for.
    """
    result = dict(tensors)
    for key, shape in shapes.items():
        value, size = tensors.get(key), torch.Size(shape).numel()
        if value is None or value.dtype != torch.uint8 or value.shape != (-(-size // 8),):
            got = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
            raise ValueError(f"expected {size} bits in {key!r}, got {got}")
        result[key] = _shifts(value).flatten()[:size].bool().reshape(shape)
    return result


def _pack(mask: Tensor) -> Tensor:
    flat = mask.flatten().to(torch.uint8)
    flat = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _shifts(value: Tensor) -> Tensor:
    return (value[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
