"""Keys: integers in the order of floating-point numbers; and many tensors as one list of tiles, read as keys.

    key(w)  = the bits of w, of |w| if `magnitude`, so mapped that key(v) < key(w) where v < w, and key(-0) = key(+0)

Called by `topk.py`, `_select.py` and `masks.py`.
"""
# a tile is 2,048 consecutive elements of one tensor

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .._operands import FLOATS, check_triton_dtype, expect
from .._triton import require, tl, triton

__all__ = [
    "TileTable",
    "check_ranked",
    "key_chunks",
    "launch_constants",
    "load_keys",
    "order_keys",
    "table_of",
    "tile_table",
]

# 16 elements a thread, so four independent 16-byte loads of fp32; with 32 the bracket needs up to 255 registers.
TILE = 2048
NUM_WARPS = 4
# Keys the torch back end computes at a time: 1 MiB of int32 stays in the cache of one core.
CHUNK = 2**18


def order_keys(values: torch.Tensor, *, magnitude: bool) -> torch.Tensor:
    """Integers in the order of `values`: int64 for float64, else int32 (float16 and bfloat16 as float32, exactly).

    Args:
        values: any shape, floating point.
        magnitude: order by |values|, which is the bits without the sign.
    """
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = (values if integer == torch.int64 else values.float()).view(integer)
    all_but_sign = torch.iinfo(integer).max
    if magnitude:
        return bits & all_but_sign
    # A negative number's bits grow with its magnitude. The key -1 is that of -0, which ties with +0.
    keys = bits ^ (bits >> (torch.iinfo(integer).bits - 1) & all_but_sign)
    return keys.masked_fill_(keys == -1, 0)


def key_chunks(tensors: Sequence[torch.Tensor], magnitude: bool, step: int = 1) -> Iterator[torch.Tensor]:
    """Keys of all tensors, or of every `step`-th element of each, in order and in pieces; of one dtype."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    for tensor in tensors:
        for values in tensor.detach().reshape(-1)[::step].split(CHUNK):
            yield order_keys(values.double() if double else values, magnitude=magnitude)


def check_ranked(function: str, tensors: Sequence[torch.Tensor], backend: str) -> None:
    """Refuse tensors that cannot be ranked together, or not by this back end."""
    if backend not in ("torch", "triton"):
        raise ValueError(f'{function}: expected backend "torch" or "triton", got {backend!r}; pass either')
    if not tensors:
        raise ValueError(
            f"{function}: expected at least one tensor, got none; pass an empty one where a rank has nothing"
        )
    for tensor in tensors:
        if tensor.dtype not in FLOATS or tensor.device != tensors[0].device:
            raise ValueError(
                f"{function}: expected floating-point tensors on one device, got {tensor.dtype} on {tensor.device} "
                f"beside {tensors[0].dtype} on {tensors[0].device}; cast or move it"
            )
        check_triton_dtype(function, "every tensor", tensor.dtype, backend)
        if backend == "triton" and tensor.dtype != tensors[0].dtype:
            raise ValueError(
                f'{function}: expected tensors of one dtype for backend="triton", got {tensors[0].dtype} and '
                f'{tensor.dtype}; cast them to float32, which is exact, or pass backend="torch"'
            )
    if backend == "triton":
        require(function, tensors[0])


class TileTable(NamedTuple):
    """Where the tiles of a list of tensors lie; valid while they and their masks keep their memory.

    Attributes:
        addresses: `[tiles]`, int64, of each tile's first element.
        masks: `[tiles]`, int64, of the same element of the mask; empty without masks.
        sizes: `[tiles]`, int32, elements of each tile: 2,048, or fewer at the end of a tensor.
        dtype: of the tensors.
        aligned: every tile begins at a multiple of 16 bytes.
        owners: the tensors, then the masks.
    """

    addresses: torch.Tensor
    masks: torch.Tensor
    sizes: torch.Tensor
    dtype: torch.dtype
    aligned: bool
    owners: tuple[torch.Tensor, ...]


def tile_table(tensors: Sequence[torch.Tensor], masks: Sequence[torch.Tensor] = ()) -> TileTable:
    """The tiles of `tensors`, in their order, and of the `masks` that `cutoff_masks` is to write, if any.

    Args:
        tensors: contiguous, of one dtype and on one device.
        masks: bool, contiguous, one of each tensor's shape.

    Raises:
        ValueError: a tensor is not contiguous.
    """
    for tensor in (*tensors, *masks):
        expect(tensor.is_contiguous(), "tile_table", "contiguous tensors", tensor, "copy it first")
    device, itemsize = tensors[0].device, tensors[0].element_size()

    def addresses(of: Sequence[torch.Tensor], bytes_each: int) -> torch.Tensor:
        spans = [(each.data_ptr(), each.data_ptr() + each.numel() * bytes_each) for each in of]
        firsts = [torch.arange(first, end, TILE * bytes_each, dtype=torch.int64) for first, end in spans]
        # Pageable memory is read before the call returns; the device is not waited for.
        return torch.cat([torch.empty(0, dtype=torch.int64), *firsts]).to(device, non_blocking=True)

    left = torch.cat([torch.arange(tensor.numel(), 0, -TILE) for tensor in tensors])
    return TileTable(
        addresses(tensors, itemsize),
        addresses(masks, 1),
        left.clamp(max=TILE).to(torch.int32).to(device, non_blocking=True),
        tensors[0].dtype,
        all(each.data_ptr() % 16 == 0 for each in (*tensors, *masks)),
        tuple(each.detach() for each in (*tensors, *masks)),
    )


def table_of(
    function: str, table: TileTable | None, tensors: Sequence[torch.Tensor], masks: Sequence[torch.Tensor] = ()
) -> TileTable:
    """`table`, refused where it is of others; where it is None a new one, of copies of what is not contiguous."""
    if table is None:
        return tile_table([tensor.contiguous() for tensor in tensors], masks)
    given = [(each.data_ptr(), each.numel()) for each in (*tensors, *masks)]
    if [(each.data_ptr(), each.numel()) for each in table.owners][: len(given)] != given:
        raise ValueError(f"{function}: expected the table of these tensors and masks, got that of others; make it anew")
    return table


@triton.jit
def load_keys(  # type: ignore[no-untyped-def]
    addresses,
    sizes,
    i_tile,
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Keys of a tile `[TILE]`, uint32, those of `order_keys` plus 2^31; which are elements; which of these are NaN."""
    values = tl.load(addresses + i_tile).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        values = tl.multiple_of(values, 16)
    offsets = tl.arange(0, TILE)
    size = tl.load(sizes + i_tile)
    inside = offsets < size
    # [TILE]; a bound that may be any number would split every load into single elements, which only a last tile pays.
    if size == TILE:  # noqa: SIM108
        value = tl.load(values + offsets)
    else:
        value = tl.load(values + offsets, mask=inside, other=0.0)
    bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
    nan = inside & ((bits & 0x7FFFFFFF) > 0x7F800000)
    if MAGNITUDE:
        keys = bits | 0x80000000
    else:
        # -0 ties with +0.
        bits = tl.where(bits == 0x80000000, 0, bits)
        keys = tl.where(bits < 0x80000000, bits | 0x80000000, bits ^ 0xFFFFFFFF)
    return keys, inside, nan


def launch_constants(table: TileTable, magnitude: bool) -> dict[str, object]:
    """Compile-time arguments of a kernel that reads `table`."""
    dtype = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[table.dtype]
    return {"DTYPE": dtype, "MAGNITUDE": magnitude, "ALIGNED": table.aligned, "TILE": TILE, "num_warps": NUM_WARPS}
