"""The int32 index of kept blocks that the block-sparse products walk, and how it is built from flags.

    flags[R, C]  ->  index = row_start[R+1] | row_block[RC+1] | column_start[C+1] | column_block[RC+1]
                             | column_position[RC+1] | row_order[R] | column_order[C]          int32

A weight [N, K] is cut into blocks of r x c, R = ceil(N/r) rows of them and C = ceil(K/c) columns; flags say which are
kept. The kept blocks of row i are row_block[row_start[i] : row_start[i+1]], ascending, and those of column j lie in
column_block in the same way; column_position says where each of these stands in row_block, which is where packed
values lie. The orders are rows and columns by falling number of kept blocks, ties to the lowest: longest first, work
items that are taken in turn end together. Entries beyond the number kept are 0, and there is always one: products read
an entry ahead.

The size is that of the full matrix, so a topology that moves changes no shape, no launch and no captured graph. All
layers are rewritten by the three launches of `_index_kernels.py`; nothing waits for the host.
"""
# R, C: rows and columns of blocks of one layer

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._operands import expect, refuse
from .._triton import require
from ._index_kernels import NUM_WARPS, SCAN_TILE, TILE, WIDTH, count_kernel, scan_kernel, write_kernel

__all__ = [
    "IndexTable",
    "Sections",
    "build_index_reference",
    "build_indices",
    "check_index",
    "empty_index",
    "flags_of",
    "index_size",
    "sections",
]

# Sets of layers whose tables `build_indices` keeps.
TABLES = 32


class Sections(NamedTuple):
    """Views of one index, in the order in which they lie; int32."""

    row_start: Tensor
    row_block: Tensor
    column_start: Tensor
    column_block: Tensor
    column_position: Tensor
    row_order: Tensor
    column_order: Tensor


def _section_sizes(rows: int, columns: int) -> tuple[int, ...]:
    blocks = rows * columns + 1
    return rows + 1, blocks, columns + 1, blocks, blocks, rows, columns


def index_size(rows: int, columns: int) -> int:
    """Elements of the index of `rows` x `columns` blocks, whatever is kept.

    Example:
        >>> from tritonsparse.kernels.block.topology import index_size
        >>> index_size(1, 2)
        17
    """
    return sum(_section_sizes(rows, columns))


def sections(index: Tensor, rows: int, columns: int) -> Sections:
    """The parts of an index, as views.

    Args:
        index: `[index_size(rows, columns)]`, int32.
        rows, columns: of blocks, R and C.

    Raises:
        ValueError: the index has another shape or dtype.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.topology import build_index_reference, sections
        >>> index = build_index_reference(torch.tensor([[False, True], [True, True]]))
        >>> parts = sections(index, 2, 2)
        >>> parts.row_start.tolist(), parts.row_block.tolist(), parts.row_order.tolist()
        ([0, 1, 3], [1, 0, 1, 0, 0], [1, 0])
        >>> parts.column_start.tolist(), parts.column_block.tolist(), parts.column_position.tolist()
        ([0, 1, 3], [1, 0, 1, 0, 0], [1, 0, 2, 0, 0])
    """
    check_index("sections", index, rows, columns)
    return Sections(*index.split(_section_sizes(rows, columns)))


def empty_index(flags: Tensor) -> Tensor:
    """Memory for the index of flags `[R, C]`, on their device; not written."""
    return torch.empty(index_size(*flags.shape), dtype=torch.int32, device=flags.device)


def check_index(function: str, index: Tensor, rows: int, columns: int) -> None:
    """Refuse what is no index of `rows` x `columns` blocks."""
    size = index_size(rows, columns)
    if not (index.shape == (size,) and index.dtype == torch.int32 and index.is_contiguous()):
        refuse(
            function,
            f"index to be contiguous int32 [{size}], that of {rows} x {columns} blocks",
            index,
            "allocate index_size(R, C) elements, R = ceil(N/r) and C = ceil(K/c)",
        )


