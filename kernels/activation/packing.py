"""What a layer keeps of its input, and packing it: the part of SWAT that linear layers and convolutions share.

    X_hat = X where not |X| < T, in rows that count      T given, or the exact k-th magnitude (`cutoff.py`)

The values of X_hat lie in a buffer of ceil(slack density n) of the n elements of X. If a cut-off remembered from other
batches keeps more, X is packed again into as many as it takes: the numbers never depend on the capacity, and `overflow`
says that the memory was not what was asked for. Called by `linear.py` and `conv2d.py`.
"""
# M rows of x (tokens, or planes of a convolution)   K columns

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

import torch
from torch import Tensor

from .._operands import compute_dtype, refuse
from .compress import pack_activation
from .cutoff import SCOPES, activation_cutoff, check_density

__all__ = ["PackedInput", "Packing", "check_packing", "fake_packed", "pack_input"]


@dataclass(frozen=True)
class Packing:
    """What of an input x the weight's gradient sees, and how much room that gets.

    Attributes:
        density: in (0, 1], the fraction of x that is kept; of the counted rows' elements.
        scope: "batch", "sample" or "plane": what a fresh cut-off is the k-th magnitude of (`activation_cutoff`).
        slack: at least 1; room for slack density of x. math.inf: for all of it, which spares the only host sync.
        cutoff: T, `[1]`, or `[M]` for one a row, float32 (float64 beside a float64 x): as an earlier call returned it.
            None = the exact k-th magnitude of this x, k = max(1, round-half-up(density n)).
        row_mask: bool, the leading dimensions of x (`[B, C]` of a convolution), True = counted; None = all. Other rows,
            padding, count neither for T nor for the weight's gradient; every other result sees every row.

    Raises:
        ValueError: density, scope or slack is unknown or out of range.
    """

    density: float
    scope: str = "batch"
    slack: float = 1.25
    cutoff: Tensor | None = None
    row_mask: Tensor | None = None

    def __post_init__(self) -> None:
        check_density("Packing", self.density)
        if self.scope not in SCOPES:
            raise ValueError(f'Packing: expected scope "batch", "sample" or "plane", got {self.scope!r}; pass one')
        if not self.slack >= 1:
            raise ValueError(
                f"Packing: expected slack of at least 1, got {self.slack!r}; pass 1.25 for a quarter more room"
            )

    @property
    def share(self) -> Decimal:
        """The part of x's elements that the buffer holds, in exact decimal arithmetic."""
        return min(Decimal(1), Decimal(str(self.density)) * Decimal(str(self.slack)))


class PackedInput(NamedTuple):
    """X_hat as `compress.py` packs it, and what came of the packing.

    Attributes:
        bits, values, row_offsets: as `pack_activation` returns them; every kept value is there.
        fresh: T where it was computed here; empty where it was given.
        overflow: 0-dim bool on the CPU: the values took more than their share, and a second packing.
    """

    bits: Tensor
    values: Tensor
    row_offsets: Tensor
    fresh: Tensor
    overflow: Tensor


def check_packing(function: str, packing: Packing, leading: torch.Size, x: Tensor) -> None:
    """Refuse a cut-off or a row mask that does not fit x, whose rows lie in dimensions `leading`."""
    cutoff, row_mask = packing.cutoff, packing.row_mask
    if cutoff is not None:
        rows = math.prod(leading)
        if not (
            cutoff.shape in ((1,), (rows,))
            and cutoff.dtype in (torch.float32, compute_dtype(x))
            and cutoff.device == x.device
        ):
            expected = f"cutoff to be float32 [1] or [{rows}] on {x.device}"
            remedy = 'remember one for the batch, or leave it out with scope "sample" and "plane"'
            refuse(function, expected, cutoff, remedy)
    if row_mask is not None and not (
        row_mask.shape == leading and row_mask.dtype == torch.bool and row_mask.device == x.device
    ):
        expected = f"row_mask to be bool {list(leading)} on {x.device}"
        refuse(function, expected, row_mask, "make it True for rows that count, in the leading dimensions of x")


def pack_input(function: str, x: Tensor, packing: Packing, backend: str) -> PackedInput:
    """Pack x `[..., K]`, again where it keeps more than its share; `check_packing` has passed.

    Reads once, unless the share is all of x, whether everything fitted: the one host sync.

    Raises:
        RuntimeError: under CUDA graph capture, where that cannot be read.
    """
    share, cutoff, row_mask = packing.share, packing.cutoff, packing.row_mask
    # Refused before anything is recorded: a read inside a capture would end it with CUDA's own error.
    if (share < 1 or backend == "torch") and x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f'{function}: expected backend "triton" and slack * density >= 1 under CUDA graph capture, where no '
            f'overflow can be read, got backend "{backend}" and {share} of x; pass slack=math.inf'
        )
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    fresh = x.new_empty(0, dtype=compute_dtype(x))
    if cutoff is None:
        cutoff = fresh = activation_cutoff(x, packing.density, packing.scope, row_mask, backend)
    counted = None if row_mask is None else row_mask.flatten()
    capacity = max(1, math.ceil(share * rows.numel()))
    bits, values, row_offsets, flag = pack_activation(rows, cutoff, counted, capacity, backend)
    overflow = share < 1 and bool(flag)
    if overflow:
        values = pack_activation(rows, cutoff, counted, int(row_offsets[-1]), backend)[1]
    return PackedInput(bits, values, row_offsets, fresh, torch.tensor(overflow))


def fake_packed(rows: int, k: int, x: Tensor, packing: Packing) -> PackedInput:
    """The shapes of `pack_input`'s result for torch.library's fakes; that of `values` may be known only at run time."""
    fresh = 0 if packing.cutoff is not None else 1 if packing.scope == "batch" else rows
    capacity = rows * k if packing.share == 1 else torch.library.get_ctx().new_dynamic_size()
    return PackedInput(
        x.new_empty((rows, (k + 31) // 32), dtype=torch.int32),
        x.new_empty(capacity),
        x.new_empty(rows + 1, dtype=torch.int64),
        x.new_empty(fresh, dtype=compute_dtype(x)),
        torch.empty((), dtype=torch.bool, device="cpu"),
    )
