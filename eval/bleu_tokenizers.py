"""Which of sacreBLEU's tokenizers fits a language, and what it needs.

BLEU counts words. Where a language writes none apart, "13a" takes a whole sentence for one, and of two that differ in
a character nothing matches. The tokenizer stands in the signature of every score.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

__all__ = ["choose_tokenizer", "refuse_tokenizer", "tokenizer_for"]

DEFAULT = "13a"
# sacreBLEU's own choices; for the last ones, which it has none for, characters are counted.
TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab", **dict.fromkeys(("th", "lo", "km", "my"), "char")}
# Other codes of these languages, as FLORES, mBART and the like have them.
ALIASES = {
    "zho": "zh", "chi": "zh", "cmn": "zh", "yue": "zh", "jpn": "ja", "kor": "ko", "tha": "th", "lao": "lo",
    "khm": "km", "mya": "my", "bur": "my",
}  # fmt: skip
# How Unicode's names of letters begin in scripts without spaces; Korean has spaces, but ko-mecab is its choice.
SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR")


def tokenizer_for(language: str) -> str:
    """The tokenizer for a target language: "zh", "zh_CN", "zho_Hans", "jpn"; "13a" for all that is not known here."""
    code = language.replace("-", "_").split("_")[0].lower()
    return TOKENIZERS.get(ALIASES.get(code, code), DEFAULT)


def choose_tokenizer(
    program: str, language: str, references: Sequence[str], given: str | None, option: str = "--tokenize"
) -> str:
    """The tokenizer that is given, or else the language's; tried before what is long.

    Args:
        program, option: who asks, and what gives a tokenizer there, for messages.
        language: of the references.
        references: some of them; they tell where the language is not what they are in.
        given: a name of sacreBLEU's; None: by the language.

    Raises:
        ValueError: it is unknown or not installed, or would take whole sentences for words.
    """
    tokenize = tokenizer_for(language) if given is None else given
    if given is None and tokenize == DEFAULT and (script := _unspaced(references)):
        raise ValueError(
            f"{program}: expected --target_lang or {option} for references in a script without spaces, got the "
            f"language {language!r} and mostly {script} letters; name the language, as in --target_lang zh"
        )
    refuse_tokenizer(program, tokenize)
    return tokenize


def refuse_tokenizer(function: str, name: str) -> None:
    """Refuse a tokenizer that cannot be had.

    Raises:
        ValueError: sacreBLEU has none of that name, or what it needs is not installed.
    """
    from sacrebleu.metrics.bleu import BLEU

    if name not in BLEU.TOKENIZERS:
        raise ValueError(
            f"{function}: expected tokenize to be one of {', '.join(sorted(BLEU.TOKENIZERS))}, "
            f"got {name!r}; use '13a' unless the language needs another"
        )
    try:
        BLEU(tokenize=name)
    except (RuntimeError, ImportError, AssertionError, OSError) as error:
        package = {"ja-mecab": "sacrebleu[ja]", "ko-mecab": "sacrebleu[ko]"}.get(name, "sentencepiece")
        raise ValueError(
            f"{function}: expected what sacreBLEU's tokenizer {name!r} needs, got an installation without "
            f"({' '.join(str(error).split()) or type(error).__name__}); pip install {package!r}, or choose another "
            f"tokenizer, such as 'char'"
        ) from error


def _unspaced(sentences: Sequence[str]) -> str | None:
    """The script, where most of the letters are of scripts that write no words apart."""
    letters = [letter for sentence in sentences[:1000] for letter in sentence if letter.isalpha()]
    scripts = Counter(unicodedata.name(letter, "").split(" ")[0] for letter in letters)
    found = {name: scripts[name] for name in SCRIPTS if scripts[name]}
    return max(found, key=lambda name: found[name]) if 2 * sum(found.values()) > len(letters) else None
