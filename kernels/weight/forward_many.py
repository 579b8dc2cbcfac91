"""Threshold and cast of every layer of a model in one launch.

    Ŵ_l = S_l(W_l) for all layers l (forward.py, kind by kind), with kept counts, occupancy and counts of |W| against
    a bracket, all from the same read of W

200 launches of 3 us each are 0.6 ms, which for a small model is the step. Layers of one kind, dtype and alignment share
a launch (one or two for a usual model). Nothing waits for the host.

    bracket    with lo and hi around the last cut-off, the counts |W| < lo and lo <= |W| < hi are what an exact top-k
               over all layers needs to know of the bulk of the weights (select/topk.py)

Called by `tritonsparse.view_cache`, which owns the buffers.
"""
# N, K: rows and columns of one layer's stored weight. A program is one 64 x 64 tile of one layer.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._operands import compute_dtype, expect
from .._triton import tl, triton
from .forward import NUM_WARPS, TILE, load_cutoff, threshold_cast_reference
from .table import WIDTH, Launch, View, ViewTable

__all__ = ["CastStatistics", "cast_many", "cast_many_reference"]


@dataclass(frozen=True)
class CastStatistics:
    """What `cast_many` counted, a row for each layer, on the device.

    Attributes:
        kept: `[L]`, int64.
        below, inside: `[L]`, int64, weights with |W| < lo and with lo <= |W| < hi; None without a bracket.
        occupancy: kept weights of each 64 x 64 tile, one `[ceil(N/64), ceil(K/64)]` int32 tensor a layer.
    """

    kept: torch.Tensor
    below: torch.Tensor | None
    inside: torch.Tensor | None
    occupancy: list[torch.Tensor]


def cast_many_reference(views: Sequence[View], bracket: torch.Tensor | None) -> CastStatistics:
    """The definition of `cast_many`: `threshold_cast_reference`, layer by layer."""
    kept, below, inside, occupancy = [], [], [], []
    for view in views:
        assert view.w_hat is not None  # cast_many
        w_hat, count, tiles = threshold_cast_reference(
            view.weight, view.threshold, view.mask, view.kind, view.w_hat.dtype
        )
        view.w_hat.copy_(w_hat)
        kept.append(count)
        occupancy.append(tiles)
        if bracket is not None:
            size = view.weight.to(compute_dtype(view.weight)).abs()
            below.append((size < bracket[0]).sum())
            inside.append(((size >= bracket[0]) & (size < bracket[1])).sum())
    counted = bracket is not None
    return CastStatistics(
        torch.stack(kept), torch.stack(below) if counted else None, torch.stack(inside) if counted else None, occupancy
    )


