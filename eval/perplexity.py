"""Perplexity of language models: exact sums, every token scored once.

    python -m tritonsparse.eval.perplexity --model DIR --text_file wiki.test.tokens --tgt_len 64 --mem_len 640 \\
        --clamp_len 400 --same_length

Transformer-XL reads the text in segments of tgt_len tokens, with a memory of mem_len (Dai et al., arXiv:1901.02860).
With batch_size columns each but the first begins without memory; no token is left out at their ends. Other causal
models slide a window over the text, stride tokens at a time, and score the last ones of each.

    perplexity          exp(sum of -log p / tokens scored)
    word perplexity     exp(sum of -log p / (words between whitespace + lines)), to compare subwords with words

Sums are in float64. A number without its segment settings says little, so they are printed with it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tritonsparse.eval.command_line import COUNT, DEVICE, NATURAL, TEXT, Parser, one_line
from tritonsparse.eval.language_models import encode, load_language_model
from tritonsparse.eval.text_files import read_lines
from tritonsparse.eval.windows import (
    IGNORED,
    Ids,
    equal_windows,
    refuse_other_ids,
    refuse_short,
    segment_settings,
    segments,
    windows,
)
from tritonsparse.models.transfo_xl import TransfoXLLMHeadModel

__all__ = ["Perplexity", "causal_perplexity", "segment_perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """nll: sum of -log p over the `tokens` scored, in nats; words: what word perplexity divides by; settings."""

    nll: float
    tokens: int
    settings: dict[str, Any]
    words: int | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens); infinite where float64 ends."""
        return _exp(self.nll / self.tokens)

    @property
    def word_perplexity(self) -> float | None:
        """exp(nll / words), where words are known."""
        return None if self.words is None else _exp(self.nll / self.words)

    def __str__(self) -> str:
        said = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        word = "" if self.words is None else f", {self.word_perplexity:.2f} a word ({self.words:,} words and lines)"
        return f"perplexity {self.perplexity:.2f}{word}; {self.tokens:,} tokens scored; {said}"

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "perplexity": self.perplexity, "word_perplexity": self.word_perplexity}


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


@torch.no_grad()
def segment_perplexity(
    model: nn.Module,
    stream: Ids,
    *,
    tgt_len: int,
    mem_len: int | None = None,
    clamp_len: int | None = None,
    same_length: bool | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """Perplexity of a Transformer-XL over a token stream, memory carried from segment to segment.

    Args:
        model: a `TransfoXLLMHeadModel`; its mode and settings are as before afterwards.
        stream: ids `[tokens]`; the first is read and not scored.
        tgt_len: tokens of a segment.
        mem_len, clamp_len, same_length: as in `TransfoXLConfig`; None: the model's own.
        batch_size: columns that the text is cut into; 1 is the papers' protocol.

    Raises:
        ValueError: a text shorter than one segment a column, a setting without sense, or an id that is not the model's.
    """
    config: Any = model.config
    refuse_other_ids("perplexity", stream, config.vocab_size)
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens, mems = 0, None
    with segment_settings(model, mem_len=mem_len, clamp_len=clamp_len, same_length=same_length):
        names = ("mem_len", "clamp_len", "same_length", "same_length_rule")
        settings = {
            "tgt_len": tgt_len,
            **{name: getattr(config, name) for name in names},
            "columns": batch_size,
            "vocabulary": config.vocab_size,
        }
        for input_ids, target_ids in segments(stream, batch_size=batch_size, tgt_len=tgt_len):
            output = model(input_ids=input_ids.to(device), target_ids=target_ids.to(device), mems=mems)
            mems = output.mems
            total += output.losses.double().sum()
            tokens += int((target_ids != IGNORED).sum())
    return Perplexity(float(total), tokens, settings)


@torch.no_grad()
def causal_perplexity(
    model: nn.Module,
    stream: Ids,
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    words: int | None = None,
) -> Perplexity:
    """Perplexity of any causal language model over a token stream, by a sliding window.

    Args:
        model: called with input_ids, returning `.logits`.
        stream: ids `[tokens]`; the first (a begin-of-text token, or a token of the text) is read and not scored.
        window: tokens that the model reads at a time.
        stride: tokens scored a window, but in the first, which scores all; None: the window, no overlap.
        batch_size: windows at a time; it changes nothing but rounding.
        words: words and lines of the text, for perplexity a word.

    Raises:
        ValueError: a text of fewer than two tokens, an unfit window or stride, or an id that is not the model's.
    """
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None)
    if window < 1 or (longest is not None and window > longest > 0):
        raise ValueError(
            f"perplexity: expected a window from 1 to the model's {longest} positions, got {window}; correct --window"
        )
    stride = window if stride is None else stride
    refuse_short("perplexity", stream, 2)
    refuse_other_ids("perplexity", stream, config.vocab_size)
    device = next(model.parameters()).device
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    training = model.training
    model.eval()
    try:
        for group in equal_windows(windows(len(stream), window=window, stride=stride), batch_size):
            ids = np.stack([stream[begin : end + 1] for begin, end, _ in group]).astype(np.int64)
            batch = torch.from_numpy(ids).to(device)
            logits = model(input_ids=batch[:, :-1]).logits
            if logits.dtype != torch.float64:
                logits = logits.float()
            losses = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").double()
            scored = group[0][2]
            total += losses[:, losses.shape[1] - scored :].sum()
            tokens += scored * len(group)
    finally:
        model.train(training)
    settings = {"window": window, "stride": stride, "vocabulary": config.vocab_size}
    return Perplexity(float(total), tokens, settings, words)


