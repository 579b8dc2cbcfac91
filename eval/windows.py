"""How a text is read by a language model: in segments with a memory, or through a sliding window.

Both hand out every token but the text's first as a target exactly once; only what stands before it differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = [
    "IGNORED",
    "Ids",
    "equal_windows",
    "refuse_other_ids",
    "refuse_short",
    "segment_settings",
    "segments",
    "windows",
]

Ids = NDArray[np.integer[Any]]
IGNORED = -100


def refuse_short(function: str, stream: Ids, least: int) -> None:
    if len(stream) < least:
        raise ValueError(
            f"{function}: expected a text of at least {least} tokens, one segment and the token after it, got "
            f"{len(stream)}; give more text, or shorter segments or fewer columns"
        )


def refuse_other_ids(function: str, stream: Ids, vocabulary: int) -> None:
    largest = int(np.max(stream)) if len(stream) else 0
    if largest >= vocabulary:
        raise ValueError(
            f"{function}: expected ids of the model's vocabulary of {vocabulary} types, got {largest}; give the "
            f"vocabulary that the model was trained with"
        )


@contextlib.contextmanager
def segment_settings(
    model: nn.Module, *, mem_len: int | None, clamp_len: int | None, same_length: bool | None
) -> Iterator[None]:
    """The model in eval mode under other settings of memory; its own come back afterwards. None keeps its own.

    Raises:
        ValueError: a negative memory, or same_length without one: a token would see nothing, not even itself.
    """
    config: Any = model.config
    chosen = {"mem_len": mem_len, "clamp_len": clamp_len, "same_length": same_length}
    before = {name: getattr(config, name) for name in chosen}
    wanted = {name: before[name] if value is None else value for name, value in chosen.items()}
    if wanted["mem_len"] < 0:
        raise ValueError(f"perplexity: expected mem_len of at least 0, got {wanted['mem_len']}; 0 keeps no memory")
    if wanted["same_length"] and wanted["mem_len"] == 0:
        raise ValueError(
            "perplexity: expected a memory with same_length, got mem_len 0, under which a token sees nothing; give "
            "mem_len, or leave same_length out"
        )
    training = model.training
    try:
        for name, value in wanted.items():
            setattr(config, name, value)
        model.eval()
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        model.train(training)


def segments(stream: Ids, *, batch_size: int, tgt_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(input_ids, target_ids) `[batch_size, <= tgt_len]`, int64: the text in columns, all but its first token targets.

    Columns are of equal length but for the last ones, whose missing targets are -100.

    Raises:
        ValueError: tgt_len or batch_size below 1, or a text shorter than one segment a column.
    """
    if tgt_len < 1 or batch_size < 1:
        raise ValueError(
            f"perplexity: expected tgt_len and batch_size of at least 1, got {tgt_len} and {batch_size}; correct them"
        )
    refuse_short("perplexity", stream, batch_size * tgt_len + 1)
    pairs = len(stream) - 1
    length = -(-pairs // batch_size)
    place = np.arange(batch_size)[:, None] * length + np.arange(length)
    # Column c targets tokens c length + 1 ... (c + 1) length, and starts from the token before them.
    inputs = np.asarray(stream)[np.minimum(place, pairs - 1)].astype(np.int64)
    targets = np.where(place < pairs, np.asarray(stream)[np.minimum(place + 1, pairs)], IGNORED).astype(np.int64)
    for begin in range(0, length, tgt_len):
        part = slice(begin, begin + tgt_len)
        yield torch.from_numpy(inputs[:, part]), torch.from_numpy(targets[:, part])


def windows(tokens: int, *, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, scored): the window reads ids begin ... end - 1 and scores the last `scored` of their successors.

    Every one of the tokens - 1 successors is scored once, from the longest context that its window gives.

    Raises:
        ValueError: stride is not in 1 ... window.
    """
    if not 1 <= stride <= window:
        raise ValueError(
            f"perplexity: expected a stride from 1 to the window, got stride {stride} and window {window}; correct them"
        )
    done, pairs = 0, tokens - 1
    while done < pairs:
        end = min(pairs, window if done == 0 else done + stride)
        yield max(0, end - window), end, end - done
        done = end


def equal_windows(every: Iterator[tuple[int, int, int]], batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Neighbours of equal length and equal count of scored tokens, at most batch_size of them."""
    group: list[tuple[int, int, int]] = []
    for begin, end, scored in every:
        if group and (len(group) == batch_size or (end - begin, scored) != (group[0][1] - group[0][0], group[0][2])):
            yield group
            group = []
        group.append((begin, end, scored))
    if group:
        yield group
