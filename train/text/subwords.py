"""Byte-pair vocabularies, trained with `tokenizers`: a joint one of two languages, one of bytes for running text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tritonsparse.eval.command_line import whole

__all__ = ["VOCABULARY_SIZE", "train_byte_tokenizer", "train_tokenizer"]

# Of command lines. tokenizers makes room for as many at once, and ends the process where there is none.
VOCABULARY_SIZE = whole(1, 2**20)

_SPECIAL = ("<pad>", "</s>", "<unk>")
_TEXT = "<|endoftext|>"


def train_tokenizer(pairs: Sequence[tuple[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Joint BPE of exactly `vocab_size` entries; appends `</s>`, marks word starts (Metaspace), keeps case.

    Args:
        pairs: (source, target) training sentences.
        vocab_size: entries, the three special tokens included.

    Raises:
        ValueError: the text has fewer distinct merges than `vocab_size` asks for.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(_SPECIAL), min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(_sentences(pairs), trainer, length=2 * len(pairs))
    if (reached := tokenizer.get_vocab_size()) != vocab_size:
        raise ValueError(
            f"train_tokenizer: expected a vocabulary that {len(pairs):,} sentence pairs support (here {reached:,}), "
            f"got vocab_size={vocab_size:,}; pass --vocab_size {reached} or less"
            if reached < vocab_size
            else f"train_tokenizer: expected vocab_size of at least {reached:,} (the characters of the text), got "
            f"{vocab_size:,}; pass a larger --vocab_size"
        )
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=1024,
    )


def train_byte_tokenizer(lines: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's, of at most `vocab_size` entries; `<|endoftext|>` begins a text, nothing is unknown.

    Args:
        lines: the training text, without line ends; each is trained with one.
        vocab_size: entries, the 256 bytes and `<|endoftext|>` included.

    Raises:
        ValueError: vocab_size does not hold the bytes.
    """
    if vocab_size <= 257:
        raise ValueError(
            f"train_byte_tokenizer: expected vocab_size above 257 (256 bytes and {_TEXT}), got {vocab_size}; pass a "
            f"larger --vocab_size"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((f"{line}\n" for line in lines), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_TEXT, eos_token=_TEXT)


def _sentences(pairs: Sequence[tuple[str, str]]) -> Iterable[str]:
    for source, target in pairs:
        yield source
        yield target