def build_index_reference(flags: Tensor) -> Tensor:
    """The definition of an index, of flags `[R, C]`, bool, on any device. Waits for the host."""
    blocks = flags.numel() + 1
    row_block, column_block = flags.nonzero()[:, 1], flags.t().nonzero()[:, 1]
    position = flags.flatten().cumsum(0).view_as(flags) - 1
    per_row, per_column = flags.sum(1), flags.sum(0)
    parts = Sections(
        F.pad(per_row.cumsum(0), (1, 0)),
        F.pad(row_block, (0, blocks - row_block.numel())),
        F.pad(per_column.cumsum(0), (1, 0)),
        F.pad(column_block, (0, blocks - column_block.numel())),
        F.pad(position.t()[flags.t()], (0, blocks - column_block.numel())),
        per_row.argsort(descending=True, stable=True),
        per_column.argsort(descending=True, stable=True),
    )
    return torch.cat(parts).to(torch.int32)


def flags_of(index: Tensor, rows: int, columns: int) -> Tensor | None:
    """The flags that an index was built from; None where it is none that `build_index_reference` makes.

    Reads all of it, so that a damaged one leads no kernel out of its tensors.

    Args:
        index: any tensor.
        rows, columns: of blocks, R and C.
    """
    if index.dtype != torch.int32 or index.shape != (index_size(rows, columns),):
        return None
    parts = sections(index, rows, columns)
    start = parts.row_start.long()
    count = int(start[-1])
    if int(start[0]) != 0 or count > rows * columns or bool((start.diff() < 0).any()):
        return None
    block = parts.row_block[:count].long()
    if bool(((block < 0) | (block >= columns)).any()):
        return None
    flags = torch.zeros((rows, columns), dtype=torch.bool, device=index.device)
    row = torch.repeat_interleave(torch.arange(rows, device=index.device), start.diff())
    flags[row, block] = True
    return flags if torch.equal(build_index_reference(flags), index) else None


