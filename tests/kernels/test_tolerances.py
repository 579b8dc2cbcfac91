"""The bounds of the GPU tests, against products emulated bit by bit: correct ones lie below, bugs above."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import BITS, CANCELLING, FLOOR, product_bound, rounding

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Array = np.ndarray[Any, np.dtype[np.float64]]
Rule = Callable[[Array, int], Array]
M = N = 48


def truncate(values: Array, bits: int) -> Array:
    """Toward zero, to so many bits of significand: the lower ones of float64's 53 are cleared."""
    mask = ~np.int64((1 << (53 - bits)) - 1)
    return (np.ascontiguousarray(values).view(np.int64) & mask).view(np.float64)


def nearest(values: Array, bits: int) -> Array:
    fraction, exponent = np.frexp(values)
    scale = np.ldexp(1.0, bits)
    rounded: Array = np.ldexp(np.rint(fraction * scale) / scale, exponent)
    return rounded


def accumulate(a: Array, b: Array, step: int, rule: Rule = truncate, bits: int = 24) -> Array:
    """A B with a running sum of so many bits, cut by `rule` after every `step` products."""
    total = np.zeros((a.shape[0], b.shape[1]))
    for k in range(0, a.shape[1], step):
        total = rule(total + a[:, k : k + step] @ b[k : k + step], bits)
    return total


