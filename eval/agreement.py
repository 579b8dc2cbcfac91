"""How alike two models predict: AC/DC's dense and sparse twins (arXiv:2106.12379, appendix B.5), or any two.

    python -m tritonsparse.eval.agreement --first RUN/best_dense/pretrained --second RUN/best_sparse/pretrained \\
        --text_file wiki.test.tokens

    agreement       fraction of predictions with the same first choice
    cross-entropy   mean of -sum_y p_first(y) log p_second(y), in nats; at least the entropy of p_first, printed with it

A prediction is a token of a text (language models), of a reference that both are given (translation, teacher-forced),
or a class. Sums are in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tritonsparse.eval.command_line import COUNT, DEVICE, TEXT, Parser, one_line
from tritonsparse.eval.language_models import encode, load_language_model
from tritonsparse.eval.text_files import parallel_lines, read_lines
from tritonsparse.eval.windows import IGNORED, Ids, equal_windows, refuse_other_ids, segments, windows
from tritonsparse.models.transfo_xl import TransfoXLLMHeadModel, Vocabulary

__all__ = ["Agreement", "Predictions", "agreement", "classification", "language", "translation"]

# Logits of both models [..., C], and which of them count: bool [...], None = all.
Predictions = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Agreement:
    """agreement in [0, 1]; cross_entropy and entropy (of the first) in nats; predictions: how many were compared."""

    agreement: float
    cross_entropy: float
    entropy: float
    predictions: int

    def __str__(self) -> str:
        return (
            f"agreement {self.agreement:.2%}, cross-entropy {self.cross_entropy:.4f} nats (the first model's own "
            f"entropy {self.entropy:.4f}) over {self.predictions:,} predictions"
        )


@torch.no_grad()
def agreement(pairs: Iterable[Predictions]) -> Agreement:
    """Compare two models' logits, batch by batch.

    Args:
        pairs: logits of the first and of the second model, equal shapes `[..., C]`, any floating dtype, unnormalised or
            log-probabilities; and a bool tensor `[...]`, True where a prediction counts, or None.

    Raises:
        ValueError: shapes differ, or no prediction counts.
    """
    same = cross = own = 0.0
    count = 0
    for first, second, counted in pairs:
        if first.shape != second.shape:
            raise ValueError(
                f"agreement: expected logits of equal shape, got {list(first.shape)} and {list(second.shape)}; compare "
                f"models of one vocabulary, or of the same classes"
            )
        first, second = first.flatten(0, -2), second.flatten(0, -2)
        if counted is not None:
            first, second = first[counted.flatten()], second[counted.flatten()]
        p, q = (each.double() if each.dtype == torch.float64 else each.float() for each in (first, second))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        # A class of probability 0 under p adds nothing, whatever q says: 0 log 0 = 0.
        weight = p.exp()
        cross -= float(torch.where(weight > 0, weight * q, 0.0).double().sum())
        own -= float(torch.where(weight > 0, weight * p, 0.0).double().sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    if not count:
        raise ValueError(
            "agreement: expected at least one prediction, got none; pass a text or a set that is not empty"
        )
    return Agreement(same / count, cross / count, own / count, count)


def language(
    first: nn.Module,
    second: nn.Module,
    stream: Ids,
    *,
    tgt_len: int = 64,
    window: int | None = None,
    batch_size: int = 1,
) -> Agreement:
    """Two language models over one token stream, every token but the first predicted once.

    Args:
        first, second: two `TransfoXLLMHeadModel`s, each with its own memory and settings, or two other causal models.
        stream: ids `[tokens]` of the vocabulary that both share.
        tgt_len: Transformer-XL: tokens of a segment.
        window: other models: tokens read at a time, scored in its second half; None: 256, or fewer.
        batch_size: columns of the text, or windows at a time.

    Raises:
        ValueError: one model has a memory and the other has not, a text that is too short, or one of other ids, or a
            window that is longer than a model's positions.
    """
    recurrent = [isinstance(model, TransfoXLLMHeadModel) for model in (first, second)]
    if recurrent[0] != recurrent[1]:
        raise ValueError(
            "agreement: expected two models of one kind, got one with a memory and one without; their tokens differ"
        )
    positions = []
    for model in (first, second):
        config: Any = model.config
        refuse_other_ids("agreement", stream, config.vocab_size)
        longest = getattr(config, "max_position_embeddings", None)
        # Some models say -1 where any length does.
        positions += [longest] if longest and longest > 0 else []
    if recurrent[0]:
        return agreement(_evaluating(first, second, lambda: _by_segments(first, second, stream, tgt_len, batch_size)))
    least = min([window or 256, *positions])
    if window is not None and window > least:
        raise ValueError(
            f"agreement: expected a window of at most the models' {least} positions, got {window}; lower --window"
        )
    return agreement(_evaluating(first, second, lambda: _by_windows(first, second, stream, least, batch_size)))


def translation(
    first: Any,
    second: Any,
    tokenizer: Any,
    sources: Sequence[str],
    references: Sequence[str],
    *,
    batch_size: int = 16,
) -> Agreement:
    """Two sequence-to-sequence models, each predicting every token of the references from the true ones before it.

    Args:
        first, second: models of one tokenizer.
        sources, references: sentences, in pairs.
        batch_size: pairs at a time.

    Raises:
        ValueError: as many sources as references are wanted, and at least one.
    """
    if len(sources) != len(references):
        raise ValueError(
            f"agreement: expected a reference for each source, got {len(sources)} sources and {len(references)} "
            f"references; pass both files whole"
        )

    def pairs() -> Iterator[Predictions]:
        device = next(first.parameters()).device
        for begin in range(0, len(sources), batch_size):
            part = slice(begin, begin + batch_size)
            batch = tokenizer(
                list(sources[part]), text_target=list(references[part]), padding=True, return_tensors="pt"
            ).to(device)
            counted = batch["labels"] != tokenizer.pad_token_id
            # The model shifts labels itself; as labels, padding must be what it is, not a token to learn.
            labels = batch["labels"].masked_fill(~counted, IGNORED)
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
            yield first(**inputs).logits, second(**inputs).logits, counted

    return agreement(_evaluating(first, second, pairs))


def classification(first: nn.Module, second: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Agreement:
    """Two classifiers over batches of inputs.

    Args:
        first, second: called with a batch's keywords; they return `.logits` `[B, C]`, or the logits themselves.
        batches: keyword tensors, on the models' device.
    """

    def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output = model(**batch)
        result: Tensor = output if isinstance(output, Tensor) else output.logits
        return result

    def pairs() -> Iterator[Predictions]:
        for batch in batches:
            yield logits(first, batch), logits(second, batch), None

    return agreement(_evaluating(first, second, pairs))


@torch.no_grad()
def _evaluating(
    first: nn.Module, second: nn.Module, pairs: Callable[[], Iterator[Predictions]]
) -> Iterator[Predictions]:
    """`pairs` with both models in eval mode, whose modes come back afterwards."""
    modes = first.training, second.training
    first.eval(), second.eval()
    try:
        yield from pairs()
    finally:
        first.train(modes[0]), second.train(modes[1])


def _by_segments(first: Any, second: Any, stream: Ids, tgt_len: int, batch_size: int) -> Iterator[Predictions]:
    device = next(first.parameters()).device
    mems: list[Any] = [None, None]
    for input_ids, target_ids in segments(stream, batch_size=batch_size, tgt_len=tgt_len):
        outputs = [model(input_ids.to(device), mems=past) for model, past in zip((first, second), mems, strict=True)]
        mems = [output.mems for output in outputs]
        yield outputs[0].logits, outputs[1].logits, (target_ids != IGNORED).to(device)


def _by_windows(first: Any, second: Any, stream: Ids, window: int, batch_size: int) -> Iterator[Predictions]:
    device = next(first.parameters()).device
    every = windows(len(stream), window=window, stride=max(1, window // 2))
    for group in equal_windows(every, batch_size):
        ids = np.stack([stream[begin:end] for begin, end, _ in group]).astype(np.int64)
        scored = group[0][2]
        outputs = [model(input_ids=torch.from_numpy(ids).to(device)).logits[:, -scored:] for model in (first, second)]
        yield outputs[0], outputs[1], None


def parser() -> Parser:
    """The options; `main` reads them."""
    result = Parser("eval.agreement", __doc__)
    add = result.add_argument
    add("--first", type=TEXT, required=True, help="folder of a checkpoint")
    add("--second", type=TEXT, required=True, help="folder of a checkpoint with the same vocabulary")
    add("--text_file", type=TEXT, help="language models: UTF-8, .gz accepted")
    add("--source_file", type=TEXT, help="translation: one sentence a line")
    add("--reference_file", type=TEXT, help="translation: one reference a line")
    add("--tgt_len", type=COUNT, default=64, help="Transformer-XL: tokens of a segment")
    add("--window", type=COUNT, help="other language models: tokens read at a time (256, or fewer)")
    add("--batch_size", type=COUNT, default=1, help="columns, windows or pairs at a time")
    add("--device", type=DEVICE, help="default: the GPU if there is one")
    result.rules.append(_refuse_unfit)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two saved models on a text, or on parallel text; prints the result, and as JSON on the last line."""
    return one_line(lambda: _report(parser().parse_args(arguments)))


