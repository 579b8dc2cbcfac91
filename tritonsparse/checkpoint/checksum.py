"""A checksum of what is written beside the weights, which nothing else would miss: a changed mask is a mask."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["KEY", "checksum", "refuse_changed"]

KEY = "crc32"


def checksum(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of a JSON object and of tensors on the CPU: names, dtypes, shapes and bytes."""
    found = zlib.crc32(json.dumps(head, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        found = zlib.crc32(f"{key} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def refuse_changed(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is not as it was written; version 0.1 wrote no checksum.

    Args:
        head: with its checksum under `KEY`, over all the rest.

    Raises:
        ValueError: the checksum is another.
    """
    rest = {key: value for key, value in head.items() if key != KEY}
    if head.get(KEY) is not None and head[KEY] != checksum(rest, tensors):
        raise ValueError("its checksum is another")
