"""BLEU counts words as sacreBLEU does in each language, says by which tokenizer, or says what is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers import tokenizer_ja_mecab

from tritonsparse.eval import bleu
from tritonsparse.eval.bleu_tokenizers import choose_tokenizer, tokenizer_for

CHINESE = ["我们今天早上去公园走了很久。", "他喜欢在河边读书。"]
JAPANESE, THAI = ["私は本を読みます。"], ["ฉันชอบอ่านหนังสือ"]


def test_the_choice_is_sacrebleus_own_by_any_code_of_the_language() -> None:
    for code in ("zh", "ja", "ko", "de", "en", "fr", "cs", "ru", "hi", ""):
        assert tokenizer_for(code) == BLEU._TOKENIZER_MAP.get(code, BLEU.TOKENIZER_DEFAULT)
    for code, other in {"zh_CN": "zh", "zh-TW": "zh", "zho_Hans": "zh", "ja_XX": "ja", "kor_Hang": "ko"}.items():
        assert tokenizer_for(code) == tokenizer_for(other)
    # It has none for languages whose words stand together; characters fit.
    assert {tokenizer_for(code) for code in ("th", "tha_Thai", "my", "km", "lo")} == {"char"}


def test_what_is_given_or_fits_is_taken_and_the_rest_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", None)
    for language, references, given, chosen in (
        ("zh", CHINESE, None, "zh"), ("zh", CHINESE, "char", "char"), ("de", ["Guten Tag"], None, "13a"),
        ("", ["..."], None, "13a"), ("", CHINESE, "13a", "13a"), ("txt", ["мир", "日本"], None, "13a"),
    ):  # fmt: skip
        assert choose_tokenizer("x", language, references, given) == chosen
    for language, references, given, words in (
        ("ja", JAPANESE, None, "needs, got an installation without .*pip install 'sacrebleu[ja]', or choose another"),
        ("zh", CHINESE, "moses", "to be one of 13a, .*got 'moses'; use '13a'"),
        ("de", CHINESE, None, "--target_lang or --tokenize .* the language 'de' and mostly CJK letters"),
        ("txt", JAPANESE, None, "mostly HIRAGANA letters; name the language"),
        ("", THAI, None, "mostly THAI letters; name the language"),
    ):
        with pytest.raises(ValueError, match="^x: expected .*" + re.escape(words).replace(r"\.\*", ".*")):
            choose_tokenizer("x", language, references, given)


def test_the_program_takes_the_language_from_the_file_or_the_option(
    tmp_path: Path, document: Any, refusal: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bleu, "load_seq2seq", lambda *_: (None, None))
    monkeypatch.setattr(bleu, "translate", lambda model, tokenizer, sources, **_: list(sources))
    for name in ("test.en", "test.zh", "ref.txt"):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in CHINESE), encoding="utf-8")
    source = ["--model=x", f"--source_file={tmp_path / 'test.en'}"]
    for reference, options, tokenizer in (
        ("test.zh", (), "zh"), ("ref.txt", ("--target_lang=zh",), "zh"), ("test.zh", ("--tokenize=char",), "char")
    ):  # fmt: skip
        assert bleu.main([*source, f"--reference_file={tmp_path / reference}", *options]) == 0
        assert f"|tok:{tokenizer}|" in document()["signature"]
    assert bleu.main([*source, f"--reference_file={tmp_path / 'ref.txt'}"]) == 2
    assert "mostly CJK letters; name the language" in refusal()
