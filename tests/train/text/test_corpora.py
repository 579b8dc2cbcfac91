"""Parallel text: every format gives the same pairs, and every error says what to do."""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritonsparse.train.text.corpora import load_parallel
from tritonsparse.train.text.source import TextSource

PAIRS = [("A dog.", "Ein Hund."), ('He says "no", twice.', "Er sagt zweimal „nein“."), ("a\u2028b", "c")]
ENGLISH = "".join(f"{en}\n" for en, _ in PAIRS)
GERMAN = "".join(f"{de}\n" for _, de in PAIRS)
NESTED = "".join(json.dumps({"translation": {"de": de, "en": en}}) + "\n" for en, de in PAIRS)
FLAT = "".join(json.dumps({"en": en, "de": de, "id": 1}) + "\n" for en, de in PAIRS)
CSV = "de,en\n" + "".join('"{}","{}"\n'.format(de, en.replace('"', '""')) for en, de in PAIRS)
TSV = "".join(f"{en}\t{de}\n" for en, de in PAIRS)
FORMATS = {
    "nested.jsonl": NESTED,
    "flat.jsonl": FLAT,
    "flat.json": FLAT,
    "array.json": json.dumps([{"en": en, "de": de} for en, de in PAIRS], indent=1),
    "plain.csv": CSV,
    "plain.tsv": TSV,
    "named.tsv": "id\tde\ten\n" + "".join(f"7\t{de}\t{en}\n" for en, de in PAIRS),
    "bom.jsonl": "\ufeff" + FLAT,
    "windows.csv": CSV.replace("\n", "\r\n"),
}


