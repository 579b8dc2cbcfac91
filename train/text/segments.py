"""Batches of a token stream: segments whose memory is carried on, or blocks that stand alone.

SegmentBatches  the stream as batch_size columns, read from top to bottom tgt_len tokens at a time, so that column c of
                one step goes on where column c of the step before ended (Dai et al., arXiv:1901.02860, section 3.2)
BlockBatches    the stream as blocks of block_size tokens, shuffled each epoch by (seed, epoch)

In both, what a step holds is a function of (seed, epoch, step), and ranks and accumulation only divide its columns or
blocks: chunk k of rank r is the (k * world + r)-th part of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..run.loop import Batches
from .token_streams import Ids

__all__ = ["Block", "BlockBatches", "PartEpochs", "Segment", "SegmentBatches"]


@dataclass(frozen=True)
class Segment:
    """input_ids, target_ids: `[B, T]`, int64; chunk: whose memory it goes on with; first: it has none yet."""

    input_ids: Tensor
    target_ids: Tensor
    chunk: int
    first: bool

    @property
    def weight(self) -> int:
        """Tokens whose loss counts."""
        return self.target_ids.numel()


@dataclass(frozen=True)
class Block:
    """input_ids, target_ids: `[B, T]`, int64."""

    input_ids: Tensor
    target_ids: Tensor

    @property
    def weight(self) -> int:
        """Tokens whose loss counts."""
        return self.target_ids.numel()


def _refuse_uneven(name: str, batch_size: int, chunks: int, world: int) -> None:
    if batch_size < 1 or batch_size % (chunks * world):
        raise ValueError(
            f"{name}: expected a batch_size that {world} process(es) x {chunks} accumulation steps divide, got "
            f"{batch_size}; correct --batch_size or --gradient_accumulation_steps"
        )


class SegmentBatches:
    """Segments of a stream in columns.

    The stream is cut to batch_size columns of equal length (what is left over at its end, fewer than batch_size tokens,
    is not read); an epoch reads each column once, and its last segment may be shorter. Memory starts anew with each
    epoch, where the columns start again.

    Args:
        stream: int32 ids `[tokens]`.
        batch_size: columns, over all ranks and accumulation steps.
        tgt_len: tokens of a segment.
        roll: rotate every column by a random number of tokens each epoch, so that segments begin elsewhere
            (NVIDIA's --roll).
        seed: of the rotation.
        chunks: accumulation steps of an optimizer step, each with its own columns and memory.
        rank, world: this process and how many there are.

    Raises:
        ValueError: batch_size does not divide, or a column is shorter than one segment and its next token.
    """

    def __init__(
        self,
        stream: Ids,
        *,
        batch_size: int,
        tgt_len: int,
        roll: bool = False,
        seed: int = 0,
        chunks: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _refuse_uneven("SegmentBatches", batch_size, chunks, world)
        if tgt_len < 1:
            raise ValueError(f"SegmentBatches: expected tgt_len of at least 1, got {tgt_len}; correct --tgt_len")
        length = len(stream) // batch_size
        if length < tgt_len + 1:
            raise ValueError(
                f"SegmentBatches: expected a text of at least one segment a column ({batch_size} columns x "
                f"{tgt_len + 1} tokens), got {len(stream)} tokens; lower --batch_size or --tgt_len, or give more text"
            )
        # A view: a memory-mapped stream stays on disk.
        self.columns = stream[: length * batch_size].reshape(batch_size, length)
        self.tgt_len, self.roll, self.seed = tgt_len, roll, seed
        self.chunks, self.rank, self.world = chunks, rank, world

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-(self.columns.shape[1] - 1) // self.tgt_len)

    def step_batches(self, epoch: int, step: int) -> list[Segment]:
        """This rank's segments of optimizer step `step` of epoch `epoch`, one a chunk."""
        batch, length = self.columns.shape
        begin = step * self.tgt_len
        end = min(begin + self.tgt_len, length - 1)
        shifts = np.zeros(batch, dtype=np.int64)
        if self.roll:
            shifts = np.random.default_rng((self.seed, epoch)).integers(length, size=batch)
        width = batch // (self.chunks * self.world)
        segments = []
        for chunk in range(self.chunks):
            part = chunk * self.world + self.rank
            rows = np.arange(part * width, (part + 1) * width)
            places = (np.arange(begin, end + 1) + shifts[rows, None]) % length
            ids = torch.from_numpy(self.columns[rows[:, None], places].astype(np.int64))
            segments.append(Segment(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), chunk, step == 0))
        return segments


class BlockBatches:
    """Shuffled blocks of a stream.

    Block i predicts tokens i block_size + 1 ... (i + 1) block_size from those before them in the block; an epoch
    holds a whole number of batches.

    Args:
        stream: int32 ids `[tokens]`.
        batch_size: blocks of an optimizer step, over all ranks and accumulation steps.
        block_size: tokens of a block.
        seed: of the order.
        chunks: accumulation steps of an optimizer step.
        rank, world: this process and how many there are.

    Raises:
        ValueError: batch_size does not divide, or there are fewer blocks than one batch.
    """

    def __init__(
        self,
        stream: Ids,
        *,
        batch_size: int,
        block_size: int,
        seed: int = 0,
        chunks: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _refuse_uneven("BlockBatches", batch_size, chunks, world)
        if block_size < 1:
            raise ValueError(f"BlockBatches: expected block_size of at least 1, got {block_size}; correct --block_size")
        self.blocks = (len(stream) - 1) // block_size
        if self.blocks < batch_size:
            raise ValueError(
                f"BlockBatches: expected a text of at least {batch_size} blocks of {block_size} tokens, got "
                f"{len(stream)} tokens; lower --batch_size or --block_size, or give more text"
            )
        self.stream, self.batch_size, self.block_size, self.seed = stream, batch_size, block_size, seed
        self.chunks, self.rank, self.world = chunks, rank, world
        self._shuffled: tuple[int, NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.blocks // self.batch_size

    def step_batches(self, epoch: int, step: int) -> list[Block]:
        """This rank's batches of optimizer step `step` of epoch `epoch`, in order of accumulation."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.blocks))
        chosen = self._shuffled[1][step * self.batch_size : (step + 1) * self.batch_size]
        width = self.batch_size // (self.chunks * self.world)
        batches = []
        for chunk in range(self.chunks):
            part = chunk * self.world + self.rank
            rows = [self._block(int(number)) for number in chosen[part * width : (part + 1) * width]]
            ids = torch.from_numpy(np.stack(rows))
            batches.append(Block(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
        return batches

    def _block(self, number: int) -> NDArray[np.int64]:
        begin = number * self.block_size
        return self.stream[begin : begin + self.block_size + 1].astype(np.int64)


class PartEpochs:
    """The same steps under epochs of `steps` steps, so that evaluations and phases need not wait for a whole pass.

    Args:
        batches: the steps of whole passes over the text.
        steps: steps that are called an epoch, above or below those of a pass.

    Raises:
        ValueError: steps is below 1.
    """

    def __init__(self, batches: Batches, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"PartEpochs: expected steps of at least 1, got {steps}; correct --steps_per_epoch")
        self.batches, self.steps = batches, steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.steps

    def step_batches(self, epoch: int, step: int) -> list[Any]:
        """What the same step of the run holds in whole passes."""
        return self.batches.step_batches(*divmod(epoch * self.steps + step, self.batches.steps_per_epoch))
