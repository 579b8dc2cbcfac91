"""Corpus BLEU.

    BLEU = BP * exp(1/4 sum_n log p_n),  BP = min(1, exp(1 - r/c)),  n = 1..4

with p_n the clipped n-gram precision over the whole corpus and c, r the lengths of hypotheses and references.
It is computed once, on detokenised text against the raw references, by sacreBLEU (Post 2018,
arXiv:1804.08771); the mean of per-batch scores is a different number. Scores are comparable only under equal
signatures, so every result carries its own.

As a program it scores any sequence-to-sequence checkpoint:

    python -m tritonsparse.eval.bleu --model DIR --source_file test.en --reference_file test.de
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tritonsparse.eval.bleu_tokenizers import choose_tokenizer, refuse_tokenizer
from tritonsparse.eval.checkpoints import load_pretrained, load_tokenizer
from tritonsparse.eval.command_line import COUNT, DEVICE, TEXT, Parser, one_line
from tritonsparse.eval.output_files import refuse_unwritable, write_whole
from tritonsparse.eval.text_files import parallel_lines, read_lines
from tritonsparse.eval.translate import BEAMS, LENGTH_PENALTY, translate

__all__ = ["BleuResult", "compound_split", "compound_split_bleu", "corpus_bleu", "load_seq2seq", "translate"]


@dataclass(frozen=True, kw_only=True)
class BleuResult:
    """A corpus score with everything needed to compare it.

    Args:
        score: BLEU, from 0 to 100.
        line: sacreBLEU's own line: signature, score, the four precisions, brevity penalty and lengths.
        signature: what the score depends on, such as
            `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0`.
    """

    score: float
    line: str
    signature: str


def corpus_bleu(
    hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool = False, tokenize: str = "13a"
) -> BleuResult:
    """Scores a whole test set against one reference per sentence.

    Args:
        hypotheses: detokenised translations of the whole test set, in its order.
        references: the untouched reference of each.
        lowercase: ignore case, as NVIDIA's published Transformer numbers do.
        tokenize: a sacreBLEU tokenizer; "13a" is what published scores use, but for languages that
            `tokenizer_for` knows others of.

    Returns:
        The score, its line and its signature.

    Raises:
        ValueError: unequal counts, nothing to score, or a tokenizer that is unknown or not installed.

    Example:
        >>> round(corpus_bleu(["the cat sat on the old mat"], ["the cat sat on the mat"]).score, 1)
        64.3
    """
    from sacrebleu.metrics.bleu import BLEU

    _check_pairs("corpus_bleu", hypotheses, references)
    refuse_tokenizer("corpus_bleu", tokenize)
    return _score(BLEU(lowercase=lowercase, tokenize=tokenize), hypotheses, references)


def compound_split(text: str) -> str:
    """Splits hyphenated compounds of tokenised text as the first Transformer papers did before scoring.

    Example:
        >>> compound_split("eine rein-deutsche Frage")
        'eine rein ##AT##-##AT## deutsche Frage'
    """
    return re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", text)


def compound_split_bleu(hypotheses: Sequence[str], references: Sequence[str], *, language: str = "de") -> BleuResult:
    """Moses-tokenised, compound-split, unsmoothed BLEU: for comparison with older papers only.

    Vaswani et al. 2017 (arXiv:1706.03762) is such a paper. Splitting compounds raises the score, so this
    one must never stand beside sacreBLEU's unlabelled.

    Args:
        hypotheses: detokenised translations of the whole test set, in its order.
        references: the untouched reference of each.
        language: the target language, for the Moses tokenizer's rules.

    Raises:
        ImportError: sacremoses is not installed.
        ValueError: unequal counts or nothing to score.
    """
    from sacrebleu.metrics.bleu import BLEU

    _check_pairs("compound_split_bleu", hypotheses, references)
    try:
        from sacremoses import MosesTokenizer
    except ImportError as error:
        raise ImportError(
            "compound_split_bleu: expected the package sacremoses, got none; run `pip install sacremoses`, "
            "or use corpus_bleu, which needs nothing more"
        ) from error
    moses = MosesTokenizer(lang=language)

    def split(lines: Sequence[str]) -> list[str]:
        return [compound_split(moses.tokenize(line, return_str=True)) for line in lines]

    # force: the text is tokenised on purpose, so sacreBLEU's warning about that would mislead.
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    return _score(metric, split(hypotheses), split(references))


def _check_pairs(function: str, hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise ValueError(f"{function}: expected lists of sentences, got one string; pass [sentence]")
    if len(hypotheses) != len(references):
        raise ValueError(
            f"{function}: expected one reference for each sentence, got {len(hypotheses)} hypotheses and "
            f"{len(references)} references; check that both cover the same test set"
        )
    if not hypotheses:
        raise ValueError(f"{function}: expected at least one sentence, got none; pass the whole test set")


def _score(metric: Any, hypotheses: Sequence[str], references: Sequence[str]) -> BleuResult:
    result = metric.corpus_score(list(hypotheses), [list(references)])
    signature = str(metric.get_signature())
    return BleuResult(score=result.score, line=result.format(signature=signature), signature=signature)


def parser() -> Parser:
    """The options; `main` reads them."""
    result = Parser("eval.bleu", __doc__)
    add = result.add_argument
    add("--model", type=TEXT, required=True, help="checkpoint directory, tokenizer included")
    add("--source_file", type=TEXT, required=True, help="one sentence per line, UTF-8, .gz accepted")
    add("--reference_file", type=TEXT, required=True, help="one reference per line, UTF-8, .gz accepted")
    add("--num_beams", type=BEAMS, default=4)
    add("--length_penalty", type=LENGTH_PENALTY, default=1.0, help="p in log-probability / length^p")
    add("--extra_tokens", type=COUNT, default=50, help="longest translation = source + this")
    add("--max_tokens_per_batch", type=COUNT, default=4096, help="source tokens with padding")
    add("--lowercase", action="store_true", help="ignore case")
    add("--tokenize", type=TEXT, help="sacreBLEU's tokenizer; by default its choice for the language, or 13a")
    add("--target_lang", type=TEXT, help="language of the references; the file's ending (.zh) by default")
    add("--compound_split", type=TEXT, metavar="LANGUAGE", help="add the older papers' score")
    add("--output_file", type=TEXT, help="write the translations here, one per line")
    add("--device", type=DEVICE, help="default: the GPU if there is one")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Translate a file with a sequence-to-sequence checkpoint, score it and print the result."""
    return one_line(lambda: _report(parser().parse_args(arguments)))


