"""Where kept blocks are: the index by hand and against a dense walk, topologies of masks, and what is refused."""

from typing import Any

import pytest
import torch
from cases.block import check_indices
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonsparse.kernels.block.topology import (
    IndexTable,
    Topology,
    block_flags,
    build_index_reference,
    build_indices,
    index_size,
    sections,
)


def test_the_sections_of_an_index_by_hand() -> None:
    # .XX
    # ...
    # XXX   Row-major order: (0, 1) (0, 2) (2, 0) (2, 1) (2, 2).
    index = build_index_reference(torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1]]).bool())
    parts = sections(index, 3, 3)
    assert parts.row_start.tolist() == [0, 2, 2, 5]
    assert parts.row_block.tolist() == [1, 2, 0, 1, 2, 0, 0, 0, 0, 0]
    assert parts.column_start.tolist() == [0, 1, 3, 5]
    assert parts.column_block.tolist() == [2, 0, 2, 0, 2, 0, 0, 0, 0, 0]
    assert parts.column_position.tolist() == [2, 0, 3, 1, 4, 0, 0, 0, 0, 0]
    # Rows hold 2, 0 and 3 blocks; columns 1, 2 and 2, the tie to the lower.
    assert parts.row_order.tolist() == [2, 0, 1] and parts.column_order.tolist() == [1, 2, 0]
    parts.column_order[-1] = 7
    assert index[-1] == 7


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), kept=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 9))
def test_an_index_lists_the_blocks_of_rows_and_columns(rows: int, columns: int, kept: float, seed: int) -> None:
    flags = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < kept
    index = build_index_reference(flags)
    assert index.dtype == torch.int32 and index.numel() == index_size(rows, columns)
    parts, pairs = sections(index, rows, columns), flags.nonzero().tolist()
    position = [pairs.index([i, j]) for j in range(columns) for i in range(rows) if flags[i, j]]
    padding = [0] * (rows * columns + 1 - len(pairs))
    assert parts.column_position.tolist() == position + padding
    for lines, start, block, order in (
        (flags, parts.row_start, parts.row_block, parts.row_order),
        (flags.t(), parts.column_start, parts.column_block, parts.column_order),
    ):
        counts = lines.sum(1).tolist()
        assert start.tolist() == [sum(counts[:i]) for i in range(len(counts) + 1)]
        assert block.tolist() == lines.nonzero()[:, 1].tolist() + padding
        assert order.tolist() == sorted(range(len(counts)), key=lambda i: (-counts[i], i))


def test_all_layers_are_rewritten_in_place_as_the_flags_move() -> None:
    for shapes in ([(3, 4), (1, 7)], []):
        check_indices(shapes, "torch")


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)), block=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    transposed=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_blocks_are_flagged(shape: tuple[int, int], block: tuple[int, int], transposed: bool, seed: int) -> None:
    mask, (r, c) = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.1, block
    mask = mask.t().contiguous().t() if transposed else mask
    expected = [[bool(mask[i : i + r, j : j + c].any()) for j in range(0, shape[1], c)] for i in range(0, shape[0], r)]
    flags = block_flags(mask, block)
    assert flags.tolist() == expected and flags.is_contiguous()


def turned(flags: Tensor) -> Tensor:
    return flags.t().contiguous()


@pytest.fixture
def masks() -> tuple[Tensor, Tensor]:
    mask, grad_mask = torch.zeros(6, 8, dtype=torch.bool), torch.zeros(6, 8, dtype=torch.bool)
    mask[:2, 4:], grad_mask[4:, :4] = True, True
    return mask, grad_mask


def test_a_topology_has_an_index_of_each_set_of_flags(masks: tuple[Tensor, Tensor]) -> None:
    kept, wanted = torch.tensor([[[0, 1], [0, 0], [0, 0]], [[0, 1], [0, 0], [1, 0]]]).bool()
    alone, both = Topology.of(masks[0], None, (2, 4)), Topology.of(*masks, (2, 4), turn=turned)
    assert torch.equal(alone.flags, kept) and torch.equal(alone.index, build_index_reference(kept))
    assert alone.grad_index is alone.input_index is None and len(alone.pairs()) == 1
    for index, flags in ((both.index, kept), (both.grad_index, wanted), (both.input_index, turned(kept))):
        assert index is not None and torch.equal(index, build_index_reference(flags))


def test_a_topology_is_current_until_a_mask_is_written_or_another_takes_its_place(masks: tuple[Tensor, Tensor]) -> None:
    (mask, grad_mask), topology = masks, Topology.of(*masks, (2, 4))
    # A view of all of a mask counts as the mask; equal values in another tensor do not, nor does a part.
    assert topology.is_current(mask, grad_mask) and topology.is_current(mask.t(), grad_mask.t())
    assert not topology.is_current(mask.clone(), grad_mask) and not topology.is_current(mask, None)
    half = Topology.of(mask[:3], None, (1, 1))
    assert not half.is_current(mask[3:], None) and not half.is_current(mask, None)
    images = torch.zeros(4, 2, 3, 3, dtype=torch.bool).contiguous(memory_format=torch.channels_last)
    of_images = Topology.of(images.permute(0, 2, 3, 1).flatten(1), None, (2, 2))
    assert of_images.is_current(images, None)
    for each in (mask, grad_mask):
        each[0, 0] = True
        assert not topology.is_current(mask, grad_mask)
        assert topology.rewrite(mask, grad_mask) and topology.is_current(mask, grad_mask)


def test_flags_are_rewritten_in_place_where_they_fit(masks: tuple[Tensor, Tensor]) -> None:
    mask, grad_mask = masks
    topology, fresh = (Topology.of(each, grad_mask, (2, 4), turn=turned) for each in (mask, ~mask))
    before = [(flags, index) for flags, index in topology.pairs()]
    assert topology.rewrite(~mask, grad_mask, turn=turned)
    IndexTable(*zip(*before, strict=True)).build()
    for ours, theirs in zip(topology.pairs(), fresh.pairs(), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    for others, turn in (((mask, None), turned), ((mask[:4], grad_mask[:4]), turned), (masks, None)):
        assert not topology.rewrite(*others, turn=turn)
    assert torch.equal(topology.flags, fresh.flags)


FLAGS, INDEX = torch.ones(2, 3, dtype=torch.bool), torch.zeros(index_size(2, 3), dtype=torch.int32)


@pytest.mark.parametrize(("call", "expected", "remedy"), [
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
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_remedy(call: Any, expected: str, remedy: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert ": expected " in str(error.value) and expected in str(error.value) and remedy in str(error.value)
