"""Cases of `n_of_m_mask`, which every ring runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tritonsparse.kernels.select.n_of_m import n_of_m_mask

from .matrices import laid_out, pairwise


@dataclass(frozen=True)
class Case:
    """Scores of `rows` by `groups` groups; tied ones are few values, zeros of both signs and infinities among them."""

    pattern: tuple[int, int]
    rows: int
    groups: int
    half: bool = False
    layout: str = "contiguous"
    ties: bool = True
    magnitude: bool = True

    def __str__(self) -> str:
        flags = [name for name in ("half", "ties", "magnitude") if getattr(self, name)]
        n, m = self.pattern
        return ", ".join((f"{n}:{m}", f"{self.rows} rows of {self.groups} groups", self.layout, *flags))


PATTERNS = ((2, 4), (1, 4), (3, 4), (2, 3), (1, 2), (5, 9), (63, 64), (1, 64), (60, 64), (17, 33))
AXES = {
    "half": (False, True), "layout": ("contiguous", "transposed", "strided"), "ties": (False, True),
    "magnitude": (False, True),
}  # fmt: skip
CASES = [Case(**values) for values in pairwise(pattern=PATTERNS, rows=(1, 5, 33), groups=(1, 3, 40), **AXES)]
CASES.append(Case((2, 4), 0, 3))
LARGE = [Case(**values) for values in pairwise(pattern=PATTERNS, rows=(130, 4096), groups=(16, 65), **AXES)]


def assert_masks(case: Case, backend: str, half: torch.dtype = torch.float16, device: str = "cpu") -> None:
    """A score is kept where fewer than n of its group come before it: larger ones, and equal ones to its left."""
    (n, m), random = case.pattern, torch.Generator(device).manual_seed(0)
    shape = (case.rows, case.groups * m)
    scores = torch.randn(shape, generator=random, device=device)
    if case.ties:
        values = torch.tensor([-0.0, 0.0, 1.0, -1.0, math.inf, -math.inf, 1e-40], device=device)
        scores = values[torch.randint(0, 7, shape, generator=random, device=device)]
    scores = laid_out(scores.to(half if case.half else torch.float32), case.layout)
    mask = n_of_m_mask(scores, n, m, magnitude=case.magnitude, backend=backend)
    ranked = (scores.abs() if case.magnitude else scores).reshape(-1, m)
    earlier = torch.ones(m, m, dtype=torch.bool, device=device).tril(-1)
    # [groups, one, another]: the other comes before the one.
    before = (ranked[:, None, :] > ranked[:, :, None]) | ((ranked[:, None, :] == ranked[:, :, None]) & earlier)
    assert torch.equal(mask, (before.sum(2) < n).view(shape)) and mask.is_contiguous()
