"""`auto` skips blocks where that was measured faster than dense, and nowhere else."""

from __future__ import annotations

from typing import Any

import torch

from tritonsparse.kernels.measured import (
    FIELDS,
    SEMI_STRUCTURED_FIELDS,
    block_choice,
    break_even,
    read_block_table,
    read_semi_structured_table,
    semi_structured_choice,
)

ENTRY = dict(zip(FIELDS, ("nvidia-h200", 4096, 1024, 64, 64, "bfloat16", 0.6), strict=True))


def choice(density: float, **changed: Any) -> tuple[bool, str]:
    case: dict[str, Any] = {"n": 4096, "k": 1024, "block": (64, 64), "dtype": torch.bfloat16, "name": "NVIDIA H200"}
    case |= changed
    return block_choice(case["n"], case["k"], case["block"], density, case["dtype"], case["name"], table=(ENTRY,))


def test_up_to_the_measured_density_and_no_further() -> None:
    assert [choice(density)[0] for density in (0.1, 0.6, 0.61)] == [True, True, False]
    assert "up to density 0.6" in choice(0.1)[1] and "only" in choice(0.61)[1]


def test_what_was_not_measured_is_not_claimed() -> None:
    others: list[dict[str, Any]] = [
        {"n": 1024}, {"k": 4096}, {"block": (32, 64)}, {"dtype": torch.float16}, {"name": "NVIDIA A100"},
    ]  # fmt: skip
    for other in others:
        skips, reason = choice(0.01, **other)
        assert not skips and "not measured" in reason and "backend='block'" in reason


def test_the_packaged_table_is_readable() -> None:
    for entry in read_block_table():
        assert 0 <= entry["max_density"] <= 1
        block = (entry["rows"], entry["columns"])
        dtype = getattr(torch, entry["dtype"])
        assert break_even(entry["n"], entry["k"], block, dtype, entry["device"]) is not None


def test_a_2_4_forward_is_taken_where_it_was_measured_faster() -> None:
    entry = dict(zip(SEMI_STRUCTURED_FIELDS, ("nvidia-h200", 4096, 1024, "bfloat16", True), strict=True))
    slower = {**entry, "k": 4096, "faster": False}
    choices = {
        k: semi_structured_choice(4096, k, torch.bfloat16, "NVIDIA H200", table=(entry, slower))
        for k in (1024, 4096, 2048)
    }
    assert {k: taken for k, (taken, _) in choices.items()} == {1024: True, 4096: False, 2048: False}
    assert "measured faster" in choices[1024][1] and "no faster" in choices[4096][1]
    assert "not measured" in choices[2048][1]
    assert all(set(each) == set(SEMI_STRUCTURED_FIELDS) for each in read_semi_structured_table())
