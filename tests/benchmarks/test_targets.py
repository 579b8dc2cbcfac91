"""The targets of a card: as set on the H200, and no higher than what a card's memory lets through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import targets
from targets import UnknownCard, of_convolution, product_bound, targets_for

from tritonsparse.kernels.plan import CARDS

H200, H100 = CARDS["nvidia-h200"], CARDS["nvidia-h100-80gb-hbm3"]


def test_memory_caps_90_percent_at_7_7_on_an_h100_and_not_on_an_h200() -> None:
    # X and Y of 16384 x 4096 and a tenth of W, in 16 bits: 2 (2 * 67,108,864 + 1,677,722) bytes = 271.8 MB.
    dense = 2 * 16_384 * 4096**2 / 790e12
    assert dense == pytest.approx(0.6959e-3, rel=1e-4)
    assert product_bound(H100, 16_384, 4096, 4096, 0.1) == pytest.approx(dense / (271.8e6 / 3.0e12), rel=1e-3)
    assert targets_for("NVIDIA H100 80GB HBM3")["T7@90"].bound.value == pytest.approx(7.68, abs=0.01)  # type: ignore[union-attr]
    assert product_bound(H200, 16_384, 4096, 4096, 0.1) == pytest.approx(10.0)
    # 5 % kept: 270.1 MB at 4.3 TB/s are 62.8 us, more than the 34.8 us of the operations.
    assert product_bound(H200, 16_384, 4096, 4096, 0.05) == pytest.approx(11.08, abs=0.01)
    # Without memory it is one over the density, with nothing pruned one.
    endless = replace(H100, bandwidth=1e30)
    assert product_bound(endless, 16_384, 4096, 4096, 0.1) == pytest.approx(10.0)
    assert product_bound(endless, 16_384, 4096, 4096, 0.1, rate=0.5) == pytest.approx(5.0)
    assert product_bound(H100, 16_384, 4096, 4096, 1.0) == pytest.approx(1.0)
    # Eight rows: dense and kept are both bound by the weight's bytes.
    assert product_bound(H100, 8, 4096, 4096, 0.5) == pytest.approx(2.0, rel=0.01)
    # A convolution of few channels is bound by its images.
    # 128 channels: 18 * 128^2 / 790e12 = 373.3 ps a pixel against 512 bytes, 119.1 ps at 4.3 TB/s: 3.13 at most.
    shares = [119.07 / 373.31, 119.07 / 746.61, 0.1]
    assert of_convolution(0.1)(H200).value == pytest.approx(3 / sum(shares), rel=1e-3)
    assert of_convolution(0.5)(H200).value == pytest.approx(2.0)


def test_on_an_h200_they_are_those_that_were_set() -> None:
    found = targets_for("NVIDIA H200")
    for key, goals in {
        "T1": (0.85, 0.92, 0.97), "T7@90": (6.5, 8.3, 9.0), "T9@80": (3.4, 4.4, 4.7), "T11@90": (2.1, 2.4, 2.48),
        "T12@64": (35, 22, 12), "T16": (0.96, 0.98, 1.0), "T22@90": (2.8, 4.0, 5.0), "T24": (1.5, 2.0, 2.5),
    }.items():  # fmt: skip
        assert (found[key].floor, found[key].target, found[key].stretch) == goals, key
    assert {key.partition("@")[0] for key in found} == {f"T{number}" for number in range(1, 26)}
    assert all(found[key].key == key for key in found)
    # A value is placed between the goals in either direction.
    found = targets_for("nvidia-h200")
    speed, share = found["T7@90"], found["T12@128"]
    assert [speed.reached(value) for value in (6.4, 6.5, 8.3, 9.0)] == ["below floor", "floor", "target", "stretch"]
    assert [share.reached(value) for value in (21, 20, 10, 4)] == ["below floor", "floor", "target", "stretch"]


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_no_goal_exceeds_its_bound_and_goals_are_in_order(card: targets.Card) -> None:
    for each in targets_for(card.name).values():
        goals = [each.floor, each.target, each.stretch]
        assert goals == sorted(goals, reverse=each.smaller_is_better), each
        if each.bound is not None:
            best = min(goals) if each.smaller_is_better else max(goals)
            assert (best >= each.bound.value) if each.smaller_is_better else (best <= each.bound.value), each


def test_a_goal_is_the_same_share_of_the_bound_on_both_cards() -> None:
    here, there = targets_for(H200.name), targets_for(H100.name)
    assert here.keys() == there.keys()
    for key, target in here.items():
        other = there[key]
        if target.bound is None or other.bound is None:
            assert other == target
        elif not target.smaller_is_better and key != "T16":
            # Three digits are kept.
            share = target.floor / target.bound.value
            assert other.floor / other.bound.value == pytest.approx(share, rel=0.005), key
    bound = {key for key in here if here[key].floor != there[key].floor}
    assert bound == {"T7@90", "T7@95", "T8@90", "T8@95", "T9@90", "T10@90", "T11@90", "T16", "T22@80", "T22@90", "T24"}


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "AMD EPYC", ""])
def test_an_unknown_card_is_refused_and_the_known_ones_are_named(name: str) -> None:
    with pytest.raises(UnknownCard, match=r"expected 'NVIDIA H200' or 'NVIDIA H100 80GB HBM3', got .*derive its rates"):
        targets_for(name)


def test_run_as_a_program_it_prints_a_table_a_card(program: Any) -> None:
    run = program("targets")
    assert run.stdout.count("\n### ") + run.stdout.startswith("### ") == len(CARDS)
    rows = [line for line in run.stdout.splitlines() if line.startswith("| T")]
    assert len(rows) == sum(len(targets_for(card.name)) for card in CARDS.values())
    assert "| 7.68: bytes of X and Y at B |" in run.stdout and "derived: 3.35 of the data sheet" in run.stdout
