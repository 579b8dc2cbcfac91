"""Text and parallel text: every format gives the same lines or pairs, and every error says what to do."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

import tritonsparse.train
from tritonsparse.train.text import corpora
from tritonsparse.train.text.corpora import load_parallel
from tritonsparse.train.text.lines import load_text
from tritonsparse.train.text.source import TextSource
from tritonsparse.train.text.token_streams import word_counts

PAIRS = [("A dog.", "Ein Hund."), ('He says "no", twice.', "Er sagt zweimal „nein“."), ("a\u2028b", "c")]
TURNED = [(de, en) for en, de in PAIRS]
ENGLISH, GERMAN = ("".join(f"{pair[side]}\n" for pair in PAIRS) for side in (0, 1))
NESTED = "".join(json.dumps({"translation": {"de": de, "en": en}}) + "\n" for en, de in PAIRS)
FLAT = "".join(json.dumps({"en": en, "de": de, "id": 1}) + "\n" for en, de in PAIRS)
CSV = "de,en\n" + "".join('"{}","{}"\n'.format(de, en.replace('"', '""')) for en, de in PAIRS)
TSV = "".join(f"{en}\t{de}\n" for en, de in PAIRS)
FORMATS = {
    "nested.jsonl": NESTED, "flat.jsonl": FLAT, "flat.json": FLAT, "bom.jsonl": "\ufeff" + FLAT,
    "array.json": json.dumps([{"en": en, "de": de} for en, de in PAIRS], indent=1), "plain.csv": CSV,
    "windows.csv": CSV.replace("\n", "\r\n"), "plain.tsv": TSV,
    "spaced.csv": "\n" + CSV.replace("de,en\n", "de, en\n\n"), "noted.csv": "id,de,en\n" + "".join(
        '7,"{}","{}"\n'.format(de, en.replace('"', '""')) for en, de in PAIRS
    ),
    "named.tsv": "id\tde\ten\n" + "".join(f"7\t{de}\t{en}\n" for en, de in PAIRS),
}  # fmt: skip


def write(path: Path, text: str) -> str:
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def files(train: str, **others: str) -> TextSource:
    return TextSource(files={"train": train, **others})


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_text_format_gives_the_pairs_in_order(tmp_path: Path, name: str, packed: str) -> None:
    assert load_parallel(files(write(tmp_path / (name + packed), FORMATS[name]))) == {"train": PAIRS}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("named", ["{0}.en{1}", "{0}.de{1}", "{0}", "{0}.en{1},{0}.de{1}", "{0}.de{1},{0}.en{1}"])
def test_parallel_text_is_found_by_every_name_it_has(tmp_path: Path, named: str, packed: str) -> None:
    write(tmp_path / f"train.en{packed}", ENGLISH)
    write(tmp_path / f"train.de{packed}", GERMAN)
    source = files(named.format(tmp_path / "train", packed))
    assert load_parallel(source) == {"train": PAIRS}
    assert load_parallel(source, "de_DE", "en_XX") == {"train": TURNED}


def test_long_fields_and_quotes_that_stand_in_a_text_are_read(tmp_path: Path) -> None:
    limit, long = csv.field_size_limit(), "a" * 200_000
    rows = [(long, 'say "no"'), ('"yes"', "x")]
    text = "en,de\n" + "".join('"{}","{}"\n'.format(*(side.replace('"', '""') for side in row)) for row in rows)
    assert load_parallel(files(write(tmp_path / "a.csv", text))) == {"train": rows}
    assert csv.field_size_limit() == limit
    # TSV has no quotes: they are the text's.
    assert load_parallel(files(write(tmp_path / "a.tsv", "".join("\t".join(row) + "\n" for row in rows)))) == {
        "train": rows
    }


def test_parquet_is_read_and_half_empty_pairs_are_dropped(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    path = write(tmp_path / "a.tsv", TSV)
    loaded = load_parallel(files(path, validation=path, test=path), max_train_samples=2)
    assert loaded == {"train": PAIRS[:2], "validation": PAIRS, "test": PAIRS}
    path = write(tmp_path / "b.tsv", "one\teins\n \tzwei\nthree \t drei\nfour\t\n")
    assert load_parallel(files(path)) == {"train": [("one", "eins"), ("three", "drei")]}
    assert "dropped 2 pairs" in caplog.text
    # The embedded corpus, in both directions.
    monkeypatch.setattr(corpora, "DEFAULT_SIZES", {"train": 40, "validation": 5, "test": 5})
    forward = load_parallel(TextSource("embedded"), max_train_samples=30)
    assert {split: len(pairs) for split, pairs in forward.items()} == {"train": 30, "validation": 5, "test": 5}
    back = load_parallel(TextSource("embedded"), "de", "en", max_train_samples=30)
    assert back == {split: [(de, en) for en, de in pairs] for split, pairs in forward.items()}
    # Parquet, by struct or by columns.
    rows = [{"en": en, "de": de} for en, de in PAIRS]
    for table in ([{"translation": row} for row in rows], rows):
        datasets.Dataset.from_list(table).to_parquet(tmp_path / "a.parquet")
        assert load_parallel(files(str(tmp_path / "a.parquet"))) == {"train": PAIRS}


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.jsonl", b'{"en": "x", "de": "y"}\n{"en": "x", "fr": "y"}\n', "line 2.*en, fr.*--source_lang"),
        ("a.jsonl", b'{"en": "x", "de": "y"}\n\n{"en": \n', "line 3.*one JSON object per line"),
        ("a.json", b'[{"en": "x", "de": "y"},\n {]', "line 2.*one JSON object"),
        ("a.jsonl", b'["en"]\n[1]\n', "one JSON object per line"),
        ("a.jsonl", b"7\n", "got int; rename the keys"),
        ("a.jsonl", b'{"en": 3, "de": "y"}\n', "convert the values to strings"),
        ("a.jsonl", b"[" * 100_000, "JSON in .*line 1; write one"),
        ("a.jsonl", b'{"en": "x", "de": "y"}\n{"en": "\\ud83d", "de": "y"}\n', r"line 2.*lone surrogate U\+D83D"),
        ("a.csv", b"english,de\nx,y\n", "line 1.*english, de; rename the keys"),
        ("a.jsonl", b'{"en": "x", "de": "a\\u0000b"}\n', "line 1.*a NUL character; leave it out"),
        ("a.csv", b"\n\n", "line 1"),
        ("a.csv", b"en,de,en\nx,y,z\n", "line 1.*en, de, en; rename the others"),
        ("a.csv", b"en;de\nx;y\n", "line 1.*got en;de; rename the keys"),
        ("a.csv", b"en,de\nx,y\nHello, world,Hallo\n", "2 columns as in line 1.*line 3.*got 3; put a side.*quotes"),
        ("a.csv", b"en,de\nx\n", "2 columns as in line 1.*line 2.*got 1"),
        ("a.csv", b'en,de\nx,y\n"Hello,Hallo\nx,y\n', "begun in line 3, whose quotes do not fit.*close them"),
        ("a.csv", b'en,de\n"He" said,y\n', "begun in line 2, whose quotes do not fit"),
        ("a.tsv", b"en\tde\nx\ty\tz\n", "2 columns as in line 1.*line 2.*got 3; separate them by one tab"),
        ("a.tsv", b"EN\tDE\nx\ty\n", "line 1.*EN, DE; rename the keys"),
        ("a.tsv", b'x\ty\n"He said ""no"""\ty\n', "no quoting in tab-separated.*line 2.*or the file as .csv"),
        ("a.tsv", b"x\ty\nx\n", "line 2.*got 1; separate them by one tab"),
        ("a.tsv", b"x\ty\tz\n", "got 3; separate them by one tab, or name the columns"),
        ("a.tsv", b"x\ty\n\xff\ty\n", "a.tsv, line 2.*0xff; convert the file to UTF-8"),
        ("a.jsonl", b"", "an empty file; give a file"),
        ("a.tsv", b"x\t \n", "none with text on both sides"),
        ("a.tsv.gz", b"x\ty\n", "damaged data.*drop .gz"),
        ("a.xml", b"<x/>", r"one of .jsonl.*\.en, \.de.*rename the file"),
        ("a.parquet", b"no parquet", "parquet.*write it again"),
        ("a.parquet", b"PAR1" + b"x" * 30 + b"PAR1", "parquet.*write it again"),
        ("a.fr", b"bonjour\n", "--source_lang and --target_lang"),
        ("a.en", b"a\nb\nc\nd\n", "a.en as in .*a.de, got 4 and 3; align the two files line by line"),
    ],
)
def test_an_unreadable_file_says_where_and_what_to_do(tmp_path: Path, name: str, raw: bytes, words: str) -> None:
    write(tmp_path / "a.de", GERMAN)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=f"(?s)^load_parallel: expected.*{words}") as caught:
        load_parallel(files(str(tmp_path / name)))
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file_is_named_and_a_source_that_cannot_be_says_what_to_give(tmp_path: Path) -> None:
    write(tmp_path / "lone.en", ENGLISH)
    for name in ("none.jsonl", "none.en", "none", "none.en,none.de", "lone.en"):
        with pytest.raises(FileNotFoundError, match=r"which does not exist.*check the path") as caught:
            load_parallel(files(",".join(str(tmp_path / part) for part in name.split(","))))
        assert name.split(".")[0] in str(caught.value)
    held_out = {"validation": write(tmp_path / "a.tsv", TSV)}
    for source, target, words in (
        (TextSource(), "de", "got neither; give --dataset_name.*--train_file"),
        (TextSource("embedded", files=held_out), "de", "got both 'embedded'"),
        (TextSource("embedded"), "fr", "got en-fr; give --train_file"),
        (TextSource(files=held_out), "de", "got only validation; give --train_file"),
    ):
        with pytest.raises(ValueError, match=words):
            load_parallel(source, "en", target)


