"""The exact cut-off of a top-k over many tensors, and over many ranks.

    cutoff = the `kept`-th largest key of all tensors of all ranks          keys: `_keys.py`

A predicted cut-off makes it one pass: count the keys above a narrow bracket around the prediction, copy the keys inside
it to a short list, and find the cut-off there: by radix, a digit of 8 bits at a time. The prediction is an earlier
cut-off (`hint`), or that of a sample. If it was wrong, or the list overflows, the radix passes run over all keys: the
result never depends on the prediction. Nothing is sorted, and no contiguous tensor is copied.

Between ranks go six counts and a histogram of each digit (2 KiB), never a value, so every rank finds the same cut-off.

`masks.py` draws the masks of a cut-off.
"""
# n: elements of all tensors of this rank

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ._keys import CHUNK, TileTable, check_ranked, key_chunks, table_of
from ._select import LIST_SHARE, MARGIN, STEP, launch_select, summed

__all__ = ["Cutoff", "topk_cutoff"]


class Cutoff(NamedTuple):
    """Where a top-k cuts; every field is a 0-dim int64 tensor on the tensors' device, equal on all ranks.

    Attributes:
        key: the `kept`-th largest key; the largest integer of the key's width where nothing is kept.
        above: how many keys are larger.
        ties_kept: how many of those equal to it are kept, so that above + ties_kept = kept.
        nans: how many values are NaN; any other field means nothing where this is not 0.
        total: elements of all tensors of all ranks.
    """

    key: torch.Tensor
    above: torch.Tensor
    ties_kept: torch.Tensor
    nans: torch.Tensor
    total: torch.Tensor


def _radix(
    chunks: Callable[[], Iterable[torch.Tensor]],
    kept: int,
    digits: int,
    device: torch.device,
    group: dist.ProcessGroup | None,
    counted: tuple[int, int] = (0, 0),
) -> tuple[int, int]:
    """The `kept`-th largest key of all chunks of all ranks, and how many are larger.

    Args:
        counted: a key that the chunks leave out, and how many there are of it on all ranks.
    """
    prefix = above = 0
    for digit in reversed(range(digits)):
        shift, first = 8 * digit, digit == digits - 1
        histogram = torch.zeros(256, dtype=torch.int64, device=device)
        for keys in chunks():
            candidates = keys if first else keys[keys >> (shift + 8) == prefix]
            histogram += torch.bincount(candidates >> shift & 255, minlength=256)
        summed(histogram, group)
        if first or counted[0] >> (shift + 8) == prefix:
            histogram[counted[0] >> shift & 255] += counted[1]
        # The first digit carries the sign: its upper half comes before its lower half.
        histogram = histogram.roll(128) if first else histogram
        at_least = histogram.flip(0).cumsum(0).flip(0)
        # A sample may hold fewer than were asked of it.
        chosen = max(int((at_least >= kept - above).sum()) - 1, 0)
        above += int(at_least[chosen] - histogram[chosen])
        prefix = chosen - 128 if first else prefix * 256 + chosen
    return prefix, above


