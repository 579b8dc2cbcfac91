"""How `first_contact.py` decides that a result is right, and how it times what is: beside dense, in turn.

A result is compared with float64, twice: by relative RMS, and by the worst element, |a - e| over |e| plus the RMS of
all e. What an op leaves unwritten reads as NaN while it is checked, and NaN is never right. A wrong result gets no
time. Bounds are arithmetic (`Bound.of_product`), not taste.

Times are of CUDA graph replays over inputs larger than the L2, taken in rounds: some of each provider, then again, so
that a clock that falls does so under all of them.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonsparse.kernels import _triton

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from first_contact_child import Context
from harness import Row, Timing, captured, input_sets, relative_error, sample

ROUNDS, EACH = 5, 10
# The least digits of a 16-bit or float32 result: half a unit in the last place, relative.
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# What tensor cores make of a sum of K products of 16-bit operands, by relative RMS: they cut off what float32 would
# round, 2.5e-6 at K = 2048 and 5.2e-6 at 4096, so 1.3e-9 K. Twice that is allowed, and 16 times that for one element.
CUT_OFF, WORST = 2.6e-9, 16


class Settings:
    """Whether tensors are drawn, or only allocated (`triton_cache.py` runs launchers without a GPU)."""

    empty = False


@dataclass(frozen=True)
class Bound:
    """The most that a result may be off by relative RMS, and in its worst element."""

    rms: float
    worst: float

    @classmethod
    def of_product(cls, k: int, out: torch.dtype) -> Bound:
        """Of sums of k products: each is rounded to `out`, by which no element is off by more than its roundoff."""
        # A few roundings of float32 beside the sum: bias, parts added in order, a multiplier.
        summed = CUT_OFF * k + 4 * ROUNDOFF[torch.float32]
        return cls(summed + ROUNDOFF[out], WORST * summed + ROUNDOFF[out])


EXACT = Bound(0.0, 0.0)


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: "dense", "copy" and "read" are what others are compared with; the rest are ours.
        calls: the same work on one or more sets of inputs.
        exact: what the first call computes, in float64; None where there is nothing to check (a copy).
        bound: of each result.
        facts: of its row.
        ratios: for the table: (name, target or "", factor): the first provider's time over this one's, times factor.
        result: what of a call's result is compared.
    """

    name: str
    calls: Sequence[Callable[[], Any]]
    exact: Callable[[], tuple[Tensor, ...]] | None
    bound: Bound = EXACT
    facts: Row = field(default_factory=dict)
    ratios: tuple[tuple[str, str, float], ...] = ()
    result: Callable[[Any], tuple[Tensor, ...]] = lambda made: made if isinstance(made, tuple) else (made,)

    @property
    def ours(self) -> bool:
        return self.name not in ("dense", "copy", "read")


@dataclass(frozen=True)
class Case:
    """Providers that compute the same; the first is what the others are compared with.

    Attributes:
        name: of the case, unique in its step.
        seconds: what it takes, compiling included, on a machine with a GPU.
        facts: on all of its rows.
        providers: makes the operands and the providers.
        graph: time replays of CUDA graphs; without, host time is in it.
    """

    name: str
    seconds: float
    facts: Row
    providers: Callable[[], list[Provider]]
    graph: bool = True


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def backend() -> str:
    return "triton" if torch.cuda.is_available() or _triton.INTERPRETED or Settings.empty else "torch"


def how() -> str:
    """Which code computes what is ours here."""
    if torch.cuda.is_available():
        return "triton"
    return "triton, interpreted" if _triton.INTERPRETED else "torch reference"


