"""Beam search over a test set: sorted, batched by tokens, with every search value stated.

The best translation maximises  sum_t log p(y_t | y_<t, x) / |y|^p  over the beam, p the length penalty.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .command_line import real, whole

__all__ = ["BEAMS", "LENGTH_PENALTY", "translate"]

logger = logging.getLogger(__name__)

# Of command lines: a beam of more would be a mistake, and the length's power is to stay a float32.
BEAMS, LENGTH_PENALTY = whole(1, 1024), real(-10.0, 10.0)

# What a checkpoint's generation config may still say: which tokens begin a translation, which must not occur.
# These are facts about the vocabulary. Everything that shapes the search comes from the caller.
_TOKEN_FACTS = (
    "bos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)


def translate(
    model: Any,
    tokenizer: Any,
    sources: Sequence[str],
    *,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    extra_tokens: int = 50,
    max_tokens_per_batch: int = 4096,
    progress: bool = False,
) -> list[str]:
    """Translates `sources` by beam search and returns the translations in their order.

    Nothing of the search is read from the checkpoint: transformers 5 drops generation values on a model
    config silently, and those of a generation config differ between checkpoints. Each sentence has its own
    length limit, so a translation does not depend on its batch (up to floating-point rounding).
    In distributed evaluation each process passes its own slice.

    Args:
        model: an unwrapped encoder-decoder model with `generate`; its mode is restored, module by module.
        tokenizer: its tokenizer, with padding and end-of-sentence tokens.
        sources: sentences; one without any token is translated as "".
        num_beams: beam width; 1 is greedy search.
        length_penalty: p in score = sum of log-probabilities / length^p. Not the alpha of GNMT and
            tensor2tensor, whose denominator is ((5 + length) / 6)^alpha.
        extra_tokens: a translation may have this many tokens more than its source.
        max_tokens_per_batch: source tokens in a batch, padding included; memory grows with this times
            `num_beams`.
        progress: show a progress bar on stderr.

    Returns:
        One translation for each source, without special tokens.

    Raises:
        ValueError: a value out of range, a tokenizer without the two tokens, or one that is not this model's.
    """
    if isinstance(sources, str):
        raise ValueError("translate: expected a list of sentences, got one string; pass [sentence]")
    for name, value in (
        ("num_beams", num_beams),
        ("extra_tokens", extra_tokens),
        ("max_tokens_per_batch", max_tokens_per_batch),
    ):
        if value < 1:
            raise ValueError(f"translate: expected {name} of at least 1, got {value}; pass a larger one")
    if not hasattr(model, "generate"):
        raise ValueError(
            f"translate: expected a model with generate(), got {type(model).__name__}; "
            "unwrap it first, for instance by accelerator.unwrap_model(model)"
        )
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or eos is None:
        raise ValueError(
            f"translate: expected a tokenizer with pad and eos tokens, got pad {pad} and eos {eos}; "
            "set tokenizer.pad_token and tokenizer.eos_token"
        )

    rows = _encode(model, tokenizer, sources)
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    device = next(model.parameters()).device
    translations = [""] * len(sources)
    with _evaluating(model) as facts, tqdm(total=len(rows), unit="sentence", disable=not progress) as bar:
        for batch in _batches([len(row) for row in rows], max_tokens_per_batch):
            ids = [torch.tensor(rows[i]) for i in batch]
            limits = torch.tensor([min(len(row) + extra_tokens, positions) for row in ids], device=device)
            search: dict[str, Any] = {"num_beams": num_beams, "do_sample": False, "num_return_sequences": 1}
            if num_beams > 1:
                search |= {"length_penalty": length_penalty, "early_stopping": False}
            attended = [torch.ones_like(row) for row in ids]
            generated = model.generate(
                input_ids=pad_sequence(ids, batch_first=True, padding_value=pad).to(device),
                attention_mask=pad_sequence(attended, batch_first=True).to(device),
                generation_config=GenerationConfig(
                    **facts, **search, max_new_tokens=int(limits.max()), pad_token_id=pad, eos_token_id=eos
                ),
                logits_processor=LogitsProcessorList([_SentenceLimits(limits, num_beams, pad, eos)]),
            )
            # Clean-up would undo spaces that the tokenizer put there on purpose.
            texts = tokenizer.batch_decode(generated, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for i, text in zip(batch, texts, strict=True):
                translations[i] = text.strip()
            bar.update(len(batch))
    return translations


class _SentenceLimits(LogitsProcessor):
    """Ends each sentence at its own limit, and keeps padding out of translations.

    `max_new_tokens` is one number for a batch: with it alone, a short sentence beside a long one may run on.
    """

    def __init__(self, limits: torch.Tensor, num_beams: int, pad: int, eos: int) -> None:
        self.limits = limits.repeat_interleave(num_beams)  # [B * beams], beams of a sentence side by side
        self.first_limit = int(limits.min())
        self.pad, self.eos = pad, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` — `[B * beams, V]`, log-probabilities of the next token, overwritten in place."""
        generated = input_ids.shape[1] - 1  # the decoder's start token is not generated
        if self.pad != self.eos:
            scores[:, self.pad] = -torch.inf
        if generated + 1 < self.first_limit:
            return scores
        last = (generated + 1 >= self.limits)[:, None]
        only_eos = torch.full_like(scores, -torch.inf)
        only_eos[:, self.eos] = 0.0
        return torch.where(last, only_eos, scores)


@contextmanager
def _evaluating(model: Any) -> Iterator[dict[str, Any]]:
    """Sets evaluation mode and hides the checkpoint's generation config; yields the token facts in it."""
    modes = {module: module.training for module in model.modules()}
    saved = model.generation_config
    facts = {name: value for name in _TOKEN_FACTS if (value := getattr(saved, name, None)) is not None}
    # The model's own config is what training shifted its labels by, so it goes first.
    if (start := getattr(model.config, "decoder_start_token_id", None)) is not None:
        facts["decoder_start_token_id"] = start
    # generate() fills every value left at None from this object, even when it is given a config of its own.
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield facts
    finally:
        model.generation_config = saved
        for module, training in modes.items():
            module.training = training


def _encode(model: Any, tokenizer: Any, sources: Sequence[str]) -> list[list[int]]:
    """Token ids of each source, cut where the model has no more positions (logged)."""
    rows: list[list[int]] = tokenizer(list(sources))["input_ids"] if sources else []
    vocabulary = model.get_input_embeddings().weight.shape[0]
    largest = max((max(row) for row in rows if row), default=0)
    if largest >= vocabulary:
        raise ValueError(
            f"translate: expected token ids below {vocabulary} (the model's embeddings), got {largest}; "
            "load model and tokenizer from the same checkpoint"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or all(len(row) <= limit for row in rows):
        return rows
    long = sum(len(row) > limit for row in rows)
    logger.warning("translate: %d of %d sources are cut to the model's %d positions", long, len(rows), limit)
    return [row if len(row) <= limit else row[: limit - 1] + row[-1:] for row in rows]


def _batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows, longest first, so that padding is little and the largest batch fails first."""
    order = sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size