def test_a_dataset_is_read_whichever_way_its_configuration_is_named(tmp_path: Path) -> None:
    """A folder in the layout of a hub repository, with two configurations named in a README."""
    features = datasets.Features({"translation": datasets.Translation(languages=["de", "en"])})
    rows = datasets.Dataset.from_dict({"translation": [{"de": de, "en": en} for en, de in PAIRS]}, features=features)
    for name, data in {"train": rows, "held": rows, "plain": datasets.Dataset.from_dict({"text": ["x"]})}.items():
        data.to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: de-en\n  data_files:\n  - {split: train, path: train.parquet}\n"
        "  - {split: validation, path: held.parquet}\n"
        "- config_name: plain\n  data_files:\n  - {split: train, path: plain.parquet}\n---\n"
    )
    for configuration in ("de-en", "en-de", None):
        loaded = load_parallel(TextSource(str(tmp_path), configuration), max_train_samples=2)
        assert loaded == {"train": PAIRS[:2], "validation": PAIRS}
    with pytest.raises(ValueError, match=r"expected a feature 'translation'.*got text; .*--train_file"):
        load_parallel(TextSource(str(tmp_path), "plain"))
    with pytest.raises(ValueError, match=r"configuration 'cs-en'.*--train_file and --validation_file"):
        load_parallel(TextSource(str(tmp_path), "cs-en"))


