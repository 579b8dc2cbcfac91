"""Where structured zeros make a layer's products faster than dense, from measurement alone.

`plan_table.json` holds under "blocks" what `benchmarks/make_plan_table.py` found in results of `bench_block.py`: for a
layer, a block and a device the largest density at which forward, dX and dW together, the rewriting of the index
included, took less time than the dense library products did in the same run. Under "semi_structured" it holds, in the
same way, whether a layer's 2:4 forward (`semi_structured.py`), compression included, was faster at every number of
tokens measured. What was not measured is not claimed to be faster than dense: without an entry there is no break-even.
"""

# N, K rows and columns of the weight as a matrix, outputs by inputs

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import torch

from .plan import device_key

__all__ = ["block_choice", "break_even", "read_block_table", "read_semi_structured_table", "semi_structured_choice"]

FIELDS = ("device", "n", "k", "rows", "columns", "dtype", "max_density")
SEMI_STRUCTURED_FIELDS = ("device", "n", "k", "dtype", "faster")


@functools.cache
def read_block_table() -> tuple[dict[str, Any], ...]:
    """The measurements of blocks that this package came with, checked.

    Raises:
        ValueError: an entry lacks a field; the file was not made by `benchmarks/make_plan_table.py`.
    """
    return _read("read_block_table", "blocks", FIELDS)


@functools.cache
def read_semi_structured_table() -> tuple[dict[str, Any], ...]:
    """The measurements of 2:4 products that this package came with; raises as `read_block_table`."""
    return _read("read_semi_structured_table", "semi_structured", SEMI_STRUCTURED_FIELDS)


def _read(function: str, part: str, fields: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    text = resources.files(__package__).joinpath("plan_table.json").read_text(encoding="utf-8")
    entries = tuple(json.loads(text)[part])
    for entry in entries:
        if set(entry) != set(fields):
            raise ValueError(
                f"{function}: expected entries of plan_table.json to have the fields {', '.join(fields)}, got "
                f"{', '.join(entry)}; make the file with benchmarks/make_plan_table.py"
            )
    return entries


def break_even(
    n: int,
    k: int,
    block: tuple[int, int],
    dtype: torch.dtype,
    device_name: str,
    *,
    table: tuple[dict[str, Any], ...] | None = None,
) -> float | None:
    """The largest density at which skipping blocks was measured faster than dense; None if it was not measured.

    Args:
        n, k: outputs and inputs of the layer.
        block: rows and columns of a block of the matrix [n, k].
        dtype: of the products.
        device_name: as `torch.cuda.get_device_name()` gives it.
        table: entries to use instead of the packaged ones.

    Returns:
        A density in [0, 1]: 0 where it was measured and never faster.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.measured import break_even
        >>> print(break_even(4096, 4096, (128, 128), torch.bfloat16, "a GPU nobody measured"))
        None
    """
    key = {
        "device": device_key(device_name), "n": n, "k": k, "rows": block[0], "columns": block[1],
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    for entry in read_block_table() if table is None else table:
        if all(entry[name] == value for name, value in key.items()):
            return float(entry["max_density"])
    return None


def block_choice(
    n: int,
    k: int,
    block: tuple[int, int],
    density: float,
    dtype: torch.dtype,
    device_name: str,
    *,
    table: tuple[dict[str, Any], ...] | None = None,
) -> tuple[bool, str]:
    """Whether `auto` skips blocks, and why, in a sentence for the report; arguments as in `break_even`."""
    largest = break_even(n, k, block, dtype, device_name, table=table)
    size = f"{block[0]}x{block[1]} blocks of [{n}, {k}]"
    if largest is None:
        return False, f"auto: {size} not measured on {device_key(device_name)}; backend='block' asks for them"
    if density <= largest:
        return True, f"auto: {size} measured faster than dense up to density {largest:g}, and {density:.2g} is kept"
    return False, f"auto: {size} measured faster than dense up to density {largest:g} only, and {density:.2g} is kept"


def semi_structured_choice(
    n: int, k: int, dtype: torch.dtype, device_name: str, *, table: tuple[dict[str, Any], ...] | None = None
) -> tuple[bool, str]:
    """Whether `auto` multiplies a 2:4 weight [n, k] through the GPU's sparse product, and why, in a sentence."""
    key = {"device": device_key(device_name), "n": n, "k": k, "dtype": str(dtype).removeprefix("torch.")}
    for entry in read_semi_structured_table() if table is None else table:
        if all(entry[name] == value for name, value in key.items()):
            found = "faster than dense" if entry["faster"] else "no faster than dense"
            return bool(entry["faster"]), f"auto: the 2:4 forward of [{n}, {k}] was measured {found}"
    asked = "backend='semi_structured' asks for it"
    return False, f"auto: the 2:4 forward of [{n}, {k}] not measured on {device_key(device_name)}; {asked}"
