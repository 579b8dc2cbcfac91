"""Text by line, and its ids on disk."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from tritonsparse.models.transfo_xl import Vocabulary
from tritonsparse.train.subwords import train_tokenizer
from tritonsparse.train.text import Text, load_text
from tritonsparse.train.token_streams import encode_with_tokenizer, token_stream, vocabulary_fingerprint, word_counts

ROWS = {
    "train": ["", " = Title = \n", "the cat sat \n", "the dog \n"],
    "validation": ["the cat \n", ""],
    "test": ["a cat\n"],
}


def text(*lines: str) -> Text:
    return Text("test", lambda: iter(lines))


def test_the_embedded_text_has_three_disjoint_splits_and_is_read_twice_alike() -> None:
    splits = load_text("embedded")
    assert list(splits) == ["train", "validation", "test"]
    words = {split: word_counts(part)[0] for split, part in splits.items()}
    assert words["train"] > 40_000 and min(words.values()) > 1000
    assert splits["train"].fingerprint() == load_text("embedded")["train"].fingerprint()
    paragraphs = {
        split: {piece.strip() for piece in "\n".join(part).split("\n\n")} - {""} for split, part in splits.items()
    }
    assert not paragraphs["train"] & paragraphs["test"] and not paragraphs["train"] & paragraphs["validation"]


def test_rows_of_parquet_files_are_lines(tmp_path: Path) -> None:
    for split, rows in ROWS.items():
        datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "corpus" / f"{split}.parquet")
    splits = load_text(str(tmp_path / "corpus"))
    assert list(splits["train"]) == ["", " = Title = ", "the cat sat ", "the dog "]
    assert list(splits["train"]) == list(splits["train"])
    assert list(splits["validation"]) == ["the cat ", ""]
    # Salesforce/wikitext names its configurations in the card of the dataset.
    (tmp_path / "corpus" / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-v1\n  data_files:\n  - split: train\n    path: train.parquet\n"
        "  - split: validation\n    path: validation.parquet\n---\n"
    )
    assert list(load_text(str(tmp_path / "corpus"), "wikitext-2-v1")) == ["train", "validation"]
    with pytest.raises(ValueError, match=r"expected a dataset that can be loaded, got .* 'wikitext-9'"):
        load_text(str(tmp_path / "corpus"), "wikitext-9")


def test_a_dataset_without_text_is_refused(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        datasets.Dataset.from_dict({"sentence": ["a"]}).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"expected a column 'text' in .*, got sentence"):
        load_text(str(tmp_path))


def test_local_files_are_read_compressed_or_not(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes("one two\r\n\nthree\u2028four\n".encode())
    with gzip.open(tmp_path / "valid.txt.gz", "wt") as file:
        file.write("five\n")
    splits = load_text(train_file=str(tmp_path / "train.txt"), validation_file=str(tmp_path / "valid.txt.gz"))
    assert list(splits["train"]) == ["one two", "", "three\u2028four"]
    assert list(splits["validation"]) == ["five"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "got neither"),
        ({"dataset_name": "embedded", "train_file": "x"}, "got both 'embedded'"),
        ({"train_file": "/no/such/file", "validation_file": "x"}, "expected a text file, got /no/such/file"),
    ],
)
def test_no_source_two_sources_and_a_missing_file_are_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_text(**options)


def test_what_is_no_text_and_a_missing_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "b.txt").write_bytes(b"not gzip")
    (tmp_path / "b.txt").rename(tmp_path / "b.gz")
    with pytest.raises(ValueError, match="expected a validation split, got only train"):
        load_text(train_file=str(tmp_path / "a.txt"))
    splits = load_text(train_file=str(tmp_path / "a.txt"), validation_file=str(tmp_path / "b.gz"))
    with pytest.raises(ValueError, match="expected UTF-8 text"):
        list(splits["train"])
    with pytest.raises(ValueError, match="expected a readable file"):
        list(splits["validation"])


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
    tokenizer = train_tokenizer([(line, line) for line in lines], 23)
    encode, fingerprint = encode_with_tokenizer(tokenizer)
    ids = encode(["the cat", "the dog"])
    assert ids == tokenizer("the cat\n", add_special_tokens=False)["input_ids"] + tokenizer(
        "the dog\n", add_special_tokens=False)["input_ids"]  # fmt: skip
    other = train_tokenizer([(line, line) for line in lines], 22)
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