def write(path: Path, text: str) -> str:
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def files(train: str, **others: str) -> TextSource:
    return TextSource(files={"train": train, **others})


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_text_format_gives_the_pairs_in_order(tmp_path: Path, name: str, packed: str) -> None:
    path = write(tmp_path / (name + packed), FORMATS[name])
    assert load_parallel(files(path)) == {"train": PAIRS}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    "named", ["{0}.en{1}", "{0}.de{1}", "{0}", "{0}.en{1},{0}.de{1}", "{0}.de{1},{0}.en{1}"],
)  # fmt: skip
def test_parallel_text_is_found_from_either_file_both_or_their_beginning(
    tmp_path: Path, named: str, packed: str
) -> None:
    write(tmp_path / f"train.en{packed}", ENGLISH)
    write(tmp_path / f"train.de{packed}", GERMAN)
    source = files(named.format(tmp_path / "train", packed))
    assert load_parallel(source) == {"train": PAIRS}
    assert load_parallel(source, "de_DE", "en_XX") == {"train": [(de, en) for en, de in PAIRS]}


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_is_read_by_struct_or_by_columns(tmp_path: Path, nested: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"en": en, "de": de} for en, de in PAIRS]
    table = pyarrow.Table.from_pylist([{"translation": row} for row in rows] if nested else rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    assert load_parallel(files(str(tmp_path / "a.parquet"))) == {"train": PAIRS}


def test_pairs_with_an_empty_side_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.tsv", "one\teins\n \tzwei\nthree \t drei\nfour\t\n")
    with caplog.at_level(logging.WARNING):
        assert load_parallel(files(path)) == {"train": [("one", "eins"), ("three", "drei")]}
    assert "dropped 2 pairs" in caplog.text


def test_samples_are_the_first_pairs_of_train(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", TSV)
    loaded = load_parallel(files(path, validation=path, test=path), max_train_samples=2)
    assert loaded == {"train": PAIRS[:2], "validation": PAIRS, "test": PAIRS}


def test_the_embedded_corpus_comes_in_both_directions() -> None:
    forward = load_parallel(TextSource("embedded"), max_train_samples=30)
    assert {split: len(pairs) for split, pairs in forward.items()} == {"train": 30, "validation": 500, "test": 500}
    back = load_parallel(TextSource("embedded"), "de", "en", max_train_samples=30)
    assert back == {split: [(de, en) for en, de in pairs] for split, pairs in forward.items()}


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.jsonl", b'{"en": "x", "de": "y"}\n{"en": "x", "fr": "y"}\n', "line 2.*en, fr.*--source_lang"),
        ("a.jsonl", b'{"en": "x", "de": "y"}\n\n{"en": \n', "line 3.*one JSON object per line"),
        ("a.json", b'[{"en": "x", "de": "y"},\n {]', "line 2.*one JSON object"),
        ("a.jsonl", b'["en"]\n[1]\n', "one JSON object per line"),
        ("a.jsonl", b"7\n", "got int; rename the keys"),
        ("a.jsonl", b'{"en": 3, "de": "y"}\n', "convert the values to strings"),
        ("a.csv", b"english,de\nx,y\n", "line 1.*english, de; rename the keys"),
        ("a.tsv", b"x\ty\nx\n", "line 2.*got 1; separate them by one tab"),
        ("a.tsv", b"x\ty\tz\n", "got 3; separate them by one tab, or name the columns"),
        ("a.tsv", b"x\ty\n\xff\ty\n", "0xff in line 2; convert the file to UTF-8"),
        ("a.jsonl", b"", "an empty file; give a file with pairs"),
        ("a.tsv", b"x\t \n", "none with text on both sides"),
        ("a.tsv.gz", b"x\ty\n", "damaged data.*drop .gz"),
        ("a.xml", b"<x/>", r"one of .jsonl.*\.en, \.de.*rename the file"),
        ("a.parquet", b"no parquet", "parquet.*write it again"),
        ("a.fr", b"bonjour\n", "--source_lang and --target_lang"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_what_to_do(
    tmp_path: Path, name: str, raw: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=f"(?s)^load_parallel: expected.*{words}") as caught:
        load_parallel(files(str(tmp_path / name)))
    assert str(tmp_path / name) in str(caught.value)


def test_parallel_text_of_unequal_length_names_both_files_and_counts(tmp_path: Path) -> None:
    path, other = write(tmp_path / "a.en", ENGLISH), write(tmp_path / "a.de", GERMAN + "mehr\n")
    with pytest.raises(ValueError, match="got 3 and 4; align the two files line by line") as caught:
        load_parallel(files(path))
    assert path in str(caught.value) and other in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "none.en", "none", "none.en,none.de", "lone.en"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "lone.en", ENGLISH)
    with pytest.raises(FileNotFoundError, match=r"which does not exist.*check the path") as caught:
        load_parallel(files(",".join(str(tmp_path / part) for part in name.split(","))))
    assert name.split(".")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (TextSource(), "de", "got neither; give --dataset_name.*--train_file"),
        (TextSource("embedded", files={"train": "a.tsv"}), "de", "got both 'embedded'"),
        (TextSource("embedded"), "fr", "got en-fr; give --train_file"),
    ],
)
def test_a_source_that_cannot_be_says_what_to_give(source: TextSource, target: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_parallel(source, "en", target)


def test_a_missing_train_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got only validation; give --train_file"):
        load_parallel(TextSource(files={"validation": write(tmp_path / "a.tsv", TSV)}))


@pytest.fixture
def dataset_folder(tmp_path: Path) -> str:
    """A folder in the layout of a hub repository, with two configurations named in a README."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"translation": datasets.Translation(languages=["de", "en"])})
    rows = {"translation": [{"de": de, "en": en} for en, de in PAIRS]}
    plain = datasets.Dataset.from_dict({"text": ["x"]})
    (tmp_path / "hub").mkdir()
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub" / f"pair-{split}.parquet")
    plain.to_parquet(tmp_path / "hub" / "plain-train.parquet")
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: de-en\n  data_files:\n  - {split: train, path: pair-train.parquet}\n"
        "  - {split: validation, path: pair-validation.parquet}\n"
        "- config_name: plain\n  data_files:\n  - {split: train, path: plain-train.parquet}\n---\n"
    )
    return str(tmp_path / "hub")


@pytest.mark.parametrize("configuration", ["de-en", "en-de", None])
def test_a_translation_feature_is_read_whichever_way_its_configuration_is_named(
    dataset_folder: str, configuration: str | None
) -> None:
    loaded = load_parallel(TextSource(dataset_folder, configuration), max_train_samples=2)
    assert loaded == {"train": PAIRS[:2], "validation": PAIRS}


def test_a_dataset_without_translations_or_the_configuration_is_refused(dataset_folder: str) -> None:
    with pytest.raises(ValueError, match=r"expected a feature 'translation'.*got text; .*--train_file"):
        load_parallel(TextSource(dataset_folder, "plain"))
    with pytest.raises(ValueError, match=r"configuration 'cs-en'.*--train_file and --validation_file"):
        load_parallel(TextSource(dataset_folder, "cs-en"))


# What makes importing the packages fail as where they are not installed.
WITHOUT_PACKAGES = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"datasets", "pyarrow"}:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocker())
from tritonsparse.train.text.corpora import load_parallel
from tritonsparse.train.text.source import TextSource
print(len(load_parallel(TextSource(files={"train": sys.argv[1]}))["train"]))
print(len(load_parallel(TextSource("embedded"), max_train_samples=9)["train"]))
try: load_parallel(TextSource("wmt/wmt14", "de-en"))
except ValueError as error: print(error)
"""


def test_local_files_and_the_embedded_corpus_work_without_datasets_and_pyarrow(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_PACKAGES, write(tmp_path / "a.jsonl", NESTED)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    first, second, error = done.stdout.splitlines()
    assert (first, second) == ("3", "9")
    assert "pip install datasets, or read local files with --train_file" in error