# A process with other hashes, in which importing the packages fails as where they are not installed; nor does it need
# torch, whose import would cost more than all else: the package above these modules is a name and a path.
STRANGER = """
import hashlib, sys, types
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"datasets", "pyarrow", "torch", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocker())
for name, path in (("tritonsparse", "train"), ("tritonsparse.train", "train"), ("tritonsparse.eval", "eval")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[2][:-5] + path]
from tritonsparse.train.text import corpora
from tritonsparse.train.text.source import TextSource
corpora.DEFAULT_SIZES = {"train": 300}
print(len(corpora.load_parallel(TextSource(files={"train": sys.argv[1]}))["train"]))
print(hashlib.sha256(repr(corpora.load_parallel(TextSource("embedded"))).encode()).hexdigest())
try: corpora.load_parallel(TextSource("wmt/wmt14", "de-en"))
except ValueError as error: print(error)
"""


def test_files_and_the_same_embedded_corpus_need_no_datasets_and_pyarrow(tmp_path: Path, monkeypatch: Any) -> None:
    command = [sys.executable, "-c", STRANGER, write(tmp_path / "a.jsonl", NESTED), *tritonsparse.train.__path__]
    other = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    done = subprocess.run(command, env=other, capture_output=True, text=True, check=True)
    first, second, error = done.stdout.splitlines()
    monkeypatch.setattr(corpora, "DEFAULT_SIZES", {"train": 300})
    here = repr(load_parallel(TextSource("embedded"))).encode()
    assert (first, second) == ("3", hashlib.sha256(here).hexdigest())
    assert "pip install datasets, or read local files with --train_file" in error


