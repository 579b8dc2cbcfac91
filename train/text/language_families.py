"""The two kinds of language model that the program trains, and what differs between them.

                  ids                       a step                            perplexity
Recurrent         words (`Vocabulary`)      segments, memory carried along    by segments, a word each
Causal            subwords (a tokenizer)    blocks that stand alone           by a sliding window, a word by counting
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonsparse.eval.perplexity import Perplexity, causal_perplexity, segment_perplexity
from tritonsparse.models.transfo_xl import Vocabulary

from ..run.loop import Batches
from .language_presets import GPT2, TRANSFO_XL, build_gpt2, build_transfo_xl
from .lines import Text
from .memory import SegmentMemory
from .segments import Block, BlockBatches, SegmentBatches
from .subwords import train_byte_tokenizer
from .token_streams import VOCABULARY_FILE, Ids, encode_with_tokenizer, vocabulary_fingerprint

__all__ = ["Causal", "Family", "Recurrent"]

SUBWORDS = 4096
# Arguments of one kind that mean nothing to the other; None where not given.
OF_RECURRENT = (
    "tgt_len", "mem_len", "eval_tgt_len", "eval_mem_len", "test_tgt_len", "test_mem_len", "test_clamp_len",
    "test_same_length", "min_count", "dropatt", "roll",
)  # fmt: skip
OF_CAUSAL = ("block_size", "eval_stride", "vocab_size")


class Family(Protocol):
    """What the program asks of a kind of model; made from its arguments and, where given, a saved model."""

    encoder: Any
    model: Any

    def encoding(self) -> tuple[Callable[[Sequence[str]], Any], str]:
        """`encode` and `encoder` of `token_stream`."""

    def batches(self, stream: Ids, chunks: int, rank: int, world: int) -> Batches:
        """The steps of an epoch."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss summed over the tokens of a batch."""

    def register(self, accelerator: Any) -> None:
        """Save and load what the model carries from step to step."""

    def refuse_short(self, split: str, stream: Ids) -> None:
        """Refuse a split that cannot be scored.

        Raises:
            ValueError: it is shorter than one segment a column.
        """

    def perplexity(self, model: nn.Module, stream: Ids, words: int | None, *, final: bool) -> Perplexity:
        """Of a split: as after each epoch, or as at the end of the run."""

    def example(self) -> dict[str, Any]:
        """Inputs of one typical forward, by which its multiply-adds are counted."""

    def save_encoder(self, folder: Path) -> None:
        """Write vocabulary or tokenizer beside a saved model."""


def refuse_arguments(args: argparse.Namespace, names: Sequence[str], kind: str) -> None:
    """Refuse arguments of the other kind of model.

    Raises:
        ValueError: one of them is given.
    """
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(
                f"language_modeling: expected no --{name} for {kind}, got {getattr(args, name)}; leave it out"
            )


class Recurrent:
    """A Transformer-XL.

    Raises:
        ValueError: an argument does not fit, named.
    """

    def __init__(self, args: argparse.Namespace, train: Text, saved: tuple[Any, Any] | None) -> None:
        refuse_arguments(args, OF_CAUSAL, "a Transformer-XL")
        self.args, self.memory = args, SegmentMemory()
        if saved is None:
            sizes = TRANSFO_XL[args.preset]
            self.encoder: Any = Vocabulary.count(train, 1 if args.min_count is None else args.min_count)
            self.tgt_len = args.tgt_len or sizes.tgt_len
            mem_len = self.tgt_len if args.mem_len is None else args.mem_len
            self.model: Any = build_transfo_xl(
                args.preset, len(self.encoder), mem_len=mem_len, dropout=args.dropout, dropatt=args.dropatt
            )
        else:
            self.encoder, self.model = saved
            if args.mem_len is not None:
                self.model.config.mem_len = args.mem_len
            # The segments of a model's training are not saved with it; its memory was as long as one.
            self.tgt_len = args.tgt_len or self.model.config.mem_len or 64
        self._refuse_blind_tokens()

    def _refuse_blind_tokens(self) -> None:
        """In evaluations that come after hours of training."""
        args, config = self.args, self.model.config
        evaluated = config.mem_len if args.eval_mem_len is None else args.eval_mem_len
        tested = evaluated if args.test_mem_len is None else args.test_mem_len
        same_length = config.same_length if args.test_same_length is None else args.test_same_length
        for name, length, same in (
            ("mem_len", config.mem_len, config.same_length),
            ("eval_mem_len", evaluated, config.same_length),
            ("test_mem_len", tested, same_length),
        ):
            if same and not length:
                raise ValueError(
                    f"language_modeling: expected --{name} above 0 with same_length, under which a token without "
                    f"memory sees nothing, got {length}; raise it, or leave same_length out"
                )

    def encoding(self) -> tuple[Callable[[Sequence[str]], Any], str]:
        return self.encoder.encode, vocabulary_fingerprint(self.encoder)

    def batches(self, stream: Ids, chunks: int, rank: int, world: int) -> Batches:
        args = self.args
        batches = SegmentBatches(
            stream, batch_size=args.batch_size, tgt_len=self.tgt_len, roll=bool(args.roll), seed=args.seed,
            chunks=chunks, rank=rank, world=world,
        )  # fmt: skip
        length, mem_len = batches.columns.shape[1], self.model.config.mem_len
        if mem_len >= length:
            raise ValueError(
                f"language_modeling: expected a memory shorter than a column ({length} tokens: {len(stream)} in "
                f"{args.batch_size} columns), got --mem_len {mem_len}; lower it or --batch_size, or give more text"
            )
        return batches

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.memory(model, batch)

    def register(self, accelerator: Any) -> None:
        self.memory.register(accelerator)

    def refuse_short(self, split: str, stream: Ids) -> None:
        args = self.args
        tgt_len = args.eval_tgt_len or self.tgt_len
        least = {"validation": args.eval_batch_size * tgt_len + 1}
        least["test"] = args.test_batch_size * (args.test_tgt_len or tgt_len) + 1
        if len(stream) < least[split]:
            raise ValueError(
                f"language_modeling: expected a {split} text of at least one segment a column, {least[split]} tokens, "
                f"got {len(stream)}; lower the columns and segments of its evaluation, or give more text"
            )

    def perplexity(self, model: nn.Module, stream: Ids, words: int | None, *, final: bool) -> Perplexity:
        args = self.args
        tgt_len = args.eval_tgt_len or self.tgt_len
        mem_len = self.model.config.mem_len if args.eval_mem_len is None else args.eval_mem_len
        if not final:
            return segment_perplexity(model, stream, tgt_len=tgt_len, mem_len=mem_len, batch_size=args.eval_batch_size)
        return segment_perplexity(
            model, stream, tgt_len=args.test_tgt_len or tgt_len,
            mem_len=mem_len if args.test_mem_len is None else args.test_mem_len,
            clamp_len=args.test_clamp_len, same_length=args.test_same_length, batch_size=args.test_batch_size,
        )  # fmt: skip

    def example(self) -> dict[str, Any]:
        config = self.model.config
        ids = torch.zeros(1, self.tgt_len, dtype=torch.int64)
        memory = torch.zeros(config.mem_len, 1, config.d_model, dtype=next(self.model.parameters()).dtype)
        return {"input_ids": ids, "target_ids": ids, "mems": [memory] * config.n_layer}

    def save_encoder(self, folder: Path) -> None:
        self.encoder.save(folder / VOCABULARY_FILE)