def _report(options: argparse.Namespace) -> int:
    print(json.dumps(_run(options)))
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    if options.output_file is not None:
        refuse_unwritable("bleu", "--output_file", options.output_file)
    sources, references = parallel_lines("bleu", options.source_file, options.reference_file)
    # A bad option must fail here, not after minutes of search.
    language = options.target_lang or Path(options.reference_file.removesuffix(".gz")).suffix[1:]
    tokenize = choose_tokenizer("bleu", language, references, options.tokenize)
    if options.compound_split:
        compound_split_bleu(references[:1], references[:1], language=options.compound_split)
    model, tokenizer = load_seq2seq(options.model, options.device)
    start = time.perf_counter()
    translations = translate(
        model,
        tokenizer,
        sources,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        extra_tokens=options.extra_tokens,
        max_tokens_per_batch=options.max_tokens_per_batch,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - start
    translations = [" ".join(text.splitlines()) for text in translations]  # a line of the file is a sentence
    if options.output_file:
        write_whole(options.output_file, "".join(f"{text}\n" for text in translations))
    result = corpus_bleu(translations, references, lowercase=options.lowercase, tokenize=tokenize)
    print(f"BLEU {result.score:.2f}\n{result.line}\nsignature {result.signature}")
    summary: dict[str, Any] = {"bleu": result.score, **asdict(result), "sentences": len(sources)}
    if options.compound_split:
        older = compound_split_bleu(translations, references, language=options.compound_split)
        print(f"for comparison with older papers only, compound-split tokenised BLEU: {older.score:.2f}")
        summary["compound_split_bleu"] = older.score
    for name in ("model", "num_beams", "length_penalty", "extra_tokens"):
        summary[name] = getattr(options, name)
    return summary | {"seconds": round(seconds, 3)}


# The name of the first edition.
_read_lines = functools.partial(read_lines, "bleu")


def load_seq2seq(name: str, device: str | None) -> tuple[Any, Any]:
    """A sequence-to-sequence checkpoint, in float32, and its tokenizer; `device` None: the GPU if there is one.

    Raises:
        ValueError: there is no such checkpoint, or weights are missing.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = load_pretrained("bleu", AutoModelForSeq2SeqLM, name, "a sequence-to-sequence checkpoint")
    tokenizer = load_tokenizer("bleu", name)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


if __name__ == "__main__":
    sys.exit(main())
