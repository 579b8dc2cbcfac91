"""The backward of every layer's view over the accumulated, reduced dense gradients, in two launches.

    G_l <- m_l · G_l in place, and the gradients of the thresholds, for all layers l     (backward.py)

The multiplier is linear in the gradient, so that it may be applied once a step: after accumulation over micro-batches
and reduction over ranks, before or after unscaling. Sums run in a fixed order: repeated calls agree bit for bit.

Called by `tritonsparse.layers.cache`, and for held zeros.
"""
# N, K: rows and columns of one layer's stored weight. A program is one 64 x 64 tile of one layer.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._operands import expect
from .._tile_view import (
    is_kept,
    masked_gradient,
    multiplier_tile,
    step_multiplier,
    step_reach,
    step_terms,
    times_sign,
    times_slope,
)
from .._triton import tl, triton
from .backward import SUM_COLUMNS
from .forward import NUM_WARPS, TILE
from .forward_many import load_pointer, load_row_cutoff, load_sizes, triton_dtype
from .reference import threshold_backward_reference
from .table import GRAD, WIDTH, Viewed, ViewTable

__all__ = ["backward_many", "backward_many_reference"]

# Terms of one threshold's gradient that a program of the second stage adds at a time.
SUM_TILE = 1024


def backward_many_reference(layers: Sequence[Viewed], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The definition of `backward_many`: `threshold_backward_reference`, layer by layer."""
    of_thresholds = []
    for layer, grad in zip(layers, grads, strict=True):
        of_threshold = _no_gradient(layer)
        if grad is not None:
            new, of_threshold = threshold_backward_reference(grad, layer.weight, layer.view)
            grad.copy_(new)
        of_thresholds.append(of_threshold)
    return of_thresholds


def _no_gradient(layer: Viewed) -> Tensor | None:
    return None if layer.view.threshold is None else torch.zeros_like(layer.view.threshold)


@triton.jit
def _backward_many_kernel(  # type: ignore[no-untyped-def]
    sums,
    table,
    layer_of,
    first,
    WEIGHT: tl.constexpr,
    ALPHA: tl.constexpr,
    GRAD_MASK: tl.constexpr,
    SOFT: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(layer_of + program).to(tl.int64)
    tile = program - tl.load(first + row)
    N, K = load_sizes(table, row, WIDTH, ALIGNED)
    tiles_k = tl.cdiv(K, TILE)
    o_n = tile // tiles_k * TILE + tl.arange(0, TILE)
    o_k = tile % tiles_k * TILE + tl.arange(0, TILE)
    # Of a layer without a gradient nothing is read or stored, and its sums are zeros.
    rows = tl.where(tl.load(table + row * WIDTH + 4) == 0, 0, N)
    inside = (o_n < rows)[:, None] & (o_k < K)[None, :]
    offsets = o_n[:, None] * K + o_k[None, :]

    # [TILE, TILE]
    w = None
    if MASKED:
        kept = tl.load(load_pointer(table, row, 3, WIDTH, tl.int8) + offsets, mask=inside, other=0) != 0
    else:
        w = tl.load(load_pointer(table, row, 1, WIDTH, WEIGHT) + offsets, mask=inside, other=0.0).to(tl.float32)
        t = load_row_cutoff(table, row, o_n, o_k, N, inside, WIDTH, SOFT, PER_BLOCK)
        kept = is_kept(w, t)
    if STEP:
        reach = step_reach(w, t)
        multiplier = step_multiplier(kept, reach)
    else:
        on_pruned = 0.0
        if ALPHA:
            on_pruned = tl.load(load_pointer(table, row, 6, WIDTH, tl.float32))
        in_b = None
        if GRAD_MASK:
            in_b = tl.load(load_pointer(table, row, 5, WIDTH, tl.int8) + offsets, mask=inside, other=0) != 0
        multiplier = multiplier_tile(w, kept, in_b, on_pruned, SOFT)
    grad = load_pointer(table, row, 4, WIDTH, WEIGHT) + offsets
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    grad_w = masked_gradient(multiplier, g)
    tl.store(grad, grad_w.to(WEIGHT), mask=inside)

    if SOFT or STEP:
        terms = step_terms(reach, g) if STEP else times_sign(w, grad_w)
        sums += tl.load(table + row * WIDTH + 13)
        if PER_BLOCK:
            terms = tl.sum(tl.reshape(terms, [TILE, TILE // SUM_COLUMNS, SUM_COLUMNS]), axis=2)
            o_s = tile % tiles_k * (TILE // SUM_COLUMNS) + tl.arange(0, TILE // SUM_COLUMNS)
            in_s = (o_n < N)[:, None] & (o_s * SUM_COLUMNS < K)[None, :]
            tl.store(sums + o_s[None, :] * N + o_n[:, None], terms, mask=in_s)
        else:
            tl.store(sums + tile % tiles_k * N + o_n, tl.sum(terms, axis=1), mask=o_n < N)


@triton.jit
def _sum_thresholds_kernel(  # type: ignore[no-untyped-def]
    grad_thresholds,
    sums,
    table,
    threshold_of,
    first_threshold,
    SOFT: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    SUM_TILE: tl.constexpr,
):
    # One element of one threshold: rows x parts terms, `parts` of them a row.
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(threshold_of + program).to(tl.int64)
    element = program - tl.load(first_threshold + row)
    N = tl.load(table + row * WIDTH + 7)
    K = tl.load(table + row * WIDTH + 8)
    if PER_BLOCK:
        rows = tl.load(table + row * WIDTH + 11)
        parts = tl.load(table + row * WIDTH + 12) // SUM_COLUMNS
        columns = K // SUM_COLUMNS // parts
        first_row = element // columns * rows
        first_part = element % columns * parts
    else:
        elements = tl.load(first_threshold + row + 1) - tl.load(first_threshold + row)
        rows = N // elements
        parts = tl.cdiv(K, TILE)
        first_row = element * rows
        first_part = element * 0
    sums += tl.load(table + row * WIDTH + 13)
    total = tl.zeros([SUM_TILE], dtype=tl.float32)
    for start in range(0, rows * parts, SUM_TILE):
        o = start + tl.arange(0, SUM_TILE)
        offsets = (first_part + o // rows) * N + first_row + o % rows
        total += tl.load(sums + offsets, mask=o < rows * parts, other=0.0)
    result = tl.sum(total)
    if SOFT:
        s = tl.load(tl.load(table + row * WIDTH + 2).to(tl.pointer_type(tl.float32)) + element)
        result = times_slope(s, result)
    tl.store(grad_thresholds + program, result)


def backward_many(table: ViewTable, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Multiply every layer's dense gradient by its multiplier, in place, and return the thresholds' gradients.

    The multiplier is linear in the gradient: apply it once to the sum over micro-batches, after the reduction over
    ranks, before or after unscaling. Clipping that happens before sees the dense gradients' norm. Can be captured in a
    CUDA graph after one call on the same gradients, if they stay where they are.

    Args:
        table: the layers' views.
        grads: one `[N, K]` a layer, the weight's dtype, contiguous; None where a layer has none, which leaves zeros
            for its threshold.

    Returns:
        A tensor of the threshold's shape and dtype a layer; None for kind "mask", zeros for kind "hard".

    Raises:
        ValueError: a gradient does not fit its weight; none has been changed then.
    """
    for layer, grad in zip(table.layers, grads, strict=True):
        if grad is not None:
            weight = layer.weight
            expect(
                grad.shape == weight.shape
                and grad.dtype == weight.dtype
                and grad.device == weight.device
                and grad.is_contiguous(),
                "backward_many",
                f"a contiguous grad of {weight.dtype} {list(weight.shape)} on {weight.device}",
                grad,
                "pass the weight's .grad",
            )
    if table.backend == "torch":
        return backward_many_reference(table.layers, grads)
    results = [_no_gradient(layer) for layer in table.layers]
    for launch in table.launches:
        weight, view = table.layers[launch.layers[0]].weight, table.layers[launch.layers[0]].view
        addresses = [0 if (grad := grads[index]) is None else grad.data_ptr() for index in launch.layers]
        # Static gradients, as in a CUDA graph, are written down once: a capture cannot read the host's memory.
        if addresses != launch.grad_addresses:
            launch.table[:, GRAD] = torch.tensor(addresses, dtype=torch.int64).to(launch.table.device)
            launch.grad_addresses[:] = addresses
        sums = torch.empty(launch.sums, dtype=torch.float32, device=weight.device)
        options = {name: launch.options[name] for name in ("SOFT", "PER_BLOCK")}
        with torch.cuda.device_of(weight):
            _backward_many_kernel[(launch.layer_of.numel(),)](
                sums, launch.table, launch.layer_of, launch.first,
                WEIGHT=triton_dtype(weight.dtype), ALPHA=view.alpha is not None,
                GRAD_MASK=view.grad_mask is not None, STEP=view.kind == "step", **launch.options,
                WIDTH=WIDTH, SUM_COLUMNS=SUM_COLUMNS, TILE=TILE, num_warps=NUM_WARPS,
            )  # fmt: skip
            if launch.sums:
                elements = torch.empty(launch.threshold_of.numel(), dtype=torch.float32, device=weight.device)
                _sum_thresholds_kernel[(elements.numel(),)](
                    elements, sums, launch.table, launch.threshold_of, launch.first_threshold, **options,
                    WIDTH=WIDTH, SUM_COLUMNS=SUM_COLUMNS, TILE=TILE, SUM_TILE=SUM_TILE, num_warps=NUM_WARPS,
                )  # fmt: skip
                start = 0
                for index in launch.layers:
                    threshold = table.layers[index].view.threshold
                    assert threshold is not None  # launch.sums
                    results[index] = elements[start : start + threshold.numel()].view(threshold.shape)
                    start += threshold.numel()
    return results
