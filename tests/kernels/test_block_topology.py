"""Where kept blocks are: the index by hand and against a dense walk, topologies of masks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels.block.topology import (
    IndexTable,
    Topology,
    block_flags,
    build_index_reference,
    build_indices,
    index_size,
    sections,
)


def index_of(rows: int, columns: int) -> torch.Tensor:
    return torch.full((index_size(rows, columns),), -1, dtype=torch.int32)


def test_the_sections_of_a_topology_by_hand() -> None:
    # .XX
    # ...
    # XXX   Row-major order: (0, 1) (0, 2) (2, 0) (2, 1) (2, 2).
    flags = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1]]).bool()
    parts = sections(build_index_reference(flags), 3, 3)
    assert parts.row_start.tolist() == [0, 2, 2, 5]
    assert parts.row_block.tolist() == [1, 2, 0, 1, 2, 0, 0, 0, 0, 0]
    assert parts.column_start.tolist() == [0, 1, 3, 5]
    assert parts.column_block.tolist() == [2, 0, 2, 0, 2, 0, 0, 0, 0, 0]
    assert parts.column_position.tolist() == [2, 0, 3, 1, 4, 0, 0, 0, 0, 0]
    # Rows hold 2, 0 and 3 blocks; columns 1, 2 and 2, the tie to the lower.
    assert parts.row_order.tolist() == [2, 0, 1] and parts.column_order.tolist() == [1, 2, 0]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), density=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99)
)
def test_an_index_lists_the_kept_blocks_of_every_row_and_column(
    rows: int, columns: int, density: float, seed: int
) -> None:
    flags = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    index = build_index_reference(flags)
    assert index.dtype == torch.int32 and index.numel() == index_size(rows, columns)
    parts = sections(index, rows, columns)
    pairs = flags.nonzero().tolist()
    for i in range(rows):
        start, end = parts.row_start[i : i + 2]
        assert parts.row_block[start:end].tolist() == flags[i].nonzero().flatten().tolist()
    for j in range(columns):
        start, end = parts.column_start[j : j + 2]
        assert parts.column_block[start:end].tolist() == flags[:, j].nonzero().flatten().tolist()
        positions = parts.column_position[start:end].tolist()
        assert [pairs[p] for p in positions] == [[i, j] for i in parts.column_block[start:end].tolist()]
    kept = len(pairs)
    assert parts.row_start[-1] == parts.column_start[-1] == kept
    for entries in (parts.row_block, parts.column_block, parts.column_position):
        assert entries.numel() == rows * columns + 1 and not entries[kept:].any()
    assert parts.row_order.tolist() == sorted(range(rows), key=lambda i: (-int(flags[i].sum()), i))
    assert parts.column_order.tolist() == sorted(range(columns), key=lambda j: (-int(flags[:, j].sum()), j))


def test_sections_share_the_memory_of_the_index() -> None:
    index = build_index_reference(torch.ones(2, 3, dtype=torch.bool))
    sections(index, 2, 3).column_order[-1] = 7
    assert index[-1] == 7


@pytest.mark.parametrize("through_table", [False, True])
def test_all_layers_are_rewritten_in_place_as_the_flags_move(through_table: bool) -> None:
    flags = [torch.rand(3, 4) < 0.5, torch.rand(1, 7) < 0.5]
    indices = [index_of(3, 4), index_of(1, 7)]
    table = IndexTable(flags, indices)
    for _ in range(2):
        table.build() if through_table else build_indices(flags, indices)
        assert all(torch.equal(i, build_index_reference(f)) for f, i in zip(flags, indices, strict=True))
        for one in flags:
            one.logical_not_()
    build_indices([], [])
    IndexTable([], []).build()


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 20), k=st.integers(1, 20), r=st.integers(1, 6), c=st.integers(1, 6), transposed=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_block_is_flagged_where_any_of_its_elements_is_kept(
    n: int, k: int, r: int, c: int, transposed: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(k, n, generator=random).t() < 0.1 if transposed else torch.rand(n, k, generator=random) < 0.1
    flags = block_flags(mask, (r, c))
    expected = [[bool(mask[i : i + r, j : j + c].any()) for j in range(0, k, c)] for i in range(0, n, r)]
    assert flags.tolist() == expected and flags.is_contiguous()


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    mask, grad_mask = torch.zeros(6, 8, dtype=torch.bool), torch.zeros(6, 8, dtype=torch.bool)
    mask[:2, 4:], grad_mask[4:, :4] = True, True
    return mask, grad_mask


def test_a_topology_has_an_index_of_each_set_of_flags() -> None:
    mask, grad_mask = masks()
    kept = torch.tensor([[0, 1], [0, 0], [0, 0]]).bool()
    wanted = torch.tensor([[0, 1], [0, 0], [1, 0]]).bool()
    alone, both = (Topology.of(mask, given, (2, 4), turn=turn) for given, turn in ((None, None), (grad_mask, turned)))
    assert torch.equal(alone.flags, kept) and torch.equal(alone.index, build_index_reference(kept))
    assert alone.grad_index is alone.input_index is None and len(alone.pairs()) == 1
    assert both.grad_index is not None and torch.equal(both.grad_index, build_index_reference(wanted))
    assert both.input_index is not None and torch.equal(both.input_index, build_index_reference(turned(kept)))
    assert all(torch.equal(index, build_index_reference(flags)) for flags, index in both.pairs())


def turned(flags: torch.Tensor) -> torch.Tensor:
    return flags.t().contiguous()


def test_a_topology_is_current_until_one_of_its_masks_is_written_or_another_takes_its_place() -> None:
    mask, grad_mask = masks()
    topology = Topology.of(mask, grad_mask, (2, 4))
    assert topology.is_current(mask, grad_mask) and topology.is_current(mask.t(), grad_mask.t())
    # Equal values in other tensors, and no set B.
    assert not topology.is_current(mask.clone(), grad_mask) and not topology.is_current(mask, None)
    # A part of a mask is a mask of its own.
    half = Topology.of(mask[:3], None, (1, 1))
    assert not half.is_current(mask[3:], None) and not half.is_current(mask, None)
    for each in (mask, grad_mask):
        each[0, 0] = True
        assert not topology.is_current(mask, grad_mask)
        assert topology.rewrite(mask, grad_mask) and topology.is_current(mask, grad_mask)


def test_a_topology_made_of_oriented_masks_is_current_for_those_of_the_layer() -> None:
    linear = masks()[0]
    images = torch.zeros(4, 2, 3, 3, dtype=torch.bool).contiguous(memory_format=torch.channels_last)
    for mask, matrix in ((linear, linear.t()), (images, images.permute(0, 2, 3, 1).flatten(1))):
        topology = Topology.of(matrix, None, (2, 2))
        assert topology.is_current(mask, None)
        mask[0] = True
        assert not topology.is_current(mask, None)


def test_flags_are_rewritten_in_place_where_they_fit() -> None:
    mask, grad_mask = masks()
    topology = Topology.of(mask, grad_mask, (2, 4), turn=turned)
    before = [(flags.data_ptr(), index.data_ptr()) for flags, index in topology.pairs()]
    assert topology.rewrite(~mask, grad_mask, turn=turned)
    IndexTable(*zip(*topology.pairs(), strict=True)).build()
    fresh = Topology.of(~mask, grad_mask, (2, 4), turn=turned)
    assert before == [(flags.data_ptr(), index.data_ptr()) for flags, index in topology.pairs()]
    for (flags, index), (expected, of_expected) in zip(topology.pairs(), fresh.pairs(), strict=True):
        assert torch.equal(flags, expected) and torch.equal(index, of_expected)
    for others in ((mask, None, turned), (mask[:4], grad_mask[:4], turned), (mask, grad_mask, None)):
        assert not topology.rewrite(*others[:2], turn=others[2])
    assert torch.equal(topology.flags, fresh.flags)


FLAGS, INDEX = torch.ones(2, 3, dtype=torch.bool), index_of(2, 3)


@pytest.mark.parametrize(
    ("call", "expected", "remedy"),
    [
        (lambda: build_indices([FLAGS], []), "one index for each layer's flags", "layer by layer"),
        (lambda: build_indices([FLAGS], [INDEX], "cuda"), 'backend "torch" or "triton"', "pass either"),
        (lambda: build_indices([FLAGS.int()], [INDEX]), "contiguous bool [R, C]", "block_flags"),
        (lambda: build_indices([FLAGS.t()], [INDEX]), "contiguous bool [R, C]", "block_flags"),
        (lambda: build_indices([FLAGS[:, :0]], [INDEX]), "at least one block", "leave out weights"),
        (lambda: build_indices([FLAGS], [INDEX[1:]]), "int32 [33], that of 2 x 3 blocks", "index_size(R, C)"),
        (lambda: build_indices([FLAGS], [INDEX.long()]), "contiguous int32", "index_size(R, C)"),
        (lambda: IndexTable([FLAGS], [INDEX.to("meta")]), "all flags and indices on cpu", "one call for each device"),
        (lambda: sections(INDEX, 3, 3), "that of 3 x 3 blocks", "index_size(R, C)"),
        (lambda: block_flags(FLAGS.int(), (1, 1)), "mask to be a bool matrix", "True where kept"),
        (lambda: block_flags(FLAGS, (0, 1)), "block to be (rows, columns) of at least 1", "(64, 64)"),
        (lambda: Topology.of(FLAGS, FLAGS.t(), (1, 1)), "grad_mask of [2, 3] on cpu", "of the weight's shape"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(call: Any, expected: str, remedy: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert ": expected " in str(error.value) and expected in str(error.value) and remedy in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_triton_off_the_gpu_is_an_error() -> None:
    with pytest.raises(RuntimeError, match='pass backend="torch"'):
        build_indices([FLAGS], [INDEX], "triton")
