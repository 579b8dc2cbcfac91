"""What is to be reached on which card: the targets T1 to T25 as ratios, each with the physical bound where one binds.

`targets_for(torch.cuda.get_device_name())` gives those of a card; `python benchmarks/targets.py` prints both tables as
Markdown. Goals were set on the H200. On another card a goal is the same share of that card's bound; a goal without a
bound, or with the same bound, is the same on both. Every bound is derived here:

    P, B    the vendor's dense rate in 16 bits and the rate of a copy (kernels/plan.py): 790 TFLOP/s and 4.3 TB/s on
            the H200, 790 TFLOP/s and 3.0 TB/s on the H100
    d       the share that is kept, 1 - s

Product Y = X W^T, X [M, K] and W [N, K] in 16 bits. Dense takes max(2MNK/P, 2(MK + NK + MN)/B). With skipped blocks at
least max(2dMNK/P, 2(MK + dNK + MN)/B): activations are read and written whatever is pruned. The speed-up is at most the
first over the second. At M = 16384 and N = K = 4096 dense takes 0.696 ms. At d = 0.1 the operations take 0.070 ms. The
272 MB take 0.063 ms on the H200, so the cap is 10; on the H100 they take 0.091 ms, so it is 7.7. At d = 0.05 memory
caps both: 11 and 7.7. Up to s = 80 % it caps neither.

Blocks narrower than 128: a multiprocessor takes in 64 bytes a clock, and a tile of BM x BN needs 4096(1/BM + 1/BN) of
them to keep its tensor cores busy. That is 80 for 256x64, so 0.80 of the tensor rate, and 136 for 512x32, so 0.47. A
product that waits for its port draws less power and runs at a higher clock, by 1.15 at most: 0.92 and 0.54.

Dense dW (alpha > 0): of three products two skip, so 3 / (1 + 2/x) for a speed-up x of each of those.

Convolution of 3x3 with C channels in and out, over many pixels: dense takes 18C^2/P a pixel, skipping at least
max(18dC^2/P, 4C/B). Stages 2 to 4 of ResNet-50 have 128, 256 and 512 channels and equal work: the bound is of the three
together. At d = 0.1 it is 5.19 on the H200 and 3.75 on the H100.

Training step of the decoder (22 layers, hidden 2048, MLP 5632, 4 of 32 heads in keys and values, 32,000 words, 16,384
tokens in sequences of 2,048): of its operations 0.86 are in the skipped products, 0.08 in attention and 0.06 in the
head, so a speed-up x of all those products gives 1 / (0.14 + 0.86/x) at most.

Element regime: fwd + dX + dW take 6M/P a weight, 62 ps at M = 8192, and b extra bytes a weight add b/B. The backward of
the view reads g and W and writes dW, b = 10. The floor leaves this pass beside the products, the target half of it.

A dense product that is slower than P moves its bound up in proportion: a figure above its bound says that of P or of
the dense line, and is to be explained.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

from tritonsparse.kernels.plan import CARDS, Card, device_key

__all__ = ["Bound", "Target", "UnknownCard", "targets_for"]

H200 = CARDS["nvidia-h200"]
TOKENS, WIDTH = 16_384, 4096
# Share of the tensor rate that the port of a multiprocessor allows, and the clock that waiting leaves.
PORT = {128: 1.0, 64: 64 / 80, 32: 64 / 136}
HEADROOM = 1.15


class UnknownCard(ValueError):
    """There are no targets for this card."""


@dataclass(frozen=True)
class Bound:
    """What the card cannot exceed, and why."""

    value: float
    formula: str


@dataclass(frozen=True)
class Target:
    """One figure to reach.

    Attributes:
        key: "T4", or "T7@90" for one of several figures: a sparsity or a block.
        quantity: what is measured, and against what.
        floor, target, stretch: must, should and may be reached; smaller is better where the floor is the largest.
        unit: "x" of a speed-up, "ratio", "%", or of what is no ratio.
        bound: None where nothing physical binds before the goals.
    """

    key: str
    quantity: str
    floor: float
    target: float
    stretch: float
    unit: str
    bound: Bound | None

    @property
    def smaller_is_better(self) -> bool:
        return self.floor > self.target

    def reached(self, value: float) -> str:
        """The best of "stretch", "target" and "floor" that a value reaches, or "below floor"."""
        sign = -1.0 if self.smaller_is_better else 1.0
        for name in ("stretch", "target", "floor"):
            if sign * value >= sign * getattr(self, name):
                return name
        return "below floor"


def product_bound(card: Card, m: int, n: int, k: int, density: float, rate: float = 1.0) -> float:
    """Speed-up of a product with skipped blocks over the dense one; `rate` is the share of P that its tiles allow."""
    dense = max(2.0 * m * n * k / card.rate, 2.0 * (m * k + n * k + m * n) / card.bandwidth)
    kept = max(2.0 * density * m * n * k / (rate * card.rate), 2.0 * (m * k + density * n * k + m * n) / card.bandwidth)
    return dense / kept


def port_rate(block: int) -> float:
    """The share of P, clock included, at which tiles as narrow as a block can run."""
    return min(1.0, PORT[block] * HEADROOM)


def of_product(density: float, block: int = 128) -> Callable[[Card], Bound]:
    def bound(card: Card) -> Bound:
        value = product_bound(card, TOKENS, WIDTH, WIDTH, density, port_rate(block))
        memory = value < 0.999 * port_rate(block) / density
        return Bound(value, "bytes of X and Y at B" if memory else f"{port_rate(block):.2g} / {density:g}")

    return bound


def of_dense_grad(density: float) -> Callable[[Card], Bound]:
    def bound(card: Card) -> Bound:
        return Bound(3 / (1 + 2 / product_bound(card, TOKENS, WIDTH, WIDTH, density)), "3 / (1 + 2 / x), x as in T7")

    return bound


def of_convolution(density: float) -> Callable[[Card], Bound]:
    def bound(card: Card) -> Bound:
        shares = [max(density, 4 * c / card.bandwidth / (18 * c * c / card.rate)) for c in (128, 256, 512)]
        return Bound(3 / sum(shares), "3 / sum of max(d, 2P / 9CB), C = 128, 256, 512")

    return bound


def of_decoder(card: Card) -> Bound:
    # Outputs, inputs and number of the products of a layer, of 22.
    products = [(2048, 2048, 2), (256, 2048, 2), (5632, 2048, 2), (2048, 5632, 1)]
    dense = kept = 0.0
    for n, k, count in products:
        time = count * max(2.0 * TOKENS * n * k / card.rate, 2.0 * (TOKENS * (n + k) + n * k) / card.bandwidth)
        dense += time
        kept += time / product_bound(card, TOKENS, n, k, 0.1)
    return Bound(1 / (0.14 + 0.86 * kept / dense), "1 / (0.14 + 0.86 / x), x of the layers' products")


def same(value: float, formula: str) -> Callable[[Card], Bound]:
    return lambda card: Bound(value, formula)


def element_step(card: Card, extra: float) -> float:
    """Dense step over ours in the element regime at 8192 rows, with so many extra bytes a weight."""
    return 1 / (1 + extra / card.bandwidth / (6 * 8192 / card.rate))


def across_ranks(card: Card, microseconds: float) -> float:
    """A cut-off across ranks over the local one: 1e9 float32 read at 0.8 of B, and so much more."""
    return 1 + microseconds * 1e-6 / (4e9 / (0.8 * card.bandwidth))


Goal = tuple[str, str, tuple[float, float, float], str, Callable[[Card], Bound] | None]


def _series(
    key: str,
    quantity: str,
    goals: dict[int, tuple[float, float, float]],
    bound: Callable[[float], Callable[[Card], Bound]],
) -> list[Goal]:
    """One goal a sparsity in per cent."""
    return [(f"{key}@{s}", f"{quantity}, s = {s} %", goal, "x", bound((100 - s) / 100)) for s, goal in goals.items()]


# As set on the H200 (bf16, M = 16384, d = 4096 unless said): floor, target, stretch.
GOALS: list[Goal] = [
    ("T1", "forward, nothing pruned, block 128 / cuBLAS", (0.85, 0.92, 0.97), "ratio", None),
    ("T2", "dX, nothing pruned, block 128 / cuBLAS", (0.85, 0.92, 0.97), "ratio", None),
    ("T3", "dW with multiplier and threshold gradient / cuBLAS", (0.80, 0.90, 0.95), "ratio", None),
    ("T4", "forward, share of 1/d, block 128, s = 50-80 %", (0.80, 0.90, 0.95), "ratio", same(1.0, "1/d")),
    ("T5", "forward, share of 1/d, block 64", (0.65, 0.80, 0.90), "ratio", same(port_rate(64), "1.15 * 64/80")),
    ("T6", "forward, share of 1/d, block 32", (0.30, 0.45, 0.50), "ratio", same(port_rate(32), "1.15 * 64/136")),
    *_series(
        "T7", "forward / cuBLAS, block 128",
        {50: (1.6, 1.8, 1.9), 70: (2.6, 3.0, 3.2), 80: (3.8, 4.4, 4.7), 90: (6.5, 8.3, 9.0), 95: (8.0, 10.0, 11.0)},
        of_product,
    ),
    *_series(
        "T8", "forward / cuBLAS, block 64",
        {50: (1.3, 1.55, 1.75), 70: (2.2, 2.6, 2.9), 80: (3.2, 3.8, 4.2), 90: (5.5, 7.3, 8.0), 95: (7.5, 9.7, 10.0)},
        lambda density: of_product(density, 64),
    ),
    *_series(
        "T9", "forward + dX + dW / cuBLAS, block 128",
        {50: (1.5, 1.8, 1.9), 70: (2.4, 3.0, 3.1), 80: (3.4, 4.4, 4.7), 90: (5.5, 8.0, 9.0)},
        of_product,
    ),
    *_series(
        "T10", "forward + dX + dW / cuBLAS, block 64",
        {50: (1.1, 1.3, 1.5), 70: (1.7, 2.15, 2.4), 80: (2.4, 3.2, 3.6), 90: (4.3, 6.0, 7.0)},
        of_product,
    ),
    *_series(
        "T11", "forward + dX + dense dW / cuBLAS, block 128",
        {50: (1.3, 1.42, 1.48), 70: (1.6, 1.78, 1.86), 80: (1.8, 2.05, 2.1), 90: (2.1, 2.4, 2.48)},
        of_dense_grad,
    ),
    ("T12@128", "break-even sparsity against cuBLAS, block 128", (20, 10, 5), "%", None),
    ("T12@64", "break-even sparsity against cuBLAS, block 64", (35, 22, 12), "%", None),
    ("T12@32", "break-even sparsity against cuBLAS, block 32", (65, 55, 50), "%", None),
    ("T13", "forward / torch BSR as shipped, blocks 32-128", (2.0, 3.0, 6.0), "x", None),
    ("T14", "forward / torch BSR after tune_bsr_dense_addmm", (1.2, 1.6, 2.0), "x", None),
    ("T15", "forward, dX and dW / stk, block 128", (1.2, 1.5, 1.8), "x", None),
    ("T17", "threshold + cast + counts / copy", (0.80, 0.90, 0.95), "ratio", same(1.0, "its bytes at B")),
    ("T18", "extra memory of a thresholded layer under AMP", (2, 0, 0), "B a weight", same(0.0, "AMP's own copy")),
    ("T19", "exact k-th magnitude of 1e9 float32 / one read", (0.5, 0.8, 1.0), "ratio", same(1.0, "4 B a weight at B")),
    ("T21", "topology of a model of 1e9 weights, block 64", (100, 25, 10), "us", None),
    *_series(
        "T22", "3x3 convolutions of ResNet-50 / cuDNN, block 64",
        {50: (0.9, 1.1, 1.4), 80: (1.8, 2.4, 3.0), 90: (2.8, 4.0, 5.0)},
        of_convolution,
    ),
    ("T23", "forward with the view inside / cuBLAS, M >= 4096", (0.60, 0.70, 0.80), "ratio", None),
    ("T24", "training step of a decoder of 1e9 weights / dense, block 128, s = 90 %", (1.5, 2.0, 2.5), "x", of_decoder),
    ("T25", "first call of an operator, nothing tuned", (5, 2, 1), "s", None),
]  # fmt: skip


def _digits(value: float, count: int = 3) -> float:
    return float(f"{value:.{count}g}")


def _scaled(goal: Goal, card: Card) -> Target:
    key, quantity, (floor, target, stretch), unit, bound = goal
    if bound is None:
        return Target(key, quantity, floor, target, stretch, unit, None)
    here, reference = bound(card), bound(H200)
    if math.isclose(here.value, reference.value, rel_tol=1e-3):
        return Target(key, quantity, floor, target, stretch, unit, here)
    share = here.value / reference.value
    return Target(key, quantity, _digits(floor * share), _digits(target * share), _digits(stretch * share), unit, here)


def _of_card(card: Card) -> list[Target]:
    found = [_scaled(goal, card) for goal in GOALS]
    floor, target = (_digits(element_step(card, extra), 2) for extra in (10, 5))
    found.append(
        Target("T16", "step in the element regime / dense under AMP, M >= 8192", floor, target, 1.0, "ratio",
               Bound(1.0, "no product is skipped"))
    )  # fmt: skip
    times = (2.0, *(round(across_ranks(card, microseconds), 3) for microseconds in (100, 50)))
    found.append(
        Target(
            "T20", "exact k-th magnitude across 8 ranks / the local one", *times, "ratio", Bound(1.0, "the local one")
        )
    )
    return sorted(found, key=lambda target: int(target.key[1:].partition("@")[0]))


def targets_for(device_name: str | None) -> dict[str, Target]:
    """The targets of a card by key, in the order of their numbers.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it; its form in lower case with hyphens will do. None for
            no GPU, which no targets were derived for either.

    Raises:
        UnknownCard: none were derived for it.
    """
    card = CARDS.get(device_key(device_name or ""))
    if card is None:
        names = " or ".join(repr(card.name) for card in CARDS.values())
        raise UnknownCard(
            f"targets_for: unknown card: expected {names}, got {device_name!r}; derive its rates in kernels/plan.py "
            f"first"
        )
    return {target.key: target for target in _of_card(card)}


def markdown() -> str:
    """One table a card."""
    lines = []
    for card in CARDS.values():
        lines += [
            f"### {card.name}", "",
            f"P = {card.rate / 1e12:g} TFLOP/s ({card.rate_source}), "
            f"B = {card.bandwidth / 1e12:g} TB/s ({card.bandwidth_source})", "",
            "| # | quantity | floor | target | stretch | unit | bound |", "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for each in targets_for(card.name).values():
            bound = "-" if each.bound is None else f"{each.bound.value:.3g}: {each.bound.formula}"
            goals = " | ".join(f"{goal:.4g}" for goal in (each.floor, each.target, each.stretch))
            lines.append(f"| {each.key} | {each.quantity} | {goals} | {each.unit} | {bound} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(markdown())