def draw(random: torch.Generator, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values; only allocated where launchers run without a GPU."""
    if Settings.empty:
        return torch.empty(shape, dtype=dtype)
    return torch.randn(shape, generator=random, device=random.device).mul_(scale).to(dtype)


def sets_of(nbytes: int) -> int:
    return min(8, input_sets(nbytes))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """What is allocated in it and not written reads as NaN, or as the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def worst_error(actual: Tensor, expected: Tensor) -> float:
    """The largest |a - e| / (|e| + RMS of e); NaN where either holds one."""
    expected = expected.double()
    scale = expected.square().mean().sqrt()
    return ((actual.double() - expected).abs() / (expected.abs() + scale).clamp_min(1e-300)).max().item()


def judged(row: Row, actual: Sequence[Tensor], exact: Sequence[Tensor], bound: Bound) -> Row:
    """`row` with its errors, their bounds and the verdict: "right" or "WRONG" (NaN too)."""
    pairs = list(zip(actual, exact, strict=True))
    errors = [relative_error(a, e) for a, e in pairs]
    worst = [worst_error(a, e) if e.numel() else 0.0 for a, e in pairs]
    right = all(error <= bound.rms for error in errors) and all(each <= bound.worst for each in worst)
    # Of several results the one farthest off; NaN before everything.
    pick = max(range(len(pairs)), key=lambda i: float("inf") if errors[i] != errors[i] else errors[i])
    off = {"error": errors[pick], "bound": bound.rms, "worst": worst[pick], "worst_bound": bound.worst}
    # JSON has no NaN.
    off = {key: value if abs(value) < float("inf") else str(value) for key, value in off.items()}
    return {**row, **off, "verdict": "right" if right else "WRONG"}


def check(context: Context, row: Row, provider: Provider) -> Row:
    """The provider's first call, its time with compiling and loading, and whether it is right."""
    before, start = len(context.compiles), time.perf_counter()
    with poisoned_memory():
        made = provider.calls[0]()
        synchronize()
    compiled = context.compiles[before:]
    row = {**row, "compile_s": round(time.perf_counter() - start, 3)}
    row |= {"kernels": len(compiled), "compiled": sum(compiled)}
    if provider.exact is None:
        return {**row, "error": 0.0, "verdict": "right"}
    return judged(row, provider.result(made), provider.exact(), provider.bound)


def in_turn(
    providers: dict[str, Sequence[Callable[[], object]]], *, graph: bool, rounds: int = ROUNDS, each: int = EACH
) -> dict[str, Timing]:
    """Time of one call of each provider; samples are taken in rounds."""
    if not torch.cuda.is_available():
        return {name: Timing.of(sample(calls, 3)) for name, calls in providers.items()}
    ready = {name: ([captured(calls)], len(calls)) if graph else (list(calls), 1) for name, calls in providers.items()}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for calls, _ in ready.values():
        sample(calls, 3)
    for _ in range(rounds):
        for name, (calls, share) in ready.items():
            times[name] += [milliseconds / share for milliseconds in sample(calls, each)]
    return {name: Timing.of(samples) for name, samples in times.items()}


def compare(context: Context, case: Case, add: Callable[[Row], None]) -> list[Row]:
    """One row a provider: checked, then all that are right are timed in turn. Wrong and failed ones are added first."""
    providers = case.providers()
    rows: dict[str, Row] = {}
    for provider in providers:
        row = {
            **case.facts,
            **provider.facts,
            "provider": provider.name,
            "backend": how() if provider.ours else "torch",
        }
        try:
            row = check(context, row, provider)
        except Exception as error:
            if not provider.ours:
                raise
            add({**row, "verdict": "failed", "failure": f"{type(error).__name__}: {error}".splitlines()[0][:500]})
            # Where the GPU no longer answers this raises, and the case ends.
            synchronize()
            continue
        if row["verdict"] == "right":
            rows[provider.name] = row
        else:
            add(row)
    timings = in_turn({p.name: p.calls for p in providers if p.name in rows}, graph=case.graph)
    base = timings.get(providers[0].name)
    made = []
    for provider in providers:
        if provider.name in rows:
            row, timing = rows[provider.name], timings[provider.name]
            row |= {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80}
            if base is not None and provider.ours:
                speedup = base.median / timing.median
                row["beside_ms"] = base.median
                row["ratios"] = [
                    {"name": name, "value": speedup * factor, "target": target}
                    for name, target, factor in provider.ratios
                ]
            add(row)
            made.append(row)
    return made


def run_cases(context: Context, cases: Sequence[Case]) -> None:
    for case in cases:
        context.case(case.name, case.seconds, lambda add, case=case: compare(context, case, add))  # type: ignore[misc]