def _of_few(keys: torch.Tensor, kept: int, counted: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """What `_radix` finds, of keys few enough to be copied, on one rank; 1 <= kept <= their number."""
    key, number = counted
    if number:
        larger = int((keys > key).sum())
        if larger < kept <= larger + number:
            return key, larger
        if kept > larger:
            last, above = _of_few(keys, kept - number)
            return last, above + number
    last = int(torch.kthvalue(keys, keys.numel() - kept + 1).values)
    return last, int((keys > last).sum())


# The 10 % of largest magnitude of 10M normal fp32, seconds of one core of an AMD EPYC (Milan) on 2026-11-21: .053 here,
# .236 by abs and kthvalue, 1.44 by abs and sort.
def topk_cutoff_reference(
    tensors: Sequence[torch.Tensor],
    kept: int,
    *,
    magnitude: bool,
    hint: Cutoff | None = None,
    group: dist.ProcessGroup | None = None,
) -> Cutoff:
    """The definition of `topk_cutoff`, on any device; reads counts back as it goes."""
    device = tensors[0].device
    n = sum(tensor.numel() for tensor in tensors)
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    key = torch.iinfo(torch.int64 if double else torch.int32)
    infinity = 0x7FF0000000000000 if double else 0x7F800000
    digits = key.bits // 8

    low, high, predicted = key.min, key.max, key.max
    if hint is not None:
        predicted = int(hint.key)
    # All ranks have to go the same way, so a small part of many is not a small whole.
    elif group is not None:
        predicted, _ = _radix(lambda: key_chunks(tensors, magnitude, STEP), kept // STEP, digits, device, group)
    elif n > CHUNK and kept >= STEP:
        predicted, _ = _of_few(torch.cat([*key_chunks(tensors, magnitude, STEP)]), kept // STEP)
    if hint is not None or group is not None or n > CHUNK:
        margin = MARGIN << (29 if double else 0)
        # No higher than infinity: the keys of NaN have to be reached.
        low, high = min(max(predicted - margin, low), infinity), min(predicted + margin, high)

    capacity = max(n // LIST_SHARE, CHUNK)
    above = inside = equal = nans = 0
    held = []
    for keys in key_chunks(tensors, magnitude):
        nans += 0 if magnitude else int((keys < ~infinity).sum())
        reached = keys[keys >= low]
        nans += int((reached > infinity).sum())
        bracketed = reached[reached <= high]
        # A key that ties in its millions, as 0 does among pruned weights, is one number rather than a full list.
        listed = bracketed[bracketed != predicted]
        above += reached.numel() - bracketed.numel()
        inside += bracketed.numel()
        equal += bracketed.numel() - listed.numel()
        if inside - equal <= capacity:
            held.append(listed)
    counts = torch.tensor([above, inside, equal, nans, int(inside - equal > capacity), n], device=device)
    above, inside, equal, nans, overflowed, total = summed(counts, group).tolist()

    if not above < kept <= above + inside or overflowed:
        last, above = _radix(lambda: key_chunks(tensors, magnitude), kept, digits, device, group)
    else:
        if group is None:
            last, more = _of_few(torch.cat(held), kept - above, (predicted, equal))
        else:
            last, more = _radix(lambda: held, kept - above, digits, device, group, (predicted, equal))
        above += more
    return Cutoff(*torch.tensor([last, above, kept - above, nans, total], device=device).unbind())


def topk_cutoff(
    tensors: Sequence[torch.Tensor],
    kept: int,
    *,
    magnitude: bool,
    hint: Cutoff | None = None,
    group: dist.ProcessGroup | None = None,
    table: TileTable | None = None,
    check: bool = True,
    backend: str = "torch",
) -> Cutoff:
    """The `kept`-th largest of all elements of all tensors, exact.

    Needs memory for n/8 keys or 4 MiB, whichever is more, and for a copy of each tensor that is not contiguous.

    Args:
        tensors: any shapes, at least one (of no elements, say), on one device; float16/bfloat16/float32 (of one dtype
            with the triton back end), float64 with the torch back end (then on every rank).
        kept: how many to keep, 0 <= kept <= elements of all tensors of all ranks; the same on all ranks.
        magnitude: rank by absolute value.
        hint: an earlier cut-off of such tensors, near which this one is looked for first; equal or None on all ranks.
        group: ranks that hold different tensors, ranked together; every rank of it calls. None: this rank's alone,
            which is right for weights that ranks hold alike.
        table: `tile_table(tensors)`, for the triton back end; made anew if None, which a CUDA graph cannot capture.
        check: read `nans` and `total` back and refuse. With False, `table` and the triton back end nothing is read back
            and the call can be captured.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        The same on every rank, and bit for bit on every call.

    Raises:
        ValueError: a tensor is not floating point, or on another device; `kept` is out of range; a value is NaN.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.select.topk import topk_cutoff
        >>> from tritonsparse.kernels.select.masks import cutoff_masks
        >>> weights = [torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0, -2.0])]
        >>> cutoff = topk_cutoff(weights, 3, magnitude=True)
        >>> cutoff.above, cutoff.ties_kept  # 3 and -2; the first of the three ones
        (tensor(2), tensor(1))
        >>> cutoff_masks(weights, cutoff, magnitude=True)
        [tensor([True, True]), tensor([False, False,  True])]
    """
    check_ranked("topk_cutoff", tensors, backend)
    n = sum(tensor.numel() for tensor in tensors)
    if kept < 0 or (group is None and kept > n):
        raise ValueError(f"topk_cutoff: expected 0 <= kept <= {n}, got {kept}; correct the count")
    if hint is not None and hint.key.device != tensors[0].device:
        raise ValueError(
            f"topk_cutoff: expected a hint on {tensors[0].device}, got one on {hint.key.device}; pass none, or one of "
            f"these tensors"
        )
    if backend == "torch":
        cutoff = topk_cutoff_reference(tensors, kept, magnitude=magnitude, hint=hint, group=group)
    else:
        hint_key = None if hint is None else hint.key
        table = table_of("topk_cutoff", table, tensors)
        cutoff = Cutoff(*launch_select(table, n, kept, magnitude, hint_key, group))
    if check:
        nans, total = torch.stack([cutoff.nans, cutoff.total]).tolist()
        if nans:
            raise ValueError("topk_cutoff: expected scores without NaN, got NaN; the weights have diverged")
        if kept > total:
            raise ValueError(f"topk_cutoff: expected 0 <= kept <= {total}, got {kept}; correct the count")
    return cutoff
