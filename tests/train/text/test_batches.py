"""Columns, blocks and token batches, whatever ranks and accumulation; the memory that is carried along columns."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel
from tritonsparse.train.text.memory import SegmentMemory
from tritonsparse.train.text.segments import BlockBatches, PartEpochs, SegmentBatches
from tritonsparse.train.text.token_batches import Batch, TokenBatches

STREAM = np.arange(100, 123, dtype=np.int32)
WORDS = np.random.default_rng(0).integers(30, size=100).astype(np.int32)


@given(st.integers(20, 200), st.sampled_from([2, 4, 6]), st.integers(1, 6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_an_epoch_reads_each_column_once_rolled_or_not(tokens: int, batch_size: int, tgt_len: int, roll: bool) -> None:
    stream, length = np.arange(tokens, dtype=np.int32), tokens // batch_size
    if length < tgt_len + 1:
        with pytest.raises(ValueError, match="one segment a column"):
            SegmentBatches(stream, batch_size=batch_size, tgt_len=tgt_len)
        return
    batches = SegmentBatches(stream, batch_size=batch_size, tgt_len=tgt_len, roll=roll, seed=3)
    columns = torch.arange(batch_size * length).view(batch_size, length)
    for epoch in (0, 1):
        steps = [batches.step_batches(epoch, step)[0] for step in range(batches.steps_per_epoch)]
        inputs = torch.cat([segment.input_ids for segment in steps], dim=1)
        targets = torch.cat([segment.target_ids for segment in steps], dim=1)
        # Whole segments but for the last; memory begins with the first.
        widths = [min(tgt_len, length - 1 - begin) for begin in range(0, length - 1, tgt_len)]
        assert [(each.weight, each.first) for each in steps] == [(batch_size * w, n == 0) for n, w in enumerate(widths)]
        assert inputs.shape == targets.shape == (batch_size, length - 1)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        whole = torch.cat([inputs, targets[:, -1:]], dim=1)
        assert torch.equal(whole.sort(dim=1).values, columns)
        for row, column in zip(whole, columns, strict=True):
            # A rotation: it begins somewhere in its column and wraps once.
            assert torch.equal(row, column.roll(-int(row[0] - column[0])))
        assert roll or torch.equal(whole, columns)


def test_the_roll_is_a_function_of_seed_and_epoch() -> None:
    def starts(seed: int, epoch: int) -> tuple[int, ...]:
        batches = SegmentBatches(np.arange(4000, dtype=np.int32), batch_size=4, tgt_len=5, roll=True, seed=seed)
        return tuple(batches.step_batches(epoch, 0)[0].input_ids[:, 0].tolist())

    assert starts(0, 1) == starts(0, 1)
    assert len({starts(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(("chunks", "world"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("kind", [SegmentBatches, BlockBatches])
def test_ranks_and_accumulation_only_divide_the_columns(kind: Any, chunks: int, world: int) -> None:
    sizes = {"tgt_len": 5, "roll": True} if kind is SegmentBatches else {"block_size": 5}

    def build(**options: int) -> Any:
        return kind(np.arange(500, dtype=np.int32), batch_size=6, seed=1, **sizes, **options)

    (whole,) = build().step_batches(2, 3)
    ranks = [build(chunks=chunks, rank=rank, world=world) for rank in range(world)]
    parts = [rank.step_batches(2, 3) for rank in ranks]
    rebuilt = torch.cat([parts[rank][chunk].input_ids for chunk in range(chunks) for rank in range(world)])
    assert torch.equal(rebuilt, whole.input_ids)
    assert ranks[0].steps_per_epoch == build().steps_per_epoch


def test_blocks_cover_the_stream_once_an_epoch_in_another_order_each() -> None:
    batches = BlockBatches(np.arange(101, dtype=np.int32), batch_size=5, block_size=4)
    assert (batches.blocks, batches.steps_per_epoch) == (25, 5)
    orders = []
    for epoch in (0, 1):
        steps = [batches.step_batches(epoch, step)[0] for step in range(5)]
        targets = torch.cat([block.target_ids for block in steps])
        assert all(torch.equal(block.input_ids[:, 1:], block.target_ids[:, :-1]) for block in steps)
        assert sorted(targets.flatten().tolist()) == list(range(1, 101))
        orders.append(targets[:, 0].tolist())
    assert orders[0] != orders[1]
    assert batches.step_batches(0, 2)[0].target_ids[:, 0].tolist() == orders[0][10:15]


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_parts_of_epochs_are_the_same_steps_in_the_same_order(steps: int) -> None:
    whole = SegmentBatches(STREAM, batch_size=2, tgt_len=4, roll=True)
    parts = PartEpochs(whole, steps)
    assert parts.steps_per_epoch == steps
    for step in range(14):
        (expected,) = whole.step_batches(step // 3, step % 3)
        (found,) = parts.step_batches(step // steps, step % steps)
        assert torch.equal(found.input_ids, expected.input_ids) and found.first == expected.first == (step % 3 == 0)


def test_what_does_not_fit_is_refused_with_the_option_to_change() -> None:
    segments, blocks = partial(SegmentBatches, STREAM, batch_size=2), partial(BlockBatches, STREAM)
    for build, words in (
        (lambda: segments(batch_size=3, tgt_len=2, chunks=2), "--batch_size or --gradient_accumulation_steps"),
        (lambda: blocks(batch_size=3, block_size=2, world=2), "--batch_size or --gradient_accumulation_steps"),
        (lambda: segments(tgt_len=12), r"2 columns x 13 tokens\), got 23 tokens; lower --batch_size or --tgt_len"),
        (lambda: blocks(batch_size=6, block_size=4), "at least 6 blocks of 4 tokens, got 23 tokens"),
        (lambda: segments(tgt_len=0), "tgt_len of at least 1"),
        (lambda: PartEpochs(segments(tgt_len=4), 0), "--steps_per_epoch"),
    ):
        with pytest.raises(ValueError, match=words):
            build()


@pytest.fixture
def model() -> TransfoXLLMHeadModel:
    torch.manual_seed(0)
    config = TransfoXLConfig(
        vocab_size=30, cutoffs=[10], d_model=16, d_embed=16, n_head=2, d_head=8, d_inner=32, div_val=1, n_layer=2,
        mem_len=64, clamp_len=-1, same_length=False, init_std=0.3, dropout=0.0,
    )  # fmt: skip
    return TransfoXLLMHeadModel(config).double()


def losses(memory: SegmentMemory, model: Any, batches: SegmentBatches, steps: range) -> list[float]:
    return [sum(memory(model, segment).item() for segment in batches.step_batches(0, step)) for step in steps]


def test_the_losses_of_an_epoch_are_those_of_whole_columns_whatever_the_chunks(model: TransfoXLLMHeadModel) -> None:
    batches, memory = SegmentBatches(WORDS, batch_size=2, tgt_len=7), SegmentMemory()
    columns = torch.from_numpy(WORDS.reshape(2, 50).astype(np.int64))
    whole = model(columns[:, :-1], target_ids=columns[:, 1:]).losses
    first = losses(memory, model, batches, range(7))
    assert first == pytest.approx([piece.sum().item() for piece in whole.split(7, dim=1)], rel=1e-9)
    # The memory starts anew where the stream does, and holds no graph.
    assert losses(memory, model, batches, range(7)) == first
    assert memory(model, batches.step_batches(0, 0)[0]).requires_grad
    assert not any(tensor.requires_grad for tensor in memory.chunks[0])
    # Each chunk of columns has a memory of its own.
    together, apart = (SegmentBatches(WORDS, batch_size=4, tgt_len=6, chunks=chunks) for chunks in (1, 2))
    steps, memory = range(together.steps_per_epoch), SegmentMemory()
    assert losses(memory, model, apart, steps) == pytest.approx(losses(SegmentMemory(), model, together, steps))
    assert sorted(memory.chunks) == [0, 1] and memory.chunks[0][0].shape[1] == 2


def test_a_saved_memory_goes_on_as_if_never_stopped(tmp_path: Path, model: TransfoXLLMHeadModel) -> None:
    """Twelve chunks, of which 10 sorts before 2."""
    batches = SegmentBatches(WORDS, batch_size=12, tgt_len=3, chunks=12)
    memory, resumed, accelerators = SegmentMemory(), SegmentMemory(), []
    for each in (memory, resumed):
        accelerators.append(Accelerator(cpu=True))
        accelerators[-1].prepare(model)
        each.register(accelerators[-1])
    losses(memory, model, batches, range(2))
    accelerators[0].save_state(str(tmp_path))
    expected = losses(memory, model, batches, range(2, 3))
    accelerators[1].load_state(str(tmp_path))
    assert losses(resumed, model, batches, range(2, 3)) == expected
    assert (tmp_path / "memory_0.safetensors").is_file()


END = 1


def corpus(count: int = 120, longest: int = 20) -> list[tuple[list[int], list[int]]]:
    """Pair i starts with the id 100 + i on both sides, so that a batch says which pairs it holds."""
    draw = random.Random(0)
    lengths = [(draw.randint(2, longest), draw.randint(2, longest)) for _ in range(count)]
    return [
        ([100 + i, *[7] * (left - 2), END], [100 + i, *[8] * (right - 2), END])
        for i, (left, right) in enumerate(lengths)
    ]


def make(pairs: Any = None, **changes: Any) -> TokenBatches:
    return TokenBatches(corpus() if pairs is None else pairs, **{"max_tokens": 60, "pad": 0, "start": END} | changes)


def held(batches: list[Batch]) -> list[int]:
    return [int(row[0]) - 100 for batch in batches for row in batch.input_ids]


def epoch(batches: TokenBatches, number: int) -> list[list[int]]:
    return [held(batches.step_batches(number, step)) for step in range(batches.steps_per_epoch)]


def test_three_pairs_are_padded_as_by_hand() -> None:
    pairs = [([5, 6, 1], [7, 1]), ([8, 1], [9, 10, 11, 1]), ([12, 13, 1], [14, 15, 1])]
    batch = make(pairs).collate([0, 1, 2])
    assert batch.input_ids.tolist() == [[5, 6, 1], [8, 1, 0], [12, 13, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[7, 1, -100, -100], [9, 10, 11, 1], [14, 15, 1, -100]]
    # The start token (here the end token), then the labels but the last.
    assert batch.decoder_input_ids.tolist() == [[1, 7, 0, 0], [1, 9, 10, 11], [1, 14, 15, 0]]
    assert batch.weight == 2 + 4 + 3
    assert {getattr(batch, name).dtype for name in vars(batch)} == {torch.int64}
    # What the model gets is everything but the labels.
    assert set(batch.inputs(torch.device("cpu"))) == {"input_ids", "attention_mask", "decoder_input_ids"}


def test_batches_keep_to_the_budget_are_nearly_full_and_hold_pairs_of_like_length() -> None:
    pairs, costs, spreads = corpus(600), [], []
    batches = make(pairs)
    for indices in batches.batches:
        batch = batches.collate(indices)
        costs.append(len(indices) * max(batch.input_ids.shape[1], batch.labels.shape[1]))
        lengths = [max(len(side) for side in pairs[index]) for index in indices]
        spreads.append(max(lengths) - min(lengths))
    assert max(costs) <= 60 and sum(costs) / len(costs) > 0.8 * 60
    assert max(spreads) <= 4  # short ones fill a batch of several lengths; a random batch spreads over 18
    assert sum(spread <= 1 for spread in spreads) > 0.9 * len(spreads)
    # A pair that fills the budget alone is a batch of its own, and two that fill it together are one.
    assert make([([5] * 29 + [END], [6, END])] * 2).batches in ([[0, 1]], [[1, 0]])
    assert sorted(make([([5] * 59 + [END], [6, END]), ([5, END], [6, END])]).batches) == [[0], [1]]


def test_an_epoch_has_every_pair_once_or_leaves_out_others_each_time_by_seed_and_epoch_alone() -> None:
    for number in (0, 1, 5):
        assert sorted(index for step in epoch(make(), number) for index in step) == list(range(120))
    whole, batches, left_out = len(make().batches), make(group=4), []
    assert whole % 4, "the case needs a rest"
    assert batches.steps_per_epoch == whole // 4
    for number in (0, 1):
        seen = [index for step in epoch(batches, number) for index in step]
        assert len(seen) == len(set(seen)) < 120
        left_out.append(set(range(120)) - set(seen))
    assert left_out[0] != left_out[1]
    # The order is a function of seed and epoch, not of what was read before.
    third, batches = epoch(make(), 3), make()
    assert epoch(make(), 3) == third
    assert third != epoch(make(), 4) and third != epoch(make(seed=1), 3)
    random.seed(5)
    later = held(batches.step_batches(1, 7))
    epoch(batches, 0)
    random.seed(6)
    assert held(batches.step_batches(1, 7)) == later


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_every_step_equally(world: int) -> None:
    alone, ranks = make(group=4), [make(group=4, rank=rank, world=world) for rank in range(world)]
    assert {rank.steps_per_epoch for rank in ranks} == {alone.steps_per_epoch}
    for step in range(alone.steps_per_epoch):
        shares = [rank.step_batches(2, step) for rank in ranks]
        assert [len(share) for share in shares] == [4 // world] * world
        together = [index for share in shares for index in held(share)]
        assert len(together) == len(set(together))
        assert sorted(together) == sorted(held(alone.step_batches(2, step)))


def test_what_cannot_be_batched_is_refused() -> None:
    for pairs, group, words in (
        ([([5, END], [6] * 60 + [END])], 1, r"at most max_tokens=60 tokens, got one of 61.*--max_tokens_per_batch"),
        ([([5, END], [6, END])] * 2, 8, r"at least 8 batches.*got 1 of 60 tokens from 2 pairs; lower"),
        ([], 1, "at least 1 batches"),
    ):
        with pytest.raises(ValueError, match=words):
            make(pairs, group=group)
