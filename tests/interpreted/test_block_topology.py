"""The indices of many layers in three launches against their definition, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels.block import topology as block_topology
from tritonsparse.kernels.block.topology import IndexTable, build_index_reference, build_indices, index_size

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Around one and two tiles of 32 flags.
side = st.sampled_from([1, 2, 31, 32, 33, 70])
density = st.sampled_from([0.0, 0.05, 0.5, 1.0])


@settings(max_examples=15)
@given(layers=st.lists(st.tuples(side, side, density), min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_the_indices_of_all_layers_are_the_reference_s(layers: list[tuple[int, int, float]], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    flags = [torch.rand(r, c, generator=random) < kept for r, c, kept in layers]
    indices = [torch.empty(index_size(r, c), dtype=torch.int32) for r, c, _ in layers]
    build_indices(flags, indices, "triton")
    for (r, c, _), one, index in zip(layers, flags, indices, strict=True):
        assert torch.equal(index, build_index_reference(one)), f"{r} x {c}"


def test_a_table_follows_its_flags() -> None:
    flags = [torch.rand(5, 40) < 0.5, torch.rand(40, 3) < 0.5]
    indices = [torch.empty(index_size(*one.shape), dtype=torch.int32) for one in flags]
    table = IndexTable(flags, indices, "triton")
    for _ in range(2):
        table.build()
        assert all(torch.equal(i, build_index_reference(f)) for f, i in zip(flags, indices, strict=True))
        for one in flags:
            one.logical_not_()


def test_sums_of_more_tiles_than_a_scan_takes_at_once_are_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_topology, "SCAN_TILE", 16)
    flags = torch.rand(70, 70) < 0.5
    index = torch.empty(index_size(70, 70), dtype=torch.int32)
    build_indices([flags], [index], "triton")
    assert torch.equal(index, build_index_reference(flags))