def build_indices_reference(flags: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """The definition of `build_indices`: `build_index_reference`, layer by layer."""
    for one, index in zip(flags, indices, strict=True):
        index.copy_(build_index_reference(one))


class Addresses(NamedTuple):
    """What the launches read of the layers, on the device.

    Attributes:
        table: `[layers, WIDTH]`, int64.
        layer_of: `[tiles]`, int32, the layer of each tile of flags.
        first: `[layers + 1]`, int64, the first tile of each layer.
        sums: elements of scratch memory that hold the tiles' sums.
    """

    table: Tensor
    layer_of: Tensor
    first: Tensor
    sums: int


def _addresses(device: torch.device, layers: tuple[tuple[int, int, int, int], ...]) -> Addresses:
    """The table of layers given by the addresses of their flags and index, R and C."""
    rows, layer_of, first, sums = [], [], [0], 0
    for position, (flags, index, r, c) in enumerate(layers):
        tiles_r, tiles_c = -(-r // TILE), -(-c // TILE)
        rows.append([flags, index, r, c, sums, sums + r * tiles_c])
        sums += r * tiles_c + c * tiles_r
        layer_of += [position] * (tiles_r * tiles_c)
        first.append(len(layer_of))
    return Addresses(
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(layer_of, dtype=torch.int32, device=device),
        torch.tensor(first, dtype=torch.int64, device=device),
        sums,
    )


_remembered_addresses = functools.lru_cache(TABLES)(_addresses)


def _layers(flags: Sequence[Tensor], indices: Sequence[Tensor]) -> tuple[tuple[int, int, int, int], ...]:
    return tuple((f.data_ptr(), i.data_ptr(), *f.shape) for f, i in zip(flags, indices, strict=True))


def _launch(addresses: Addresses) -> None:
    table, layer_of, first, _ = addresses
    sums, before = torch.empty(2, addresses.sums, dtype=torch.int32, device=table.device)
    tiles = {"WIDTH": WIDTH, "TILE": TILE, "num_warps": NUM_WARPS}
    with torch.cuda.device_of(table):
        count_kernel[(layer_of.numel(),)](sums, table, layer_of, first, **tiles)
        scan_kernel[(2 * table.shape[0],)](before, sums, table, SCAN_TILE=SCAN_TILE, **tiles)
        write_kernel[(layer_of.numel(),)](before, table, layer_of, first, **tiles)


def _check_layers(function: str, flags: Sequence[Tensor], indices: Sequence[Tensor], backend: str) -> None:
    if backend not in ("torch", "triton"):
        raise ValueError(f'{function}: expected backend "torch" or "triton", got {backend!r}; pass either')
    if len(flags) != len(indices):
        raise ValueError(
            f"{function}: expected one index for each layer's flags, got {len(flags)} flags and {len(indices)} "
            f"indices; pass them layer by layer"
        )
    for one, index in zip(flags, indices, strict=True):
        expect(
            one.dim() == 2 and one.dtype == torch.bool and one.is_contiguous() and one.numel() > 0,
            function,
            "flags to be contiguous bool [R, C] with at least one block",
            one,
            "pass what block_flags returns, and leave out weights without elements",
        )
        check_index(function, index, *one.shape)
        expect(
            one.device == index.device == flags[0].device,
            function,
            f"all flags and indices on {flags[0].device}",
            index,
            "make one call for each device",
        )
    if backend == "triton" and flags:
        require(function, flags[0])


class IndexTable:
    """The flags and indices of a model's layers, checked, with their addresses in device memory.

    For a CUDA graph: it reads the table whenever it is replayed, so the table must live as long as the graph.

    Args:
        flags, indices, backend: as `build_indices` takes them; the tensors are held.

    Raises:
        ValueError, RuntimeError: as `build_indices`.
    """

    def __init__(self, flags: Sequence[Tensor], indices: Sequence[Tensor], backend: str = "torch") -> None:
        _check_layers("IndexTable", flags, indices, backend)
        self.flags, self.indices = list(flags), list(indices)
        self._addresses: Addresses | None = None
        if backend == "triton" and self.flags:
            self._addresses = _addresses(self.flags[0].device, _layers(flags, indices))

    def build(self) -> None:
        """Rewrite every index from its flags, in place."""
        if self._addresses is None:
            build_indices_reference(self.flags, self.indices)
        else:
            _launch(self._addresses)


def build_indices(flags: Sequence[Tensor], indices: Sequence[Tensor], backend: str = "torch") -> None:
    """Rewrite the indices of all layers from their flags, in place.

    With the Triton back end three launches for all layers, without a host synchronisation from the second call with
    the same tensors on: the first writes their addresses to the device, where those of the last 32 sets of layers are
    kept. In a CUDA graph capture an `IndexTable`, which keeps its own.

    Args:
        flags: `[R, C]`, bool, contiguous, for each layer, True = kept; on one device.
        indices: `[index_size(R, C)]`, int32, contiguous, for each layer; overwritten whole.
        backend: "torch" (the reference, layer by layer, any device) or "triton" (a GPU, or the interpreter).

    Raises:
        ValueError: lengths, shapes, dtypes or devices do not fit together, or a layer has no block.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.topology import build_indices, index_size, sections
        >>> flags, index = torch.tensor([[True, False, True]]), torch.empty(index_size(1, 3), dtype=torch.int32)
        >>> build_indices([flags], [index])
        >>> sections(index, 1, 3).row_block.tolist()
        [0, 2, 0, 0]
    """
    _check_layers("build_indices", flags, indices, backend)
    if backend == "torch":
        build_indices_reference(flags, indices)
    elif flags:
        _launch(_remembered_addresses(flags[0].device, _layers(flags, indices)))