def _report(options: argparse.Namespace) -> int:
    result = _run(options)
    print(result)
    print(json.dumps({**asdict(result), "first": options.first, "second": options.second}))
    return 0


def _refuse_unfit(options: argparse.Namespace) -> None:
    given = [name for name in ("text_file", "source_file", "reference_file") if getattr(options, name) is not None]
    if given not in (["text_file"], ["source_file", "reference_file"]):
        got = ", ".join(f"--{name}" for name in given) or "neither"
        raise ValueError(
            f"agreement: expected --text_file, or --source_file with --reference_file, got {got}; give one"
        )


def _run(options: argparse.Namespace) -> Agreement:
    if options.text_file is None:
        # Heavy, and of the other program only.
        from tritonsparse.eval.bleu import load_seq2seq

        first, tokenizer = load_seq2seq(options.first, options.device)
        second, other = load_seq2seq(options.second, options.device)
        _refuse_other_words(tokenizer.get_vocab(), other.get_vocab())
        sources, references = parallel_lines("agreement", options.source_file, options.reference_file)
        return translation(first, second, tokenizer, sources, references, batch_size=options.batch_size)
    first, encoder = load_language_model("agreement", options.first, options.device)
    second, other = load_language_model("agreement", options.second, options.device)
    words = [each.ids if isinstance(each, Vocabulary) else each.get_vocab() for each in (encoder, other)]
    _refuse_other_words(*words)
    stream, _ = encode(encoder, read_lines("agreement", options.text_file))
    return language(
        first, second, stream, tgt_len=options.tgt_len, window=options.window, batch_size=options.batch_size
    )


def _refuse_other_words(first: dict[str, int], second: dict[str, int]) -> None:
    if first != second:
        raise ValueError(
            f"agreement: expected two models of one vocabulary, got {len(first)} and {len(second)} types that are not "
            f"the same; compare models of one run, or made with one vocabulary"
        )


if __name__ == "__main__":
    sys.exit(main())
