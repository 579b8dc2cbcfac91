"""Counts and ties of top-k masks, and how one sparsity is divided over layers."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.masks.distribution import divide, erk, uniform
from tritonsparse.masks.topk import kept_count, topk_mask, topk_masks

quick = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("n", "sparsity", "kept"),
    [
        # Binary floats miss these: (1 - .9) 10 = .9999999999999998, and AC/DC's code keeps 19 of 100 at .8.
        (100, 0.8, 20), (10, 0.9, 1), (100, 0.98, 2), (100, 0.95, 5), (1000, 0.999, 1), (100, 0.57, 43),
        # a half rounds up: 2.5, 8.5 (banker's rounding would give 8), .5
        (5, 0.5, 3), (10, 0.15, 9), (1, 0.5, 1),
        # never fewer than 1, never more than n
        (10, 0.999, 1), (7, 0.0, 7), (1, 0.99, 1),
    ],
)  # fmt: skip
def test_kept_is_the_exact_share_rounded_half_up_and_at_least_one(n: int, sparsity: float, kept: int) -> None:
    assert kept_count(n, sparsity) == kept


@given(st.integers(1, 10**9), st.decimals(0, "0.999", places=3))
@quick
def test_kept_is_within_half_of_the_exact_share(n: int, sparsity: Decimal) -> None:
    kept, exact = kept_count(n, float(sparsity)), (1 - sparsity) * n
    assert 1 <= kept <= n
    assert kept == 1 or Decimal("-0.5") < kept - exact <= Decimal("0.5")


def test_ties_go_to_the_lowest_index() -> None:
    score = torch.tensor([[0.5, 2.0, 0.5], [0.5, 1.0, 0.5]])
    assert topk_mask(score, 4).tolist() == [[True, True, True], [False, True, False]]
    assert topk_mask(torch.zeros(2, 2), 1).tolist() == [[True, False], [False, False]]


def test_globally_ties_go_to_the_earlier_tensor() -> None:
    masks = topk_masks([torch.tensor([1.0, 3.0]), torch.tensor([[1.0], [2.0]])], 3)
    assert [mask.tolist() for mask in masks] == [[True, True], [[False], [True]]]


def test_scores_of_several_dtypes_compete_by_value() -> None:
    scores = [torch.tensor([1.0, -3.0]).bfloat16(), torch.tensor([0.5, 1.25]), torch.tensor([1.0]).double()]
    assert [mask.tolist() for mask in topk_masks(scores, 2)] == [[True, False], [False, True], [False]]
    assert [mask.tolist() for mask in topk_masks(scores[:2], 3)] == [[True, False], [True, True]]


@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 1.0, 1.5, math.inf]), min_size=1), st.data())
@quick
def test_topk_is_the_head_of_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: -values[i])  # Python's sort is stable
    chosen = topk_mask(torch.tensor(values), kept)
    assert chosen.nonzero().flatten().tolist() == sorted(order[:kept])


def test_scores_without_an_order_and_counts_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="got NaN; the weights have diverged"):
        topk_mask(torch.tensor([1.0, math.nan]), 1)
    for kept in (-1, 3):
        with pytest.raises(ValueError, match=f"0 <= kept <= 2, got {kept}; correct the count"):
            topk_mask(torch.zeros(2), kept)


def test_erk_divides_by_the_sum_over_the_product_of_dimensions() -> None:
    # raw: 8/16, 10/16. Budget 8 + 8 kept; eps = 16/(8 + 10) = 8/9; densities 4/9 and 5/9.
    assert erk({"a": (4, 4), "b": (2, 8)}, 0.5) == pytest.approx({"a": 5 / 9, "b": 4 / 9})


def test_erk_makes_small_layers_dense_and_takes_their_weights_from_the_others() -> None:
    # raw: .2, 1.5; zeros asked 50 + 1. First eps = 51/(20 + 3) = 2.2 makes b denser than 1: b is dense.
    # Then eps = (50 - 1)/20 = 2.45: a keeps 49, b 2, together the 51 of the budget.
    assert erk({"a": (10, 10), "b": (2, 1)}, 0.5) == pytest.approx({"a": 0.51, "b": 0.0})


def test_erk_of_no_sparsity_is_dense() -> None:
    assert erk({"a": (10, 10), "b": (2, 8), "c": (3, 3, 3)}, 0.0) == pytest.approx({"a": 0.0, "b": 0.0, "c": 0.0})


def resnet50() -> dict[str, tuple[tuple[int, ...], int]]:
    """Weight shape and output positions of every layer of ResNet-50 (v1.5: the 3x3 convolution has the stride)."""
    layers: dict[str, tuple[tuple[int, ...], int]] = {"conv1": ((64, 3, 7, 7), 112**2)}
    channels, side = 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            inside, name = side, f"{stage}.{block}"
            side = side // 2 if stage and not block else side
            layers[f"{name}.1"] = ((width, channels, 1, 1), inside**2)
            layers[f"{name}.2"] = ((width, width, 3, 3), side**2)
            layers[f"{name}.3"] = ((4 * width, width, 1, 1), side**2)
            if not block:
                layers[f"{name}.downsample"] = ((4 * width, channels, 1, 1), side**2)
            channels = 4 * width
    return layers | {"fc": ((1000, 2048), 1)}


# The published forward costs of RigL-ERK on ResNet-50 (README of google-research/rigl: .42, .24, .12).
@pytest.mark.parametrize(("sparsity", "fraction"), [(0.8, 0.4138), (0.9, 0.2418), (0.95, 0.1217)])
def test_erk_on_resnet50_costs_what_rigl_published(sparsity: float, fraction: float) -> None:
    layers = resnet50()
    shapes = {name: shape for name, (shape, _) in layers.items()}
    macs = {name: math.prod(shape) * positions for name, (shape, positions) in layers.items()}
    assert len(layers) == 54 and sum(map(math.prod, shapes.values())) == 25_502_912
    assert sum(macs.values()) == 4_089_184_256
    divided = erk(shapes, sparsity)
    cost = sum((1 - divided[name]) * macs[name] for name in layers) / sum(macs.values())
    assert cost == pytest.approx(fraction, abs=5e-5)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=6),
    st.sampled_from([0.1, 0.5, 0.8, 0.9, 0.99]),
)
@quick
def test_erk_spends_the_budget_of_uniform(sizes: list[tuple[int, int]], sparsity: float) -> None:
    shapes = {str(i): size for i, size in enumerate(sizes)}
    divided = erk(shapes, sparsity)
    assert all(-1e-12 <= p <= 1 for p in divided.values())
    zeros = sum(divided[name] * math.prod(shape) for name, shape in shapes.items())
    asked = sum(int(Decimal(str(sparsity)) * math.prod(shape)) for shape in shapes.values())
    assert zeros == pytest.approx(asked, abs=1e-6)


def test_uniform_is_uniform_and_an_unknown_distribution_is_named() -> None:
    assert uniform({"a": (2, 2), "b": (3,)}, 0.5) == {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match="expected one of uniform, erk, got 'er'; choose one of them"):
        divide("er", {}, 0.5)