def test_the_embedded_text_has_three_disjoint_splits_and_is_read_twice_alike() -> None:
    splits = load_text(TextSource("embedded"))
    assert list(splits) == ["train", "validation", "test"]
    words = {split: word_counts(part)[0] for split, part in splits.items()}
    assert words["train"] > 40_000 and min(words.values()) > 1000
    assert splits["train"].fingerprint() == load_text(TextSource("embedded"))["train"].fingerprint()
    pieces = {
        split: {piece.strip() for piece in "\n".join(part).split("\n\n")} - {""} for split, part in splits.items()
    }
    assert not pieces["train"] & pieces["test"] and not pieces["train"] & pieces["validation"]


def test_rows_of_parquet_files_are_lines(tmp_path: Path) -> None:
    rows = {"train": ["", " = Title = \n", "the cat sat \n"], "validation": ["the cat \n", ""], "test": ["a cat\n"]}
    for split, texts in rows.items():
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"{split}.parquet")
    splits = load_text(TextSource(str(tmp_path)))
    for _ in range(2):
        assert list(splits["train"]) == ["", " = Title = ", "the cat sat "]
    assert list(splits["validation"]) == ["the cat ", ""]
    # Salesforce/wikitext names its configurations in the card of the dataset.
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-v1\n  data_files:\n  - split: train\n    path: train.parquet\n"
        "  - split: validation\n    path: validation.parquet\n---\n"
    )
    assert list(load_text(TextSource(str(tmp_path), "wikitext-2-v1"))) == ["train", "validation"]
    with pytest.raises(ValueError, match=r"expected a dataset that can be loaded, got .* 'wikitext-9'"):
        load_text(TextSource(str(tmp_path), "wikitext-9"))
    for split in ("train", "validation"):
        datasets.Dataset.from_dict({"sentence": ["a"]}).to_parquet(tmp_path / "other" / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"expected a column 'text' in .*, got sentence"):
        load_text(TextSource(str(tmp_path / "other")))


def test_local_files_are_read_compressed_or_not_or_refused(tmp_path: Path) -> None:
    plain, packed, binary, damaged = (str(tmp_path / name) for name in ("a.txt", "b.txt.gz", "c.txt", "d.gz"))
    contents = {plain: "one two\r\n\nthree\u2028four\n".encode(), packed: gzip.compress(b"five\n")}
    for path, raw in (contents | {binary: b"x\n\xff\xfe", damaged: b"not gzip"}).items():
        Path(path).write_bytes(raw)
    splits = load_text(TextSource(files={"train": plain, "validation": packed}))
    assert list(splits["train"]) == ["one two", "", "three\u2028four"]
    assert list(splits["validation"]) == ["five"]
    for source, words in (
        (TextSource(), "got neither"),
        (TextSource("embedded", files={"train": plain}), "got both 'embedded'"),
        (TextSource(files={"train": "/no/such/file", "validation": plain}), "got /no/such/file, which does not exist"),
        # Before the first stream is written.
        (TextSource(files={"train": plain, "validation": binary}), "UTF-8 text .*c.txt, line 2.*0xff"),
        (TextSource(files={"train": plain, "validation": damaged}), "gzip data in .*d.gz"),
        (TextSource(files={"train": plain, "validation": os.devnull}), "a text file, got /dev/null, which is none"),
        (TextSource(files={"train": plain}), "expected a validation split, got only train"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            load_text(source)
