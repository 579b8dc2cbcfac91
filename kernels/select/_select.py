"""The kernels of the exact cut-off: many tensors in one launch, and no decision that waits for the host.

    bracket     counts the keys above [low, high] and those predicted, lists the others  one read of the tensors
    histogram   of one digit of the keys that share the digits found so far              of the list, or the tensors
    narrow      the next digit of the cut-off, from that histogram                       256 numbers, one program

`histogram` decides on the device whether the bracket held: a wrong prediction costs its four launches a read of the
tensors each, and nothing else. Keys are unsigned here: those of `order_keys` plus 2^31. Counters are integers, so the
order in which atomics arrive cannot be seen.

Called by `topk.py`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .._eager import on_device_of
from .._triton import INTERPRETED, tl, triton
from ._keys import TileTable, launch_constants, load_keys

# Programs that loop over tiles: as many of 128 threads as a multiprocessor has at 80 registers each.
PROGRAMS_PER_PROCESSOR = 6
# Without a hint, every 64th tile (with the torch back end, element) predicts the cut-off of more elements than this;
# fewer are listed whole. For 10M normal weights at 90 % sparsity the prediction's standard deviation is 0.2 %.
SAMPLE_FROM = 2**20
STEP = 64
# Half the bracket, in keys of float32: 1/32 of an octave, so 1.6 to 3.1 % of the cut-off either side.
# EVERYTHING, around 0, leaves out one key, which is of a NaN.
MARGIN = 2**18
EVERYTHING = 2**31 - 1
# The list has room for a sixteenth of the keys: four times what such a bracket takes of normal weights.
LIST_SHARE = 16
DIGITS = (24, 16, 8, 0)


@triton.jit(do_not_specialize=["tiles", "capacity", "margin"])
def _bracket_kernel(  # type: ignore[no-untyped-def]
    held,
    cursor,
    counts,
    addresses,
    sizes,
    predicted,
    tiles,
    capacity,
    margin,
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    center = tl.load(predicted) + 2147483648
    low = tl.maximum(center - margin, 0).to(tl.uint32)
    high = tl.minimum(center + margin, 4294967295).to(tl.uint32)

    above = tl.zeros((), dtype=tl.int64)
    within = tl.zeros((), dtype=tl.int64)
    equal = tl.zeros((), dtype=tl.int64)
    nans = tl.zeros((), dtype=tl.int64)
    overflowed = tl.zeros((), dtype=tl.int64)
    for i_tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        keys, inside, nan = load_keys(addresses, sizes, i_tile, DTYPE, MAGNITUDE, ALIGNED, TILE)
        above += tl.sum((inside & (keys > high)).to(tl.int32))
        nans += tl.sum(nan.to(tl.int32))
        bracketed = inside & (keys >= low) & (keys <= high)
        within += tl.sum(bracketed.to(tl.int32))
        # A key that ties in its millions, as 0 does among pruned weights, is one number rather than a full list.
        taken = (bracketed & (keys != center.to(tl.uint32))).to(tl.int32)
        equal += tl.sum((bracketed & (keys == center.to(tl.uint32))).to(tl.int32))
        number = tl.sum(taken)
        if number > 0:
            # Which keys the list holds, not their order, is what is read of it.
            first = tl.atomic_add(cursor, number.to(tl.int64))
            slots = tl.cumsum(taken, 0) - 1
            room = tl.maximum(tl.minimum(capacity - first, TILE), 0).to(tl.int32)
            tl.store(held + first + slots, keys.to(tl.int32, bitcast=True), mask=(taken != 0) & (slots < room))
            overflowed += (number > room).to(tl.int64)
    tl.atomic_add(counts, above)
    tl.atomic_add(counts + 1, within)
    tl.atomic_add(counts + 2, equal)
    tl.atomic_add(counts + 3, nans)
    tl.atomic_add(counts + 4, overflowed)


@triton.jit
def _bracket_held(counts, kept):  # type: ignore[no-untyped-def]
    above = tl.load(counts)
    return (above < kept) & (kept <= above + tl.load(counts + 1)) & (tl.load(counts + 4) == 0)


@triton.jit
def _digit_histogram(keys, inside, prefix, shift):  # type: ignore[no-untyped-def]
    # Two shifts: one of 32 is undefined, and of the first digit nothing lies above.
    candidates = inside & ((keys >> shift >> 8) == prefix)
    return tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=candidates)


@triton.jit(do_not_specialize=["tiles", "kept", "shift", "step"])
def _histogram_kernel(  # type: ignore[no-untyped-def]
    histogram,
    addresses,
    sizes,
    held,
    cursor,
    counts,
    state,
    tiles,
    kept,
    shift,
    step,
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    bins = tl.arange(0, 256)
    total = tl.zeros((256,), dtype=tl.int32)
    prefix = tl.load(state).to(tl.uint32)
    if _bracket_held(counts, kept):
        size = tl.load(cursor)
        for i_part in range(program, tl.cdiv(size, TILE), programs):
            slots = i_part * TILE + tl.arange(0, TILE)
            inside = slots < size
            keys = tl.load(held + slots, mask=inside, other=0).to(tl.uint32, bitcast=True)
            total += _digit_histogram(keys, inside, prefix, shift)
    else:
        for i_tile in range(program * step, tiles, programs * step):
            keys, inside, _ = load_keys(addresses, sizes, i_tile, DTYPE, MAGNITUDE, ALIGNED, TILE)
            total += _digit_histogram(keys, inside, prefix, shift)
    tl.atomic_add(histogram + bins, total.to(tl.int64), mask=total != 0)


@triton.jit(do_not_specialize=["kept", "shift"])
def _narrow_kernel(state, histogram, counts, predicted, kept, shift):  # type: ignore[no-untyped-def]
    bins = tl.arange(0, 256)
    number = tl.load(histogram + bins)
    prefix = tl.load(state)
    above = tl.load(state + 1)
    if _bracket_held(counts, kept):
        # The predicted key is not in the list.
        center = (tl.load(predicted) + 2147483648).to(tl.uint32).to(tl.int64)
        found = (bins == (center >> shift & 255)) & ((center >> shift >> 8) == prefix)
        number += tl.where(found, tl.load(counts + 2), 0)
        if shift == 24:
            above = tl.load(counts)
    at_least = tl.sum(number) - tl.cumsum(number, 0) + number
    # A sample may hold fewer than were asked of it.
    digit = tl.maximum(tl.sum((at_least >= kept - above).to(tl.int64)) - 1, 0)
    above += tl.sum(tl.where(bins > digit, number, 0))
    tl.store(state, prefix * 256 + digit)
    tl.store(state + 1, above)
    tl.store(state + 2, kept - above)


def summed(counts: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """`counts`, summed in place over the ranks of `group`; None: over no other."""
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts


def _programs(table: TileTable) -> int:
    device = table.addresses.device
    processors = 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    return min(max(1, table.sizes.numel()), PROGRAMS_PER_PROCESSOR * processors)


def launch_select(
    table: TileTable,
    n: int,
    kept: int,
    magnitude: bool,
    hint: torch.Tensor | None,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, ...]:
    """The fields of `topk.Cutoff` for the `n` elements of `table`'s tensors, from the key of an earlier one, `hint`."""
    device, tiles, constants = table.addresses.device, table.sizes.numel(), launch_constants(table, magnitude)
    grid = (_programs(table),)
    capacity = max(n // LIST_SHARE, SAMPLE_FROM)
    held = torch.empty(min(n, capacity), dtype=torch.int32, device=device)

    # Each begins at a multiple of 16 bytes, as the other tensors do: another alignment is another compilation.
    zeros = torch.zeros(9, dtype=torch.int64, device=device)
    counts, cursor, predicted, margin = zeros[:6], zeros[6:7], zeros[8:], EVERYTHING

    def radix(predicted: torch.Tensor, wanted: int, step: int) -> torch.Tensor:
        state = torch.zeros(3, dtype=torch.int64, device=device)
        for shift, histogram in zip(DIGITS, torch.zeros(4, 256, dtype=torch.int64, device=device), strict=True):
            _histogram_kernel[grid](
                histogram, table.addresses, table.sizes, held, cursor, counts, state, tiles, wanted, shift, step,
                **constants,
            )  # fmt: skip
            _narrow_kernel[(1,)](state, summed(histogram, group), counts, predicted, wanted, shift, num_warps=1)
        # From here on keys are signed again.
        state[0] -= 2**31
        return state

    with on_device_of(table.addresses):
        if hint is not None:
            predicted, margin = hint, MARGIN
        # All ranks have to go the same way, so a small part of many is not a small whole.
        elif group is not None or n > SAMPLE_FROM:
            # Nothing is counted yet, so these passes find no bracket that held and read the tensors.
            predicted, margin = radix(predicted, kept // STEP, STEP), MARGIN
        _bracket_kernel[grid](
            held, cursor, counts, table.addresses, table.sizes, predicted, tiles, capacity, margin, **constants
        )
        counts[5] += n
        summed(counts, group)
        key, above, ties = radix(predicted, kept, 1).unbind()
    return key, above, ties, counts[3], counts[5]
