"""Cases of `topk_cutoff` with `cutoff_masks`, and of `n_of_m_mask`, which every ring runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tritonsparse.kernels.select import _keys, _select, masks, topk
from tritonsparse.kernels.select._keys import TILE, order_keys
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.n_of_m import n_of_m_mask
from tritonsparse.kernels.select.topk import Cutoff, topk_cutoff

from .matrices import Readable, laid_out, pairwise

# Ties, both zeros, infinities, and what is a denormal in float32, float16 or bfloat16.
VALUES = (0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.5, math.inf, -math.inf, 1e-42, -1e-42, 6e-8, -6e-8, 3e38, -3e38)


@dataclass(frozen=True)
class TopK(Readable):
    """Tensors of `sizes`, of which a share is kept.

    `kind`: "distinct", "tied" or "equal" numbers; "pruned": most are 0; "bits" at random; "narrow": all within 1 %.
    `hint`: the key of one, or "near": the cut-off of as many and 7 more. `small`: the elements are many lists, chunks
    and samples. `strided`: transposed, and some begin at a multiple of nothing.
    """

    sizes: tuple[int, ...]
    kind: str
    share: float
    half: bool = False
    magnitude: bool = True
    hint: int | str | None = None
    small: bool = False
    strided: bool = False


# Nothing, one element, and either side of one and two tiles.
SIZES = ((1,), (0, 7), (TILE - 1, 0, TILE), (TILE + 1, 100, 2 * TILE + 3))
HINTS = (None, "near", 0, 0x3F800000, 2**31 - 1, -(2**31))
TOPK = [
    *(
        TopK(**values)
        for values in pairwise(
            sizes=SIZES, kind=("distinct", "tied", "pruned", "bits"), share=(0.0, 0.001, 0.1, 0.5, 1.0), hint=HINTS,
            half=(False, True), magnitude=(False, True), strided=(False, True),
        )
    ),
    *(
        TopK((10_000, 5000, 3), kind, share, magnitude=magnitude, hint=hint, small=True)
        for kind, hint, magnitude in (("distinct", "near", False), ("pruned", None, True), ("narrow", "near", True))
        for share in (0.0, 0.005, 1.0)
    ),
    *(TopK((20_000, 4), "equal", share, small=True) for share in (0.25, 1.0)),
]  # fmt: skip
LARGE_TOPK = [
    TopK((1, TILE - 1, TILE, TILE + 1, 1000 * 511, 0, 2048 * 2048), **values)
    for values in pairwise(
        kind=("distinct", "tied", "pruned"), share=(0.0, 0.01, 0.1, 0.5, 1.0), half=(False, True),
        magnitude=(False, True), hint=(None, "near", 0x3F800000),
    )
]  # fmt: skip


def hinted(key: int, device: str = "cpu") -> Cutoff:
    none = torch.tensor(0, device=device)
    return Cutoff(torch.tensor(key, device=device), none, none, none, none)


def _tensors(case: TopK, half: torch.dtype, device: str) -> list[Tensor]:
    random, made = torch.Generator(device).manual_seed(0), []
    for size in case.sizes:
        values = torch.randn(size, generator=random, device=device)
        bits = torch.randint(-(2**31), 2**31, (size,), generator=random, device=device).to(torch.int32)
        values = {
            "tied": values.mul(2).round(),
            "pruned": values.where(torch.rand(size, generator=random, device=device) < 0.05, 0.0),
            "bits": bits.view(torch.float32).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf),
            "narrow": torch.linspace(1.01, 1.0, size, device=device),
            "equal": torch.full_like(values, -2.0) if size != 4 else values.new_tensor([-3.0, 2.0, 2.01, 1.99]),
        }.get(case.kind, values)
        values = values.to(half if case.half else torch.float32)
        if case.strided:
            values = torch.cat([values[:1], values])[1:] if size % 4 else values.view(4, size // 4).T
        made.append(values)
    return made


def assert_topk(case: TopK, backend: str, half: torch.dtype = torch.float16, device: str = "cpu") -> None:
    with pytest.MonkeyPatch.context() as patch:
        if case.small:
            for module in (_keys, topk, masks):
                patch.setattr(module, "CHUNK", 1000)
            patch.setattr(_select, "SAMPLE_FROM", 1000)
            patch.setattr(_select, "STEP", 3)
        tensors, n = _tensors(case, half, device), sum(case.sizes)
        kept = round(case.share * n)
        hint = None if case.hint is None else hinted(0 if case.hint == "near" else int(case.hint), device)
        if case.hint == "near":
            hint = topk_cutoff(tensors, min(kept + 7, n), magnitude=case.magnitude, backend=backend)
        assert_cuts(tensors, kept, case.magnitude, backend, hint)


def assert_cuts(
    tensors: Sequence[Tensor], kept: int, magnitude: bool, backend: str = "torch", hint: Cutoff | None = None
) -> None:
    """Cut-off and masks are the head of a stable descending sort of the flat values; in every call, bit for bit."""
    cutoff = topk_cutoff(tensors, kept, magnitude=magnitude, hint=hint, backend=backend)
    values = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    order = (values.abs() if magnitude else values).argsort(descending=True, stable=True)
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[order[:kept]] = True
    keys = order_keys(torch.cat([tensor.reshape(-1) for tensor in tensors]), magnitude=magnitude)
    assert all(field.dtype == torch.int64 and field.shape == () for field in cutoff)
    assert cutoff.nans == 0 and cutoff.total == values.numel()
    assert cutoff.above == (keys > cutoff.key).sum() and cutoff.above + cutoff.ties_kept == kept
    assert cutoff.key == (keys[mask].min() if kept else torch.iinfo(keys.dtype).max)
    out = [torch.ones(t.shape, dtype=torch.bool, device=t.device) for t in tensors] if magnitude else None
    written = cutoff_masks(tensors, cutoff, magnitude=magnitude, out=out, backend=backend)
    parts = mask.split([tensor.numel() for tensor in tensors])
    for i, (ours, part) in enumerate(zip(written, parts, strict=True)):
        assert ours.dtype == torch.bool and torch.equal(ours, part.view(tensors[i].shape))
        assert out is None or ours is out[i]


def assert_nan_is_refused_or_counted(backend: str, device: str = "cpu") -> None:
    for nan, magnitude in ((math.nan, False), (math.nan, True), (-math.nan, False), (-math.nan, True)):
        tensors = [torch.tensor(each, device=device) for each in ([1.0, nan, -math.inf], [nan, math.inf])]
        cutoff = topk_cutoff(tensors, 2, magnitude=magnitude, check=False, backend=backend)
        assert (cutoff.nans, cutoff.total) == (2, 5)
        for hint in (None, hinted(0, device), hinted(2**31 - 1, device)):
            with pytest.raises(ValueError, match="got NaN; the weights have diverged"):
                topk_cutoff(tensors, 2, magnitude=magnitude, hint=hint, backend=backend)


@dataclass(frozen=True)
class NOfM(Readable):
    """Scores of `rows` by `groups` groups; tied ones are few values, zeros of both signs and infinities among them."""

    pattern: tuple[int, int]
    rows: int
    groups: int
    half: bool = False
    layout: str = "contiguous"
    ties: bool = True
    magnitude: bool = True


PATTERNS = ((2, 4), (1, 4), (3, 4), (2, 3), (1, 2), (5, 9), (63, 64), (1, 64), (60, 64), (17, 33))
AXES = {"half": (False, True), "layout": ("contiguous", "transposed", "strided"), "ties": (False, True)}
AXES["magnitude"] = (False, True)
N_OF_M = [NOfM(**values) for values in pairwise(pattern=PATTERNS, rows=(1, 5, 33), groups=(1, 3, 40), **AXES)]
N_OF_M.append(NOfM((2, 4), 0, 3))
LARGE_N_OF_M = [NOfM(**values) for values in pairwise(pattern=PATTERNS, rows=(130, 4096), groups=(16, 65), **AXES)]


def assert_n_of_m(case: NOfM, backend: str, half: torch.dtype = torch.float16, device: str = "cpu") -> None:
    """A score is kept where fewer than n of its group come before it: larger ones, and equal ones to its left."""
    (n, m), random = case.pattern, torch.Generator(device).manual_seed(0)
    shape = (case.rows, case.groups * m)
    scores = torch.randn(shape, generator=random, device=device)
    if case.ties:
        scores = torch.tensor(VALUES, device=device)[torch.randint(0, 15, shape, generator=random, device=device)]
    scores = laid_out(scores.to(half if case.half else torch.float32), case.layout)
    mask = n_of_m_mask(scores, n, m, magnitude=case.magnitude, backend=backend)
    ranked = (scores.abs() if case.magnitude else scores).reshape(-1, m)
    earlier = torch.ones(m, m, dtype=torch.bool, device=device).tril(-1)
    # [groups, one, another]: the other comes before the one.
    before = (ranked[:, None, :] > ranked[:, :, None]) | ((ranked[:, None, :] == ranked[:, :, None]) & earlier)
    assert torch.equal(mask, (before.sum(2) < n).view(shape)) and mask.is_contiguous()
