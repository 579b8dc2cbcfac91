"""Token batches: a budget of padded tokens, every pair once an epoch, an order that is a function of (seed, epoch)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tritonsparse.train.text.token_batches import Batch, TokenBatches

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


def test_an_epoch_has_every_pair_once_or_is_cut_to_whole_groups_and_leaves_out_others_each_time() -> None:
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


def test_the_order_is_a_function_of_seed_and_epoch_and_not_of_what_was_read_before() -> None:
    third, batches = epoch(make(), 3), make()
    assert epoch(make(), 3) == third
    assert third != epoch(make(), 4) and third != epoch(make(seed=1), 3)
    random.seed(5)
    later = held(batches.step_batches(1, 7))
    epoch(batches, 0)
    random.seed(6)
    assert held(batches.step_batches(1, 7)) == later


def test_what_cannot_be_batched_is_refused() -> None:
    for pairs, group, words in (
        ([([5, END], [6] * 60 + [END])], 1, r"at most max_tokens=60 tokens, got one of 61.*--max_tokens_per_batch"),
        ([([5, END], [6, END])] * 2, 8, r"at least 8 batches.*got 1 of 60 tokens from 2 pairs; lower"),
        ([], 1, "at least 1 batches"),
    ):
        with pytest.raises(ValueError, match=words):
            make(pairs, group=group)