class Causal:
    """Any other causal language model.

    Raises:
        ValueError: an argument does not fit, named.
    """

    def __init__(self, args: argparse.Namespace, train: Text, saved: tuple[Any, Any] | None) -> None:
        refuse_arguments(args, OF_RECURRENT, "a causal model without a memory")
        self.args = args
        if saved is None:
            self.encoder: Any = train_byte_tokenizer(train, args.vocab_size or SUBWORDS)
            self.model: Any = build_gpt2(args.preset, self.encoder, dropout=args.dropout)
        else:
            self.encoder, self.model = saved
        # A text's end is that of its tokenizer's patience only; blocks are cut here.
        self.encoder.model_max_length = int(1e30)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self.block_size = args.block_size or min(positions or 1024, 1024)
        if positions is not None and self.block_size > positions > 0:
            raise ValueError(
                f"language_modeling: expected --block_size of at most the model's {positions} positions, got "
                f"{self.block_size}; lower it"
            )
        stride = args.eval_stride
        if stride is not None and not 1 <= stride <= self.block_size:
            raise ValueError(
                f"language_modeling: expected --eval_stride from 1 to the block size {self.block_size}, got {stride}; "
                f"correct it"
            )

    def encoding(self) -> tuple[Callable[[Sequence[str]], Any], str]:
        return encode_with_tokenizer(self.encoder)

    def batches(self, stream: Ids, chunks: int, rank: int, world: int) -> Batches:
        return BlockBatches(
            stream, batch_size=self.args.batch_size, block_size=self.block_size, seed=self.args.seed, chunks=chunks,
            rank=rank, world=world,
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: Block) -> Tensor:
        device = next(model.parameters()).device
        logits = model(input_ids=batch.input_ids.to(device, non_blocking=True), use_cache=False).logits
        return F.cross_entropy(
            logits.float().flatten(0, 1), batch.target_ids.to(device, non_blocking=True).flatten(), reduction="sum"
        )

    def register(self, accelerator: Any) -> None:
        """Nothing is carried from block to block."""

    def refuse_short(self, split: str, stream: Ids) -> None:
        if len(stream) < 2:
            raise ValueError(
                f"language_modeling: expected a {split} text of at least 2 tokens, got {len(stream)}; give more text"
            )

    def perplexity(self, model: nn.Module, stream: Ids, words: int | None, *, final: bool) -> Perplexity:
        start = self.encoder.bos_token_id if self.encoder.bos_token_id is not None else self.encoder.eos_token_id
        if start is not None:
            # So that the first token of the text is scored too.
            stream = np.concatenate([np.asarray([start], dtype=stream.dtype), stream])
        return causal_perplexity(
            model, stream, window=self.block_size, stride=(self.args.eval_stride if final else None),
            batch_size=self.args.eval_batch_size, words=words,
        )  # fmt: skip

    def example(self) -> dict[str, Any]:
        return {"input_ids": torch.zeros(1, self.block_size, dtype=torch.int64)}

    def save_encoder(self, folder: Path) -> None:
        self.encoder.save_pretrained(folder)


def make_family(args: argparse.Namespace, train: Text, saved: tuple[Any, Any] | None) -> Family:
    """The kind that --preset names, or that a saved (encoder, model) is of."""
    recurrent = args.preset in TRANSFO_XL if saved is None else isinstance(saved[0], Vocabulary)
    assert saved is not None or recurrent or args.preset in GPT2
    return Recurrent(args, train, saved) if recurrent else Causal(args, train, saved)