def operands(k: int, bits: int, seed: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    return nearest(random.standard_normal((M, k)), bits), nearest(random.standard_normal((k, N)), bits)


def uniform(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(1).random(shape)


def error(actual: Array, expected: Array) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


LENGTHS = [7, 64, 511, 2048, 4096, 16_384]


def test_truncation_and_rounding_are_what_their_names_say() -> None:
    values = np.array([1 + 2.0**-10 - 2.0**-20, -1 - 2.0**-11 - 2.0**-20, 3.0, 0.0])
    assert truncate(values, 11).tolist() == [1.0, -1.0, 3.0, 0.0]
    assert nearest(values, 11).tolist() == [1 + 2.0**-10, -1 - 2.0**-10, 3.0, 0.0]
    for dtype, bits in BITS.items():
        sample = nearest(np.random.default_rng(0).standard_normal(1000), 30)
        assert np.array_equal(nearest(sample, bits), torch.from_numpy(sample).to(dtype).double().numpy())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_one_rounding_errs_as_derived(dtype: torch.dtype) -> None:
    sample = torch.randn(100_000, dtype=torch.float64)
    assert error(sample.to(dtype).double().numpy(), sample.numpy()) == pytest.approx(rounding(dtype), rel=0.05)


@pytest.mark.parametrize("step", [8, 16])
@pytest.mark.parametrize("k", LENGTHS)
def test_a_truncated_sum_of_16_bit_products_is_within_its_bound(k: int, step: int) -> None:
    a, b = operands(k, 8)
    assert error(accumulate(a, b, step), a @ b) <= product_bound(BF16, FP32, k)
    a, b = np.abs(a), np.abs(b)
    assert error(accumulate(a, b, step), a @ b) <= product_bound(BF16, FP32, k)
    rounded = error(nearest(accumulate(a, b, step), 8), a @ b)
    assert rounded <= product_bound(BF16, BF16, k) < 2e-3 + 2 * rounded


def test_on_hopper_a_float32_sum_errs_more_than_two_in_a_million() -> None:
    """A floor of 2e-6 beside a reference in full float32 fails correct kernels, one of 2e-5 those of long sums."""
    errors = {k: error(accumulate(*operands(k, 8), 16), np.matmul(*operands(k, 8))) for k in (2048, 4096, 16_384)}
    assert errors[2048] == pytest.approx(2.5e-6, rel=0.1) and errors[4096] == pytest.approx(5.2e-6, rel=0.1)
    assert errors[16_384] > 2e-5
    # The bound assumes the shorter step of Ampere, and its walk starts with sums that need no truncation.
    assert all(value < product_bound(BF16, FP32, k) < 6 * value for k, value in errors.items())


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("k", LENGTHS)
def test_full_float32_and_truncated_tf32_are_within_their_bounds_and_tf32_above_rounded_ones(k: int, step: int) -> None:
    a, b = operands(k, 24)
    exact = a @ b
    assert step == 8 or error(accumulate(a, b, 1, nearest), exact) <= product_bound(FP32, FP32, k)
    found = error(accumulate(truncate(a, 11), truncate(b, 11), step), exact)
    of_rounded = error(nearest(a, 11) @ nearest(b, 11), exact)
    bound = product_bound(FP32, FP32, k, "tf32")
    assert found <= bound < 1.5 * found
    assert found > 1.1 * of_rounded
    if k >= 511:
        assert error(truncate(a, 11) @ truncate(b, 11), exact) == pytest.approx(7.7e-4, rel=0.06)
        assert of_rounded == pytest.approx(2.9e-4, rel=0.06)


Case = tuple[torch.dtype, torch.dtype, str]
CASES: list[Case] = [(BF16, FP32, ""), (BF16, BF16, ""), (FP16, FP16, ""), (FP32, FP32, ""), (FP32, FP32, "tf32")]


def computed(a: Array, b: Array, case: Case) -> Array:
    taken, out, precision = case
    if precision == "tf32":
        return nearest(accumulate(truncate(a, 11), truncate(b, 11), 8), BITS[out])
    return nearest(accumulate(a, b, 1, nearest) if taken == FP32 else accumulate(a, b, 16), BITS[out])


def leave_out_a_row(a: Array, b: Array, case: Case) -> Array:
    product = computed(a, b, case)
    product[-1] = 0.0
    return product


BUGS: dict[str, Callable[[Array, Array, Case], Array]] = {
    "a step is dropped": lambda a, b, case: computed(a[:, :-16], b[:-16], case),
    "a column is dropped": lambda a, b, case: computed(a[:, :-1], b[:-1], case),
    "one in a hundred is masked wrongly": lambda a, b, case: computed(a, b * (uniform(b.shape) >= 0.01), case),
    "sums are in bfloat16": lambda a, b, case: accumulate(a, b, 16, nearest, bits=8),
    "a row is left out": leave_out_a_row,
    # Every weight off by one rounding of bfloat16, as where a view of float32 weights is cast too early.
    "the cut-off is rounded": lambda a, b, case: computed(a, nearest(b, 7), case),
}


@pytest.mark.parametrize("k", [256, 1024, 4096])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bugs_lie_above_the_bound_and_correct_products_below(case: Case, k: int) -> None:
    a, b = operands(k, BITS[case[0]])
    exact, bound = a @ b, product_bound(case[0], case[1], k, case[2])
    assert error(computed(a, b, case), exact) <= bound
    assert [name for name, bug in BUGS.items() if error(bug(a, b, case), exact) <= bound] == []


def test_a_sum_that_cancels_needs_the_bound_of_its_terms_times_five() -> None:
    """Terms that are all smaller by 7e-4 make the sum smaller by as much, and the sum may be some times their norm."""
    terms = np.random.default_rng(0).standard_normal((500, 4096))
    wrong = np.abs((truncate(terms, 11) * (1 - 3.5e-4)).sum(1) - terms.sum(1)) / np.linalg.norm(terms, axis=1)
    bound = product_bound(FP32, FP32, 4096, "tf32")
    assert bound < wrong.max() <= CANCELLING * bound
    signs = np.where(uniform(terms.shape) < 0.01, -1.0, 1.0)
    flipped = np.abs((terms * signs).sum(1) - terms.sum(1)) / np.linalg.norm(terms, axis=1)
    assert np.median(flipped) > CANCELLING * bound


def test_bounds_grow_with_the_sum_and_the_floor_is_that_of_float32() -> None:
    for case in CASES:
        bounds = [product_bound(case[0], case[1], k, case[2]) for k in (1, 1024, 65_536)]
        assert bounds == sorted(bounds) and bounds[0] > FLOOR
    # Float32 that was asked for in full and came as tf32 is found.
    a, b = operands(1024, 24)
    assert error(nearest(a, 11) @ nearest(b, 11), a @ b) > 50 * product_bound(FP32, FP32, 1024)
    # The figures that this replaces: 2e-6, 1e-3 and 2e-5.
    assert product_bound(FP32, FP32, 64) == pytest.approx(2.1e-6, rel=0.05)
    assert product_bound(FP32, FP32, 1024, "tf32") == pytest.approx(1e-3, rel=0.02)
    assert product_bound(BF16, FP32, 4096) == pytest.approx(2e-5, rel=0.1)
