"""`auto` skips blocks and takes 2:4 products where that was measured faster than dense, and nowhere else."""

from typing import Any

import pytest
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
LAYER: dict[str, Any] = {
    "n": 4096, "k": 1024, "block": (64, 64), "dtype": torch.bfloat16, "device_name": "NVIDIA H200", "table": (ENTRY,),
}  # fmt: skip


def test_up_to_the_measured_density_and_no_further() -> None:
    choices = [block_choice(**LAYER, density=density) for density in (0.1, 0.6, 0.61)]
    assert [skips for skips, _ in choices] == [True, True, False]
    assert "up to density 0.6" in choices[0][1] and "only" in choices[2][1]


@pytest.mark.parametrize(
    "other", [{"n": 1024}, {"k": 4096}, {"block": (32, 64)}, {"dtype": torch.half}, {"device_name": "NVIDIA A100"}]
)
def test_what_was_not_measured_is_not_claimed(other: dict[str, Any]) -> None:
    skips, reason = block_choice(**LAYER | other, density=0.01)
    assert not skips and "not measured" in reason and "backend='block'" in reason


def test_the_packaged_table_is_readable() -> None:
    for entry in read_block_table():
        layer = entry["n"], entry["k"], (entry["rows"], entry["columns"]), getattr(torch, entry["dtype"])
        assert break_even(*layer, entry["device"]) == entry["max_density"] and 0 <= entry["max_density"] <= 1
    assert all(set(each) == set(SEMI_STRUCTURED_FIELDS) for each in read_semi_structured_table())


@pytest.mark.parametrize(("k", "faster", "words"), [(1024, True, "measured faster"), (4096, False, "no faster"),
                                                    (2048, False, "not measured")])  # fmt: skip
def test_a_2_4_forward_is_taken_where_it_was_measured_faster(k: int, faster: bool, words: str) -> None:
    entry = dict(zip(SEMI_STRUCTURED_FIELDS, ("nvidia-h200", 4096, 1024, "bfloat16", True), strict=True))
    table = (entry, {**entry, "k": 4096, "faster": False})
    taken, reason = semi_structured_choice(4096, k, torch.bfloat16, "NVIDIA H200", table=table)
    assert taken == faster and words in reason