@triton.jit
def load_pointer(table, row, COLUMN: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    # What torch allocates starts on 16 bytes.
    return tl.multiple_of(tl.load(table + row * WIDTH + COLUMN).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def load_sizes(table, row, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    N = tl.load(table + row * WIDTH + 7)
    K = tl.load(table + row * WIDTH + 8)
    if ALIGNED:
        K = tl.multiple_of(K, 16)
    return N, K


@triton.jit
def load_row_cutoff(  # type: ignore[no-untyped-def]
    table, row, o_n, o_k, N, inside, WIDTH: tl.constexpr, SOFT: tl.constexpr, PER_BLOCK: tl.constexpr
):
    threshold = tl.load(table + row * WIDTH + 2).to(tl.pointer_type(tl.float32))
    stride_tn = tl.load(table + row * WIDTH + 9)
    stride_tk = tl.load(table + row * WIDTH + 10)
    block_n = tl.load(table + row * WIDTH + 11)
    block_k = tl.load(table + row * WIDTH + 12)
    return load_cutoff(threshold, o_n, o_k, N, stride_tn, stride_tk, block_n, block_k, inside, SOFT, PER_BLOCK)


@triton.jit
def _cast_many_kernel(  # type: ignore[no-untyped-def]
    counts,
    table,
    layer_of,
    first,
    bracket,
    tiles,
    WEIGHT: tl.constexpr,
    OUT: tl.constexpr,
    SOFT: tl.constexpr,
    MASKED: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(layer_of + program).to(tl.int64)
    tile = program - tl.load(first + row)
    N, K = load_sizes(table, row, WIDTH, ALIGNED)
    tiles_k = tl.cdiv(K, TILE)
    o_n = tile // tiles_k * TILE + tl.arange(0, TILE)
    o_k = tile % tiles_k * TILE + tl.arange(0, TILE)
    inside = (o_n < N)[:, None] & (o_k < K)[None, :]
    offsets = o_n[:, None] * K + o_k[None, :]

    # [TILE, TILE]
    w = tl.load(load_pointer(table, row, 1, WIDTH, WEIGHT) + offsets, mask=inside, other=0.0).to(tl.float32)
    if bracket is not None:
        size = tl.abs(w)
        below = inside & (size < tl.load(bracket))
        within = inside & ~(size < tl.load(bracket)) & (size < tl.load(bracket + 1))
        tl.store(counts + tiles + program, tl.sum(below.to(tl.int32)))
        tl.store(counts + 2 * tiles + program, tl.sum(within.to(tl.int32)))
    if MASKED:
        kept = tl.load(load_pointer(table, row, 3, WIDTH, tl.int8) + offsets, mask=inside, other=0) != 0
    else:
        t = load_row_cutoff(table, row, o_n, o_k, N, inside, WIDTH, SOFT, PER_BLOCK)
        kept = inside & ~(tl.abs(w) <= t)
        if SOFT:
            w = tl.where(w > 0, w - t, w + t)
    tl.store(load_pointer(table, row, 0, WIDTH, OUT) + offsets, tl.where(kept, w, 0.0).to(OUT), mask=inside)
    tl.store(counts + program, tl.sum(kept.to(tl.int32)))


def triton_dtype(dtype: torch.dtype) -> object:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _per_layer(counts: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Sums of counts `[..., tiles]` over the tiles of each layer: differences of integer prefix sums, so exact."""
    ends = torch.nn.functional.pad(counts.to(torch.int64).cumsum(-1), (1, 0))
    return ends.index_select(-1, first).diff(dim=-1)


def cast_many(table: ViewTable, bracket: torch.Tensor | None = None) -> CastStatistics:
    """Write every layer's Ŵ into its `w_hat`, and count.

    Args:
        table: views that have a `w_hat` each.
        bracket: `[2]`, float32, lo and hi; None counts nothing.

    Returns:
        The counts, on the device.

    Raises:
        ValueError: a view has no `w_hat`, or the bracket is not two float32 values beside the weights.
    """
    for index, view in enumerate(table.views):
        if view.w_hat is None:
            raise ValueError(f"cast_many: expected a w_hat in every view, got none in view {index}; allocate it")
    if bracket is not None and table.views:
        expect(
            bracket.shape == (2,) and bracket.dtype == torch.float32 and bracket.device == table.views[0].weight.device,
            "cast_many",
            f"bracket to be float32 [2] on {table.views[0].weight.device}",
            bracket,
            "pass the lower and the upper end",
        )
    if table.backend == "torch":
        return cast_many_reference(table.views, bracket)
    device = table.views[0].weight.device
    totals = torch.zeros(3, len(table.views), dtype=torch.int64, device=device)
    occupancy = [torch.zeros(0, 0, dtype=torch.int32, device=device)] * len(table.views)
    for launch in table.launches:
        tiles = launch.layer_of.numel()
        counts = torch.empty(1 if bracket is None else 3, tiles, dtype=torch.int32, device=device)
        view = table.views[launch.layers[0]]
        assert view.w_hat is not None  # checked above
        with torch.cuda.device_of(view.weight):
            _cast_many_kernel[(tiles,)](
                counts, launch.table, launch.layer_of, launch.first, bracket, tiles,
                WEIGHT=triton_dtype(view.weight.dtype), OUT=triton_dtype(view.w_hat.dtype), **launch.options,
                WIDTH=WIDTH, TILE=TILE, num_warps=NUM_WARPS,
            )  # fmt: skip
        totals[: len(counts)].index_copy_(1, launch.rows, _per_layer(counts, launch.first))
        _spread(table, launch, counts[0], occupancy)
    below, inside = (None, None) if bracket is None else (totals[1], totals[2])
    return CastStatistics(totals[0], below, inside, occupancy)


def _spread(table: ViewTable, launch: Launch, counts: torch.Tensor, occupancy: list[torch.Tensor]) -> None:
    start = 0
    for index in launch.layers:
        n, k = table.views[index].weight.shape
        shape = (-(-n // TILE), -(-k // TILE))
        occupancy[index] = counts[start : start + shape[0] * shape[1]].view(shape)
        start += shape[0] * shape[1]
