"""Tokens: byte-pair vocabularies exact in size and lossless, word-level ones by count, streams of ids on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tritonsparse.models.transfo_xl import Vocabulary
from tritonsparse.train.embedded.corpus import generate
from tritonsparse.train.text.lines import Text
from tritonsparse.train.text.subwords import train_tokenizer
from tritonsparse.train.text.token_streams import (
    encode_with_tokenizer,
    token_stream,
    vocabulary_fingerprint,
    word_counts,
)

PAIRS = generate(0, {"train": 400, "validation": 0, "test": 0})["train"]
SIZE = 300


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(PAIRS, SIZE)


def test_a_vocabulary_has_the_size_asked_for_or_says_which_it_can_have(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == SIZE
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZE))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert train_tokenizer(PAIRS, SIZE).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    pairs = [("ab ab", "cd cd")]
    for asked, reached, words in (
        # <pad> </s> <unk>, the mark of a word start, a b c d; merges _a and _ab, _c and _cd: 12.
        (500, 12, r"1 sentence pairs support \(here 12\), got.*=500; pass --vocab_size 12"),
        (5, 8, r"vocab_size of at least 8 \(the characters.*got 5; pass a larger"),
    ):
        with pytest.raises(ValueError, match=words):
            train_tokenizer(pairs, asked)
        assert len(train_tokenizer(pairs, reached)) == reached


def test_every_sentence_of_the_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    sentences = [side for pair in PAIRS for side in pair]
    assert any(letter in sentence for sentence in sentences for letter in "äöüß"), "the case needs umlauts"
    rows = tokenizer(sentences)["input_ids"]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False) == sentences
    # Spaces before punctuation too.
    spaced = ("Is it 3 p.m. ? Yes , it is .", "Süße Größe !")
    other = train_tokenizer([spaced] * 2, 30)
    for text in spaced:
        ids = other(text)["input_ids"]
        assert other.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    # Composed and decomposed umlauts are one; a letter outside the text is unknown, not lost.
    assert tokenizer("m\u00fcde")["input_ids"] == tokenizer("mu\u0308de")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("\u4f60")["input_ids"]
    # Sources and targets share ids and end in the end token.
    source, target = tokenizer("Hotel")["input_ids"], tokenizer(text_target="Hotel")["input_ids"]
    assert source == target and source.index(tokenizer.eos_token_id) == len(source) - 1


def test_a_saved_tokenizer_reloads(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("Der kleine Hund läuft.")["input_ids"]
    assert reloaded("Der kleine Hund läuft.")["input_ids"] == ids
    assert reloaded.decode(ids) == tokenizer.decode(ids)
    for name in ("pad_token_id", "eos_token_id", "unk_token_id", "model_max_length"):
        assert getattr(reloaded, name) == getattr(tokenizer, name)


def text(*lines: str) -> Text:
    return Text("test", lambda: iter(lines))


def test_a_stream_is_mapped_from_disk_and_made_anew_when_text_or_vocabulary_change(tmp_path: Path) -> None:
    lines = ["the cat", "", "the dog"]
    vocabulary = Vocabulary.count(lines)
    calls = []

    def stream(*lines: str, vocabulary: Vocabulary = vocabulary) -> np.ndarray:
        def encode(chunk: list[str]) -> np.ndarray:
            calls.append(len(chunk))
            return vocabulary.encode(chunk)

        return token_stream(text(*lines), encode, vocabulary_fingerprint(vocabulary), tmp_path / "tokens", "train")

    first = stream(*lines)
    assert isinstance(first, np.memmap) and first.dtype == np.int32 and not first.flags.writeable
    assert first.tolist() == vocabulary.encode(lines).tolist() == [1, 2, 0, 0, 1, 3, 0]
    assert stream(*lines).tolist() == first.tolist() and calls == [3]  # read back, not encoded again
    assert stream("the dog").tolist() == [1, 3, 0] and calls == [3, 1]
    other = Vocabulary(["<eos>", "dog", "the"])
    assert stream("the dog", vocabulary=other).tolist() == [2, 1, 0] and calls == [3, 1, 1]
    # What a killed process left is not believed.
    (tmp_path / "tokens" / "train.int32").write_bytes(b"1234")
    assert stream("the dog", vocabulary=other).tolist() == [2, 1, 0] and calls == [3, 1, 1, 1]
    assert json.loads((tmp_path / "tokens" / "train.json").read_text())["tokens"] == 3
    with pytest.raises(ValueError, match="expected text, got none in test"):
        stream()
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == ["train.int32", "train.json"]


def test_a_long_text_is_encoded_in_chunks_and_subwords_have_a_fingerprint(tmp_path: Path) -> None:
    lines = [f"w{number % 7} w{number % 3}" for number in range(25_000)]
    vocabulary = Vocabulary.count(lines)
    found = token_stream(text(*lines), vocabulary.encode, "v", tmp_path, "train")
    assert np.array_equal(found, vocabulary.encode(lines))
    lines = ["the cat sat", "the dog sat", "the cat"] * 3
    tokenizer, other = (train_tokenizer([(line, line) for line in lines], size) for size in (23, 22))
    encode, fingerprint = encode_with_tokenizer(tokenizer)
    alone = [tokenizer(f"{line}\n", add_special_tokens=False)["input_ids"] for line in ("the cat", "the dog")]
    assert encode(["the cat", "the dog"]) == alone[0] + alone[1]
    assert encode_with_tokenizer(other)[1] != fingerprint == encode_with_tokenizer(tokenizer)[1]


def test_words_and_lines_are_counted_and_rare_words_become_unknown() -> None:
    assert word_counts(["a b", "", " c "]) == (3, 3)
    # a 3, b 2, c and d once each: with a min_count of 2 the last two are <unk>, twice, in order of counts after b.
    lines = ["a b c", "a a b d"]
    assert Vocabulary.count(lines).words == ["<eos>", "a", "b", "c", "d"]
    vocabulary = Vocabulary.count(lines, min_count=2)
    assert vocabulary.words == ["<eos>", "a", "b", "<unk>"]
    assert vocabulary.encode(["d a x"]).tolist() == [3, 1, 3, 0]
    # What is <unk> already counts with the rare words, and stays a type where no word is rare.
    assert Vocabulary.count(["<unk> a a b", "c"], min_count=2).words == ["<eos>", "<unk>", "a"]
    assert Vocabulary.count(["a a"], min_count=2).words == ["<eos>", "a", "<unk>"]
    with pytest.raises(ValueError, match="min_count of at least 1"):
        Vocabulary.count(lines, min_count=0)
