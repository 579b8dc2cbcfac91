"""The masks a cut-off draws.

    mask = key > cutoff, and of the keys equal to it the first, in the order (rank, tensor, flat index), until
           `ties_kept` of them are True

On a GPU one pass writes key >= cutoff and counts the ties of each tile; a second visits the tiles whose ties there is
no room for. Between ranks goes the number of ties.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from .._eager import on_device_of
from .._operands import expect
from .._triton import tl, triton
from ._keys import CHUNK, TileTable, check_ranked, key_chunks, launch_constants, load_keys, table_of
from ._select import summed
from .topk import Cutoff

__all__ = ["cutoff_masks"]


def cutoff_masks_reference(
    tensors: Sequence[torch.Tensor],
    cutoff: Cutoff,
    out: Sequence[torch.Tensor],
    *,
    magnitude: bool,
    group: dist.ProcessGroup | None = None,
) -> None:
    """The definition of `cutoff_masks`, into contiguous `out`, on any device; reads counts back as it goes."""
    last, room = int(cutoff.key), int(cutoff.ties_kept)
    if group is not None:
        ties = sum(int((keys == last).sum()) for keys in key_chunks(tensors, magnitude))
        room -= int(_before_this_rank(torch.tensor(ties, device=tensors[0].device), group))
    masks = (part for mask in out for part in mask.view(-1).split(CHUNK))
    for mask, keys in zip(masks, key_chunks(tensors, magnitude), strict=True):
        ties = int((keys == last).sum())
        torch.ge(keys, last, out=mask)
        if ties > room:
            mask[(keys == last).nonzero()[max(room, 0) :]] = False
        room -= ties


def _before_this_rank(count: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum of a 0-dim int64 `count` over the ranks before this one, on the device."""
    if group is None:
        return torch.zeros_like(count)
    rank = dist.get_rank(group)
    counts = count.new_zeros(dist.get_world_size(group))
    counts[rank] = count
    return summed(counts, group)[:rank].sum()


@triton.jit
def _mask_kernel(  # type: ignore[no-untyped-def]
    ties,
    masks,
    addresses,
    sizes,
    cutoff,
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    i_tile = tl.program_id(0)
    last = (tl.load(cutoff) + 2147483648).to(tl.uint32)
    keys, inside, _ = load_keys(addresses, sizes, i_tile, DTYPE, MAGNITUDE, ALIGNED, TILE)
    mask = tl.load(masks + i_tile).to(tl.pointer_type(tl.int8))
    if ALIGNED:
        mask = tl.multiple_of(mask, 16)
    mask = mask + tl.arange(0, TILE)
    # As in load_keys: a bound would split the store into single bytes.
    if tl.load(sizes + i_tile) == TILE:
        tl.store(mask, (keys >= last).to(tl.int8))
    else:
        tl.store(mask, (keys >= last).to(tl.int8), mask=inside)
    tl.store(ties + i_tile, tl.sum((inside & (keys == last)).to(tl.int32)).to(tl.int64))


@triton.jit
def _take_back_kernel(  # type: ignore[no-untyped-def]
    masks,
    addresses,
    sizes,
    cutoff,
    ties,
    ties_before,
    ties_kept,
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    i_tile = tl.program_id(0)
    number = tl.load(ties + i_tile)
    room = tl.load(ties_kept) - tl.load(ties_before + i_tile)
    if (number > 0) & (number > room):
        last = (tl.load(cutoff) + 2147483648).to(tl.uint32)
        keys, inside, _ = load_keys(addresses, sizes, i_tile, DTYPE, MAGNITUDE, ALIGNED, TILE)
        tie = inside & (keys == last)
        beyond = tie & (tl.cumsum(tie.to(tl.int32), 0) > room)
        mask = tl.load(masks + i_tile).to(tl.pointer_type(tl.int8))
        tl.store(mask + tl.arange(0, TILE), tl.zeros((TILE,), dtype=tl.int8), mask=beyond)


def _launch_masks(table: TileTable, magnitude: bool, key: torch.Tensor) -> torch.Tensor:
    """Write key >= cutoff into the table's masks; the ties of each tile `[tiles]`, int64."""
    tiles = table.sizes.numel()
    ties = torch.empty(tiles, dtype=torch.int64, device=table.sizes.device)
    if tiles:
        with on_device_of(table.sizes):
            _mask_kernel[(tiles,)](
                ties, table.masks, table.addresses, table.sizes, key, **launch_constants(table, magnitude)
            )
    return ties


def _launch_take_back(
    table: TileTable,
    magnitude: bool,
    key: torch.Tensor,
    ties: torch.Tensor,
    before: torch.Tensor,
    ties_kept: torch.Tensor,
) -> None:
    """Clear the ties beyond the first `ties_kept`, of which `before` `[tiles]` lie before each tile."""
    if ties.numel():
        with on_device_of(ties):
            _take_back_kernel[(ties.numel(),)](
                table.masks, table.addresses, table.sizes, key, ties, before, ties_kept,
                **launch_constants(table, magnitude),
            )  # fmt: skip


def cutoff_masks(
    tensors: Sequence[torch.Tensor],
    cutoff: Cutoff,
    *,
    magnitude: bool,
    out: Sequence[torch.Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    table: TileTable | None = None,
    backend: str = "torch",
) -> list[torch.Tensor]:
    """mask = key > cutoff, and the first `ties_kept` of those equal to it, by rank, tensor and flat index.

    With the triton back end nothing is read back from the device.

    Args:
        tensors: as given to `topk_cutoff`, with the same values.
        cutoff: its result.
        magnitude: as given to `topk_cutoff`.
        out: bool, contiguous, one of each tensor's shape, to be overwritten; newly allocated if None.
        group: as given to `topk_cutoff`.
        table: `tile_table(tensors, out)`, for the triton back end with `out`; made anew if None.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        `out`; over all ranks exactly `kept` entries are True.

    Raises:
        ValueError: a tensor is not floating point, or on another device; a mask does not fit its tensor.
        RuntimeError: backend "triton" without triton, or off the GPU.
    """
    check_ranked("cutoff_masks", tensors, backend)
    if out is None:
        out, table = [tensor.new_empty(tensor.shape, dtype=torch.bool) for tensor in tensors], None
    if len(out) != len(tensors):
        raise ValueError(
            f"cutoff_masks: expected {len(tensors)} masks in out, got {len(out)}; pass one for each tensor"
        )
    for mask, tensor in zip(out, tensors, strict=True):
        expect(
            mask.shape == tensor.shape
            and mask.dtype == torch.bool
            and mask.device == tensor.device
            and mask.is_contiguous(),
            "cutoff_masks",
            f"a mask in out to be bool {list(tensor.shape)} on {tensor.device}, contiguous",
            mask,
            "make it of the tensor's shape, or pass none",
        )
    if backend == "torch":
        cutoff_masks_reference(tensors, cutoff, out, magnitude=magnitude, group=group)
    else:
        table = table_of("cutoff_masks", table, tensors, out)
        ties = _launch_masks(table, magnitude, cutoff.key)
        before = _before_this_rank(ties.sum(), group) + ties.cumsum(0) - ties
        _launch_take_back(table, magnitude, cutoff.key, ties, before, cutoff.ties_kept)
    return list(out)