def parser() -> Parser:
    """The options; `main` reads them."""
    result = Parser("eval.perplexity", __doc__)
    add = result.add_argument
    add("--model", type=TEXT, required=True, help="folder of the checkpoint, vocabulary or tokenizer included")
    add("--text_file", type=TEXT, required=True, help="UTF-8, .gz accepted")
    add("--batch_size", type=COUNT, help="columns of the text (1), or windows at a time (8)")
    add("--device", type=DEVICE, help="default: the GPU if there is one")
    add = result.add_argument_group("Transformer-XL").add_argument
    add("--tgt_len", type=COUNT, help="tokens of a segment (64)")
    add("--mem_len", type=NATURAL, help="tokens of memory (the model's own)")
    add("--clamp_len", type=NATURAL, help="distances beyond it count as it; 0: none do (the model's own)")
    add("--same_length", action=argparse.BooleanOptionalAction, help="every token sees as many (the model's own)")
    add = result.add_argument_group("other causal models").add_argument
    add("--window", type=COUNT, help="tokens read at a time (the model's positions, at most 1024)")
    add("--stride", type=COUNT, help="tokens scored at a time (half the window)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Perplexity of a saved language model over a text file; prints it, and all of it as JSON on the last line."""
    return one_line(lambda: _report(parser().parse_args(arguments)))


def _report(options: argparse.Namespace) -> int:
    result, seconds = _run(options)
    print(result)
    print(json.dumps({**result.as_dict(), "model": options.model, "seconds": round(seconds, 3)}))
    return 0


def _run(options: argparse.Namespace) -> tuple[Perplexity, float]:
    lines = read_lines("perplexity", options.text_file)
    model, encoder = load_language_model("perplexity", options.model, options.device)
    recurrent = isinstance(model, TransfoXLLMHeadModel)
    wrong = ("window", "stride") if recurrent else ("tgt_len", "mem_len", "clamp_len", "same_length")
    for name in wrong:
        if getattr(options, name) is not None:
            kind = "Transformer-XL" if recurrent else "causal model without a memory"
            raise ValueError(
                f"perplexity: expected no --{name} for a {kind}, got {getattr(options, name)}; leave it out"
            )
    stream, words = encode(encoder, lines)
    start = time.perf_counter()
    if recurrent:
        result = segment_perplexity(
            model, stream, tgt_len=64 if options.tgt_len is None else options.tgt_len, mem_len=options.mem_len,
            clamp_len=options.clamp_len, same_length=options.same_length,
            batch_size=1 if options.batch_size is None else options.batch_size,
        )  # fmt: skip
    else:
        positions = getattr(model.config, "max_position_embeddings", None) or 1024
        window = min(positions, 1024) if options.window is None else options.window
        result = causal_perplexity(
            model, stream, window=window, stride=max(1, window // 2) if options.stride is None else options.stride,
            batch_size=8 if options.batch_size is None else options.batch_size, words=words,
        )  # fmt: skip
    return result, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
