"""Text by line, and its ids on disk."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from tritonsparse.models.transfo_xl import Vocabulary
from tritonsparse.train.text.lines import Text, load_text
from tritonsparse.train.text.source import TextSource
from tritonsparse.train.text.subwords import train_tokenizer
from tritonsparse.train.text.token_streams import (
    encode_with_tokenizer,
    token_stream,
    vocabulary_fingerprint,
    word_counts,
)

ROWS = {
    "train": ["", " = Title = \n", "the cat sat \n", "the dog \n"],
    "validation": ["the cat \n", ""],
    "test": ["a cat\n"],
}


def text(*lines: str) -> Text:
    return Text("test", lambda: iter(lines))


def test_the_embedded_text_has_three_disjoint_splits_and_is_read_twice_alike() -> None:
    splits = load_text(TextSource("embedded"))
    assert list(splits) == ["train", "validation", "test"]
    words = {split: word_counts(part)[0] for split, part in splits.items()}
    assert words["train"] > 40_000 and min(words.values()) > 1000
    assert splits["train"].fingerprint() == load_text(TextSource("embedded"))["train"].fingerprint()
    paragraphs = {
        split: {piece.strip() for piece in "\n".join(part).split("\n\n")} - {""} for split, part in splits.items()
    }
    assert not paragraphs["train"] & paragraphs["test"] and not paragraphs["train"] & paragraphs["validation"]


def test_rows_of_parquet_files_are_lines(tmp_path: Path) -> None:
    folder = str(tmp_path / "corpus")
    for split, rows in ROWS.items():
        datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "corpus" / f"{split}.parquet")
    splits = load_text(TextSource(folder))
    assert list(splits["train"]) == ["", " = Title = ", "the cat sat ", "the dog "]
    assert list(splits["train"]) == list(splits["train"])
    assert list(splits["validation"]) == ["the cat ", ""]
    # Salesforce/wikitext names its configurations in the card of the dataset.
    (tmp_path / "corpus" / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-v1\n  data_files:\n  - split: train\n    path: train.parquet\n"
        "  - split: validation\n    path: validation.parquet\n---\n"
    )
    assert list(load_text(TextSource(folder, "wikitext-2-v1"))) == ["train", "validation"]
    with pytest.raises(ValueError, match=r"expected a dataset that can be loaded, got .* 'wikitext-9'"):
        load_text(TextSource(folder, "wikitext-9"))


def test_a_dataset_without_text_is_refused(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        datasets.Dataset.from_dict({"sentence": ["a"]}).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"expected a column 'text' in .*, got sentence"):
        load_text(TextSource(str(tmp_path)))


def test_local_files_are_read_compressed_or_not(tmp_path: Path) -> None:
    train, validation = tmp_path / "train.txt", tmp_path / "valid.txt.gz"
    train.write_bytes("one two\r\n\nthree\u2028four\n".encode())
    validation.write_bytes(gzip.compress(b"five\n"))
    splits = load_text(TextSource(files={"train": str(train), "validation": str(validation)}))
    assert list(splits["train"]) == ["one two", "", "three\u2028four"]
    assert list(splits["validation"]) == ["five"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (TextSource(), "got neither"),
        (TextSource("embedded", files={"train": "x"}), "got both 'embedded'"),
        (TextSource(files={"train": "/no/such/file", "validation": "x"}), "a text file, got /no/such/file"),
    ],
)
def test_no_source_two_sources_and_a_missing_file_are_refused(source: TextSource, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_text(source)


def test_what_is_no_text_and_a_missing_split_are_refused(tmp_path: Path) -> None:
    train, validation = tmp_path / "a.txt", tmp_path / "b.gz"
    train.write_bytes(b"\xff\xfe")
    validation.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="expected a validation split, got only train"):
        load_text(TextSource(files={"train": str(train)}))
    splits = load_text(TextSource(files={"train": str(train), "validation": str(validation)}))
    for split, words in (("train", "expected UTF-8 text"), ("validation", "expected a readable file")):
        with pytest.raises(ValueError, match=words):
            list(splits[split])


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


def test_a_long_text_is_encoded_in_chunks_to_the_same_ids(tmp_path: Path) -> None:
    lines = [f"w{number % 7} w{number % 3}" for number in range(25_000)]
    vocabulary = Vocabulary.count(lines)
    found = token_stream(text(*lines), vocabulary.encode, "v", tmp_path, "train")
    assert np.array_equal(found, vocabulary.encode(lines))


def test_subwords_of_lines_and_their_fingerprint() -> None:
    lines = ["the cat sat", "the dog sat", "the cat"] * 3
    tokenizer, other = (train_tokenizer([(line, line) for line in lines], size) for size in (23, 22))
    encode, fingerprint = encode_with_tokenizer(tokenizer)
    alone = [tokenizer(f"{line}\n", add_special_tokens=False)["input_ids"] for line in ("the cat", "the dog")]
    assert encode(["the cat", "the dog"]) == alone[0] + alone[1]
    assert encode_with_tokenizer(other)[1] != fingerprint == encode_with_tokenizer(tokenizer)[1]


def test_words_and_lines_are_counted() -> None:
    assert word_counts(["a b", "", " c "]) == (3, 3)


def test_rare_words_become_unknown_by_count() -> None:
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
