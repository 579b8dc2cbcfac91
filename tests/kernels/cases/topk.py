"""Cases of `topk_cutoff` and `cutoff_masks`, which every ring runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonsparse.kernels.select._keys import TILE, order_keys
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.topk import Cutoff, topk_cutoff

from .matrices import pairwise

# Ties, both zeros, infinities, and what is a denormal in float32, float16 or bfloat16.
VALUES = (0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.5, math.inf, -math.inf, 1e-42, -1e-42, 6e-8, -6e-8, 3e38, -3e38)
# Nothing, one element, and either side of one and two tiles; then layers of a model.
SIZES = ((1,), (0, 7), (TILE - 1, 0, TILE), (TILE + 1, 100, 2 * TILE + 3))
LARGE_SIZES = (1, TILE - 1, TILE, TILE + 1, 1000 * 511, 0, 2048 * 2048)


@dataclass(frozen=True)
class Case:
    """Tensors of `sizes`, of which a share is kept.

    Attributes:
        kind: "distinct" numbers, "tied" ones, "pruned" ones of which most are 0, or "bits" at random.
        predicted: the key of a hint; None = no hint.
    """

    sizes: tuple[int, ...]
    kind: str
    share: float
    half: bool = False
    magnitude: bool = True
    predicted: int | None = None

    def __str__(self) -> str:
        flags = [name for name in ("half", "magnitude") if getattr(self, name)]
        hint = [] if self.predicted is None else [f"hint {self.predicted}"]
        return ", ".join((f"{self.share} of {sum(self.sizes)} in {len(self.sizes)}", self.kind, *flags, *hint))

    @property
    def kept(self) -> int:
        return round(self.share * sum(self.sizes))


CASES = [
    Case(**values)
    for values in pairwise(
        sizes=SIZES, kind=("distinct", "tied", "pruned", "bits"), share=(0.0, 0.001, 0.1, 0.5, 1.0), half=(False, True),
        magnitude=(False, True), predicted=(None, 0, 0x3F800000, 2**31 - 1, -(2**31)),
    )
]  # fmt: skip
LARGE = [
    Case(LARGE_SIZES, **values)
    for values in pairwise(
        kind=("distinct", "tied", "pruned"), share=(0.0, 0.01, 0.1, 0.5, 1.0), half=(False, True),
        magnitude=(False, True), predicted=(None, 0x3F800000),
    )
]  # fmt: skip


def hinted(key: int | None, device: str = "cpu") -> Cutoff | None:
    """A hint of which only the key is known."""
    if key is None:
        return None
    none = torch.tensor(0, device=device)
    return Cutoff(torch.tensor(key, device=device), none, none, none, none)


def tensors(case: Case, half: torch.dtype = torch.float16, device: str = "cpu") -> list[Tensor]:
    random = torch.Generator(device).manual_seed(0)
    made = []
    for size in case.sizes:
        values = torch.randn(size, generator=random, device=device)
        if case.kind == "tied":
            values = values.mul(2).round()
        elif case.kind == "pruned":
            values = values.where(torch.rand(size, generator=random, device=device) < 0.05, 0.0)
        elif case.kind == "bits":
            bits = torch.randint(-(2**31), 2**31, (size,), generator=random, device=device).to(torch.int32)
            values = bits.view(torch.float32).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
        made.append(values.to(half if case.half else torch.float32))
    return made


def assert_cuts(
    of: Sequence[Tensor], kept: int, magnitude: bool, backend: str = "torch", hint: Cutoff | None = None
) -> Cutoff:
    """Cut-off and masks are the head of a stable descending sort of the flat values."""
    cutoff = topk_cutoff(of, kept, magnitude=magnitude, hint=hint, backend=backend)
    values = torch.cat([tensor.reshape(-1).double() for tensor in of])
    order = (values.abs() if magnitude else values).argsort(descending=True, stable=True)
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[order[:kept]] = True
    keys = order_keys(torch.cat([tensor.reshape(-1) for tensor in of]), magnitude=magnitude)
    assert all(field.dtype == torch.int64 and field.shape == () for field in cutoff)
    assert cutoff.nans == 0 and cutoff.total == values.numel()
    assert cutoff.above == (keys > cutoff.key).sum() and cutoff.above + cutoff.ties_kept == kept
    assert cutoff.key == (keys[mask].min() if kept else torch.iinfo(keys.dtype).max)
    written = cutoff_masks(of, cutoff, magnitude=magnitude, backend=backend)
    parts = mask.split([tensor.numel() for tensor in of])
    for ours, part, tensor in zip(written, parts, of, strict=True):
        assert ours.dtype == torch.bool and torch.equal(ours, part.view(tensor.shape))
    return cutoff
