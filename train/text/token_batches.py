"""Batches of about equal token counts: built once a run, shuffled each epoch by (seed, epoch).

A batch of n pairs costs n max(longest source, longest target) padded tokens, at most `max_tokens` of them
(fairseq's --max-tokens). Pairs of like length share a batch. Because batches are built once, an epoch has a
fixed number of optimizer steps; because their order is a function of (seed, epoch), a resumed run sees what
the run that never stopped would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Batch", "TokenBatches"]

Ids = Sequence[int]


@dataclass(frozen=True)
class Batch:
    """Padded tensors of one batch, int64.

    input_ids, attention_mask: [B, S]; decoder_input_ids, labels: [B, T], labels -100 where padded.
    """

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor
    labels: Tensor

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """What the model's forward takes, on `device`."""
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        return {name: getattr(self, name).to(device, non_blocking=True) for name in names}

    @property
    def weight(self) -> int:
        """Labels that count in the loss: what its sum is divided by."""
        return int((self.labels != -100).sum())


class TokenBatches:
    """Token batches of one rank.

    Args:
        pairs: token ids (source, target), each ending in its end token.
        max_tokens: padded tokens a batch may hold.
        pad, start: padding id, and the id the decoder starts from.
        seed: orders pairs of equal length, and batches within an epoch.
        group: batches that make one optimizer step over all ranks (ranks x accumulation); an epoch is cut to a
            whole number of groups.
        rank, world: this process and how many there are.

    Raises:
        ValueError: a pair is longer than `max_tokens`, or there are fewer batches than one group.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Ids, Ids]],
        *,
        max_tokens: int,
        pad: int,
        start: int,
        seed: int = 0,
        group: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.pairs, self.pad, self.start, self.seed = pairs, pad, start, seed
        self.group, self.rank, self.world = group, rank, world
        longest = max((max(len(source), len(target)) for source, target in pairs), default=0)
        if longest > max_tokens:
            raise ValueError(
                f"TokenBatches: expected pairs of at most max_tokens={max_tokens} tokens, got one of {longest}; raise "
                f"--max_tokens_per_batch or cut sentences with --max_source_length and --max_target_length"
            )
        self.batches = _build(pairs, max_tokens, seed)
        self._shuffled: tuple[int, list[int]] | None = None
        if len(self.batches) < group:
            raise ValueError(
                f"TokenBatches: expected at least {group} batches (processes x accumulation steps), got "
                f"{len(self.batches)} of {max_tokens} tokens from {len(pairs)} pairs; lower --max_tokens_per_batch or "
                f"--gradient_accumulation_steps"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self.batches) // self.group

    def step_batches(self, epoch: int, step: int) -> list[Batch]:
        """This rank's batches of optimizer step `step` of epoch `epoch`, in order of accumulation."""
        mine = self._order(epoch)[step * self.group : (step + 1) * self.group][self.rank :: self.world]
        return [self.collate(self.batches[index]) for index in mine]

    def _order(self, epoch: int) -> list[int]:
        # Kept for the epoch: shuffling a large corpus anew at every step would cost more than some steps.
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = list(range(len(self.batches)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._shuffled = (epoch, order)
        return self._shuffled[1]

    def collate(self, indices: Sequence[int]) -> Batch:
        """Pad the pairs at `indices` into tensors."""
        sources = [self.pairs[index][0] for index in indices]
        targets = [self.pairs[index][1] for index in indices]
        input_ids = _pad(sources, self.pad)
        return Batch(
            input_ids=input_ids,
            attention_mask=_pad([[1] * len(source) for source in sources], 0),
            decoder_input_ids=_pad([[self.start, *target[:-1]] for target in targets], self.pad),
            labels=_pad(targets, -100),
        )


def _build(pairs: Sequence[tuple[Ids, Ids]], max_tokens: int, seed: int) -> list[list[int]]:
    order = list(range(len(pairs)))
    # Shuffled first: the sort is stable, so pairs of one length meet in random company.
    random.Random(f"{seed}/build").shuffle(order)
    order.sort(key=lambda index: (max(len(pairs[index][0]), len(pairs[index][1])), len(pairs[index][0])))
    batches: list[list[int]] = []
    current: list[int] = []
    for index in order:
        # Ascending, so the pair that comes is the longest of its batch.
        length = max(len(pairs[index][0]), len(pairs[index][1]))
        if current and (len(current) + 1) * length > max_tokens:
            batches.append(current)
            current = []
        current.append(index)
    if current:
        batches.append(current)
    return batches


def _pad(rows: Sequence[Ids], value: int) -> Tensor:
    padded = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded
