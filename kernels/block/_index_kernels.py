"""The three launches that make the indices of all layers (`topology.py`) from their flags.

    count    a tile of flags counts its kept blocks along both axes
    scan     one program a layer and axis: the kept blocks before each tile's line, and where each line starts
    write    a tile of flags writes its entries, and the order of its lines where it lies on an edge

In the order of rows the line (row, tile of columns) follows the one of the tile before, so one running sum serves the
lines' starts and the tiles' shares of a line. A pruned block writes a zero behind the kept ones: every entry has
exactly one writer, so nothing is cleared first and no order of programs matters.
"""
# R, C: rows and columns of blocks of one layer. A program of count and write is one tile of one layer's flags.

from __future__ import annotations

from .._triton import tl, triton

__all__ = ["NUM_WARPS", "SCAN_TILE", "TILE", "WIDTH", "count_kernel", "scan_kernel", "write_kernel"]

# Flags of a tile's side, entries that a scan takes at once, and warps of every kernel here.
TILE = 32
SCAN_TILE = 1024
NUM_WARPS = 4
# A layer's row of the table: addresses, sizes, and where its sums start in the scratch memory.
COLUMNS = ("flags", "index", "r", "c", "row_sums", "column_sums")
WIDTH = len(COLUMNS)


@triton.jit
def _load_tile(table, layer_of, first, WIDTH: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The layer's row of the table, the flags of this program's tile and where they are."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(layer_of + program).to(tl.int64) * WIDTH
    tile = program - tl.load(first + tl.load(layer_of + program))
    R, C = tl.load(row + 2), tl.load(row + 3)
    tiles_c = tl.cdiv(C, TILE)
    i_r, i_c = tile // tiles_c, tile % tiles_c
    o_r, o_c = i_r * TILE + tl.arange(0, TILE), i_c * TILE + tl.arange(0, TILE)
    inside = (o_r < R)[:, None] & (o_c < C)[None, :]
    p_flags = tl.load(row).to(tl.pointer_type(tl.int8)) + o_r[:, None] * C + o_c[None, :]
    kept = (tl.load(p_flags, mask=inside, other=0) != 0).to(tl.int32)
    return row, R, C, i_r, i_c, o_r, o_c, kept


@triton.jit
def count_kernel(sums, table, layer_of, first, WIDTH: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row, R, C, i_r, i_c, o_r, o_c, kept = _load_tile(table, layer_of, first, WIDTH, TILE)
    p_rows = sums + tl.load(row + 4) + o_r * tl.cdiv(C, TILE) + i_c
    p_columns = sums + tl.load(row + 5) + o_c * tl.cdiv(R, TILE) + i_r
    tl.store(p_rows, tl.sum(kept, axis=1), mask=o_r < R)
    tl.store(p_columns, tl.sum(kept, axis=0), mask=o_c < C)


@triton.jit
def scan_kernel(  # type: ignore[no-untyped-def]
    before, sums, table, WIDTH: tl.constexpr, TILE: tl.constexpr, SCAN_TILE: tl.constexpr
):
    """Sums of one layer along one axis, in the order of its entries, to the sum of all before each."""
    program = tl.program_id(0).to(tl.int64)
    row = table + program // 2 * WIDTH
    R, C = tl.load(row + 2), tl.load(row + 3)
    p_start = tl.load(row + 1).to(tl.pointer_type(tl.int32))
    lines, tiles = R, tl.cdiv(C, TILE)
    if program % 2 == 1:
        lines, tiles = C, tl.cdiv(R, TILE)
        p_start += R + 1 + R * C + 1
    offset = tl.load(row + 4 + program % 2)
    total = tl.sum(tl.zeros((2,), dtype=tl.int32))
    for i in range(tl.cdiv(lines * tiles, SCAN_TILE)):
        o_sum = i * SCAN_TILE + tl.arange(0, SCAN_TILE).to(tl.int64)
        inside = o_sum < lines * tiles
        part = tl.load(sums + offset + o_sum, mask=inside, other=0)
        earlier = total + tl.cumsum(part) - part
        tl.store(before + offset + o_sum, earlier, mask=inside)
        tl.store(p_start + o_sum // tiles, earlier, mask=inside & (o_sum % tiles == 0))
        total += tl.sum(part)
    tl.store(p_start + lines, total)


@triton.jit
def _store_order(order, start, o_line, lines, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a tile's lines stand by falling count: a line's place is how many come before it."""
    mine = tl.load(start + o_line + 1, mask=o_line < lines, other=0)
    mine -= tl.load(start + o_line, mask=o_line < lines, other=0)
    place = tl.zeros((TILE,), dtype=tl.int32)
    for i in range(tl.cdiv(lines, TILE)):
        o_other = i * TILE + tl.arange(0, TILE)
        other = tl.load(start + o_other + 1, mask=o_other < lines, other=0)
        # Below every count: lines that do not exist come before none.
        other = tl.where(o_other < lines, other - tl.load(start + o_other, mask=o_other < lines, other=0), -1)
        tied = (other[None, :] == mine[:, None]) & (o_other[None, :] < o_line[:, None])
        place += tl.sum(((other[None, :] > mine[:, None]) | tied).to(tl.int32), axis=1)
    tl.store(order + place, o_line.to(tl.int32), mask=o_line < lines)


@triton.jit
def write_kernel(  # type: ignore[no-untyped-def]
    before, table, layer_of, first, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    row, R, C, i_r, i_c, o_r, o_c, kept = _load_tile(table, layer_of, first, WIDTH, TILE)
    in_r, in_c = o_r < R, o_c < C
    p_row_start = tl.load(row + 1).to(tl.pointer_type(tl.int32))
    p_row_block = p_row_start + R + 1
    p_column_start = p_row_block + R * C + 1
    p_column_block = p_column_start + C + 1
    p_position = p_column_block + R * C + 1
    p_row_order = p_position + R * C + 1

    # [TILE, TILE]: kept blocks before this one, by rows and by columns.
    before_row = tl.load(before + tl.load(row + 4) + o_r * tl.cdiv(C, TILE) + i_c, mask=in_r, other=0)
    before_column = tl.load(before + tl.load(row + 5) + o_c * tl.cdiv(R, TILE) + i_r, mask=in_c, other=0)
    by_rows = before_row[:, None] + tl.cumsum(kept, axis=1) - kept
    by_columns = before_column[None, :] + tl.cumsum(kept, axis=0) - kept

    # A pruned block has as many pruned ones before it as there are places less kept ones before it.
    is_kept, inside = kept != 0, in_r[:, None] & in_c[None, :]
    total = tl.load(p_row_start + R)
    place = tl.where(is_kept, by_rows, total + o_r[:, None] * C + o_c[None, :] - by_rows)
    tl.store(p_row_block + place, tl.where(is_kept, o_c[None, :], 0).to(tl.int32), mask=inside)
    place = tl.where(is_kept, by_columns, total + o_c[None, :] * R + o_r[:, None] - by_columns)
    tl.store(p_column_block + place, tl.where(is_kept, o_r[:, None], 0).to(tl.int32), mask=inside)
    tl.store(p_position + place, tl.where(is_kept, by_rows, 0), mask=inside)

    if i_c == 0:
        _store_order(p_row_order, p_row_start, o_r, R, TILE)
    if i_r == 0:
        _store_order(p_row_order + R, p_column_start, o_c, C, TILE)
    if i_r + i_c == 0:
        tl.store(p_row_block + R * C, 0)
        tl.store(p_column_block + R * C, 0)
        tl.store(p_position + R * C, 0)
