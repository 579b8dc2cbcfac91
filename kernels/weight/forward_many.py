"""Threshold and cast of every layer of a model in one launch.

    W_hat_l = S_l(W_l) for all layers l (forward.py, kind by kind)

200 launches of 3 us each are 0.6 ms, which for a small model is the step. Layers of one kind, dtype and alignment share
a launch (one or two for a usual model). Nothing waits for the host.

Called by `tritonsparse.layers.cache`, which owns the buffers.
"""
# N, K: rows and columns of one layer's stored weight. A program is one 64 x 64 tile of one layer.

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._tile_view import effective_tile, is_kept
from .._triton import tl, triton
from .forward import NUM_WARPS, TILE, load_cutoff
from .reference import effective_weight_reference
from .table import WIDTH, Viewed, ViewTable

__all__ = ["cast_many", "cast_many_reference"]


def cast_many_reference(layers: Sequence[Viewed]) -> None:
    """The definition of `cast_many`: `effective_weight_reference`, layer by layer."""
    for layer in layers:
        assert layer.w_hat is not None  # cast_many
        layer.w_hat.copy_(effective_weight_reference(layer.weight, layer.view, layer.w_hat.dtype))


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
    table,
    layer_of,
    first,
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
    t = 0.0
    if MASKED:
        kept = tl.load(load_pointer(table, row, 3, WIDTH, tl.int8) + offsets, mask=inside, other=0) != 0
    else:
        t = load_row_cutoff(table, row, o_n, o_k, N, inside, WIDTH, SOFT, PER_BLOCK)
        kept = is_kept(w, t)
    p_w_hat = load_pointer(table, row, 0, WIDTH, OUT) + offsets
    tl.store(p_w_hat, effective_tile(w, kept, t, SOFT).to(OUT), mask=inside)


def triton_dtype(dtype: torch.dtype) -> object:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def cast_many(table: ViewTable) -> None:
    """Write every layer's S(W) into its `w_hat`.

    Args:
        table: layers that have a `w_hat` each.

    Raises:
        ValueError: a layer has no `w_hat`; nothing has been written then.
    """
    for index, layer in enumerate(table.layers):
        if layer.w_hat is None:
            raise ValueError(f"cast_many: expected a w_hat in every layer, got none in layer {index}; allocate it")
    if table.backend == "torch":
        cast_many_reference(table.layers)
        return
    for launch in table.launches:
        layer = table.layers[launch.layers[0]]
        assert layer.w_hat is not None  # checked above
        with torch.cuda.device_of(layer.weight):
            _cast_many_kernel[(launch.layer_of.numel(),)](
                launch.table, launch.layer_of, launch.first,
                WEIGHT=triton_dtype(layer.weight.dtype), OUT=triton_dtype(layer.w_hat.dtype), **launch.options,
                WIDTH=WIDTH, TILE=TILE, num_warps=NUM_WARPS,
            )  # fmt: skip
