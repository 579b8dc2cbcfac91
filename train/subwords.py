"""A joint byte-pair vocabulary over both languages, trained with `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["train_tokenizer"]

_SPECIAL = ("<pad>", "</s>", "<unk>")


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


def _sentences(pairs: Sequence[tuple[str, str]]) -> Iterable[str]:
    for source, target in pairs:
        yield source
        yield target
