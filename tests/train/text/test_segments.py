"""Columns of a stream, blocks of a stream: what each step holds, whatever ranks and accumulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.train.text.segments import BlockBatches, PartEpochs, SegmentBatches

STREAM = np.arange(100, 123, dtype=np.int32)


def test_columns_go_on_from_step_to_step_by_hand() -> None:
    # 23 tokens in 2 columns of 11: 100 ... 110 and 111 ... 121; 122 is left over.
    batches = SegmentBatches(STREAM, batch_size=2, tgt_len=4)
    assert batches.steps_per_epoch == 3
    steps = [batches.step_batches(0, step)[0] for step in range(3)]
    assert [segment.first for segment in steps] == [True, False, False]
    assert [segment.input_ids.tolist() for segment in steps] == [
        [[100, 101, 102, 103], [111, 112, 113, 114]],
        [[104, 105, 106, 107], [115, 116, 117, 118]],
        [[108, 109], [119, 120]],
    ]
    assert [segment.target_ids.tolist() for segment in steps] == [
        [[101, 102, 103, 104], [112, 113, 114, 115]],
        [[105, 106, 107, 108], [116, 117, 118, 119]],
        [[109, 110], [120, 121]],
    ]
    assert [segment.weight for segment in steps] == [8, 8, 4]


@given(
    tokens=st.integers(20, 200), batch_size=st.sampled_from([2, 4, 6]), tgt_len=st.integers(1, 6), roll=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_an_epoch_reads_each_column_once_rolled_or_not(tokens: int, batch_size: int, tgt_len: int, roll: bool) -> None:
    stream = np.arange(tokens, dtype=np.int32)
    length = tokens // batch_size
    if length < tgt_len + 1:
        with pytest.raises(ValueError, match="one segment a column"):
            SegmentBatches(stream, batch_size=batch_size, tgt_len=tgt_len)
        return
    batches = SegmentBatches(stream, batch_size=batch_size, tgt_len=tgt_len, roll=roll, seed=3)
    for epoch in (0, 1):
        steps = [batches.step_batches(epoch, step)[0] for step in range(batches.steps_per_epoch)]
        inputs = torch.cat([segment.input_ids for segment in steps], dim=1)
        targets = torch.cat([segment.target_ids for segment in steps], dim=1)
        assert inputs.shape == targets.shape == (batch_size, length - 1)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        whole = torch.cat([inputs, targets[:, -1:]], dim=1)
        columns = torch.arange(batch_size * length).view(batch_size, length)
        assert torch.equal(whole.sort(dim=1).values, columns)
        for row, column in zip(whole, columns, strict=True):
            # A rotation: it begins somewhere in its column and wraps once.
            assert torch.equal(row, column.roll(-int(row[0] - column[0])))
        if not roll:
            assert torch.equal(whole, columns)


def test_the_roll_is_a_function_of_seed_and_epoch() -> None:
    def starts(seed: int, epoch: int) -> list[int]:
        batches = SegmentBatches(np.arange(4000, dtype=np.int32), batch_size=4, tgt_len=5, roll=True, seed=seed)
        return batches.step_batches(epoch, 0)[0].input_ids[:, 0].tolist()

    assert starts(0, 1) == starts(0, 1)
    assert len({tuple(starts(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(("chunks", "world"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("kind", ["segments", "blocks"])
def test_ranks_and_accumulation_only_divide_the_columns(kind: str, chunks: int, world: int) -> None:
    stream = np.arange(500, dtype=np.int32)

    def build(chunks: int, world: int, rank: int) -> SegmentBatches | BlockBatches:
        if kind == "segments":
            return SegmentBatches(
                stream, batch_size=6, tgt_len=5, roll=True, seed=1, chunks=chunks, rank=rank, world=world
            )
        return BlockBatches(stream, batch_size=6, block_size=5, seed=1, chunks=chunks, rank=rank, world=world)

    (whole,) = build(1, 1, 0).step_batches(2, 3)
    parts = [build(chunks, world, rank).step_batches(2, 3) for rank in range(world)]
    rebuilt = torch.cat([parts[rank][chunk].input_ids for chunk in range(chunks) for rank in range(world)])
    assert torch.equal(rebuilt, whole.input_ids)
    assert build(chunks, world, 0).steps_per_epoch == build(1, 1, 0).steps_per_epoch


def test_blocks_cover_the_stream_once_an_epoch_in_another_order_each() -> None:
    stream = np.arange(101, dtype=np.int32)
    batches = BlockBatches(stream, batch_size=5, block_size=4)
    assert (batches.blocks, batches.steps_per_epoch) == (25, 5)
    orders = []
    for epoch in (0, 1):
        steps = [batches.step_batches(epoch, step)[0] for step in range(5)]
        targets = torch.cat([block.target_ids for block in steps])
        assert all(torch.equal(block.input_ids[:, 1:], block.target_ids[:, :-1]) for block in steps)
        assert sorted(targets.flatten().tolist()) == list(range(1, 101))
        orders.append(targets[:, 0].tolist())
    assert orders[0] != orders[1]
    assert torch.equal(batches.step_batches(0, 2)[0].target_ids[:, 0], torch.tensor(orders[0][10:15]))


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_parts_of_epochs_are_the_same_steps_in_the_same_order(steps: int) -> None:
    whole = SegmentBatches(STREAM, batch_size=2, tgt_len=4, roll=True)
    parts = PartEpochs(whole, steps)
    assert parts.steps_per_epoch == steps
    for step in range(14):
        (expected,) = whole.step_batches(step // 3, step % 3)
        (found,) = parts.step_batches(step // steps, step % steps)
        assert torch.equal(found.input_ids, expected.input_ids) and found.first == expected.first == (step % 3 == 0)
    with pytest.raises(ValueError, match="--steps_per_epoch"):
        PartEpochs(whole, 0)


def test_what_does_not_fit_is_refused_with_the_option_to_change() -> None:
    for build in (
        lambda: SegmentBatches(STREAM, batch_size=3, tgt_len=2, chunks=2),
        lambda: BlockBatches(STREAM, batch_size=3, block_size=2, world=2),
    ):
        with pytest.raises(ValueError, match="--batch_size or --gradient_accumulation_steps"):
            build()
    with pytest.raises(ValueError, match=r"2 columns x 13 tokens\), got 23 tokens; lower --batch_size or --tgt_len"):
        SegmentBatches(STREAM, batch_size=2, tgt_len=12)
    with pytest.raises(ValueError, match="at least 6 blocks of 4 tokens, got 23 tokens"):
        BlockBatches(STREAM, batch_size=6, block_size=4)
    with pytest.raises(ValueError, match="tgt_len of at least 1"):
        SegmentBatches(STREAM, batch_size=2, tgt_len=0)
