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
        ([100 + i, *[7] * (source - 2), END], [100 + i, *[8] * (target - 2), END])
        for i, (source, target) in enumerate(lengths)
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


def test_what_the_model_gets_is_everything_but_the_labels() -> None:
    inputs = make().collate([0, 1]).inputs(torch.device("cpu"))
    assert set(inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}


def test_no_batch_holds_more_padded_tokens_than_the_budget_and_most_are_nearly_full() -> None:
    batches = make(corpus(600))
    costs = []
    for indices in batches.batches:
        batch = batches.collate(indices)
        costs.append(len(indices) * max(batch.input_ids.shape[1], batch.labels.shape[1]))
    assert max(costs) <= 60
    assert sum(costs) / len(costs) > 0.8 * 60


def test_pairs_of_like_length_share_a_batch() -> None:
    pairs = corpus(600)
    spreads = []
    for indices in make(pairs).batches:
        lengths = [max(len(side) for side in pairs[index]) for index in indices]
        spreads.append(max(lengths) - min(lengths))
    assert max(spreads) <= 4  # short ones fill a batch of several lengths; a random batch spreads over 18
    assert sum(spread <= 1 for spread in spreads) > 0.9 * len(spreads)


@pytest.mark.parametrize("number", [0, 1, 5])
def test_an_epoch_has_every_pair_exactly_once(number: int) -> None:
    seen = sorted(index for step in epoch(make(), number) for index in step)
    assert seen == list(range(120))


def test_an_epoch_is_cut_to_whole_groups_and_holds_no_pair_twice() -> None:
    whole = len(make().batches)
    batches = make(group=4)
    seen = [index for step in epoch(batches, 0) for index in step]
    assert whole % 4, "the case needs a rest"
    assert batches.steps_per_epoch == whole // 4
    assert len(seen) == len(set(seen)) < 120


def test_another_epoch_leaves_out_other_pairs() -> None:
    batches = make(group=4)
    left_out = [set(range(120)) - {i for step in epoch(batches, number) for i in step} for number in (0, 1)]
    assert left_out[0] != left_out[1]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_every_step_equally(world: int) -> None:
    alone = make(group=4)
    ranks = [make(group=4, rank=rank, world=world) for rank in range(world)]
    assert {rank.steps_per_epoch for rank in ranks} == {alone.steps_per_epoch}
    for step in range(alone.steps_per_epoch):
        shares = [rank.step_batches(2, step) for rank in ranks]
        assert [len(share) for share in shares] == [4 // world] * world
        together = [index for share in shares for index in held(share)]
        assert len(together) == len(set(together))
        assert sorted(together) == sorted(held(alone.step_batches(2, step)))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert epoch(make(), 3) == epoch(make(), 3)
    assert epoch(make(), 3) != epoch(make(), 4)
    assert epoch(make(), 3) != epoch(make(seed=1), 3)


def test_the_order_does_not_depend_on_what_was_read_before() -> None:
    batches = make()
    random.seed(5)
    later = held(batches.step_batches(1, 7))
    epoch(batches, 0)
    random.seed(6)
    assert held(batches.step_batches(1, 7)) == later


def test_a_pair_that_fills_the_budget_alone_is_a_batch_of_its_own() -> None:
    batches = make([([5] * 59 + [END], [6, END]), ([5, END], [6, END])])
    assert sorted(batches.batches) == [[0], [1]]


def test_a_pair_longer_than_the_budget_is_refused_with_its_length() -> None:
    with pytest.raises(ValueError, match=r"at most max_tokens=60 tokens, got one of 61.*--max_tokens_per_batch"):
        make([([5, END], [6] * 60 + [END])])


def test_fewer_batches_than_one_step_needs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 8 batches.*got 1 of 60 tokens from 2 pairs; lower"):
        make([([5, END], [6, END])] * 2, group=8)


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 batches"):
        make([])
