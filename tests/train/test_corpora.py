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

from tritonsparse.train.corpora import clean_pairs, load_parallel

PAIRS = [("A dog.", "Ein Hund."), ('He says "no", twice.', "Er sagt zweimal „nein“."), ("a\u2028b", "c")]
ENGLISH = "".join(f"{en}\n" for en, _ in PAIRS)
GERMAN = "".join(f"{de}\n" for _, de in PAIRS)
NESTED = "".join(json.dumps({"translation": {"de": de, "en": en}}) + "\n" for en, de in PAIRS)
FLAT = "".join(json.dumps({"en": en, "de": de, "id": 1}) + "\n" for en, de in PAIRS)
CSV = "de,en\n" + "".join('"{}","{}"\n'.format(de, en.replace('"', '""')) for en, de in PAIRS)
TSV = "".join(f"{en}\t{de}\n" for en, de in PAIRS)
TSV_NAMED = "id\tde\ten\n" + "".join(f"7\t{de}\t{en}\n" for en, de in PAIRS)
ARRAY = json.dumps([{"en": en, "de": de} for en, de in PAIRS], indent=1)


def write(path: Path, text: str) -> str:
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", NESTED),
        ("b.jsonl", FLAT),
        ("c.json", FLAT),
        ("d.json", ARRAY),
        ("e.csv", CSV),
        ("f.tsv", TSV),
        ("g.tsv", TSV_NAMED),
        ("h.jsonl", "\ufeff" + FLAT),
        ("i.csv", CSV.replace("\n", "\r\n")),
    ],
)
def test_every_text_format_gives_the_pairs_in_order(tmp_path: Path, name: str, text: str, packed: str) -> None:
    path = write(tmp_path / (name + packed), text)
    assert load_parallel(train_file=path) == {"train": PAIRS}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    "named",
    [
        "{0}/train.en{1}",
        "{0}/train.de{1}",
        "{0}/train",
        "{0}/train.en{1},{0}/train.de{1}",
        "{0}/train.de{1},{0}/train.en{1}",
    ],
)
def test_parallel_text_is_found_from_either_file_both_or_their_beginning(
    tmp_path: Path, named: str, packed: str
) -> None:
    write(tmp_path / f"train.en{packed}", ENGLISH)
    write(tmp_path / f"train.de{packed}", GERMAN)
    path = named.format(tmp_path, packed)
    assert load_parallel(train_file=path) == {"train": PAIRS}
    turned = load_parallel(train_file=path, source_lang="de_DE", target_lang="en_XX")
    assert turned == {"train": [(de, en) for en, de in PAIRS]}


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_is_read_by_struct_or_by_columns(tmp_path: Path, nested: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"en": en, "de": de} for en, de in PAIRS]
    table = pyarrow.Table.from_pylist([{"translation": row} for row in rows] if nested else rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    assert load_parallel(test_file=str(tmp_path / "a.parquet"), require_train=False) == {"test": PAIRS}


def test_pairs_with_an_empty_side_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.tsv", "one\teins\n \tzwei\nthree \t drei\nfour\t\n")
    with caplog.at_level(logging.WARNING):
        assert load_parallel(train_file=path) == {"train": [("one", "eins"), ("three", "drei")]}
    assert "dropped 2 pairs" in caplog.text


def test_samples_are_the_first_pairs_of_each_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", TSV)
    loaded = load_parallel(
        train_file=path, validation_file=path, test_file=path, max_train_samples=2, max_eval_samples=1
    )
    assert loaded == {"train": PAIRS[:2], "validation": PAIRS[:1], "test": PAIRS[:1]}


def test_the_embedded_corpus_comes_in_both_directions() -> None:
    sizes = {"max_train_samples": 30, "max_eval_samples": 5}
    forward = load_parallel("embedded", **sizes)
    back = load_parallel("embedded", source_lang="de", target_lang="en", **sizes)
    assert {split: len(pairs) for split, pairs in forward.items()} == {
        "train": 30,
        "validation": 5,
        "test": 5,
    }
    assert back == {split: [(de, en) for en, de in pairs] for split, pairs in forward.items()}
    assert load_parallel("embedded", seed=1, **sizes) != forward


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
        load_parallel(train_file=str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_parallel_text_of_unequal_length_names_both_files_and_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.en", ENGLISH)
    other = write(tmp_path / "a.de", GERMAN + "mehr\n")
    with pytest.raises(ValueError, match="got 3 and 4; align the two files") as caught:
        load_parallel(train_file=path)
    assert path in str(caught.value) and other in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "none.en", "none", "none.en,none.de", "lone.en"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "lone.en", ENGLISH)
    with pytest.raises(FileNotFoundError, match=r"which does not exist.*check the path") as caught:
        load_parallel(train_file=",".join(str(tmp_path / part) for part in name.split(",")))
    assert name.split(".")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "got neither; give --dataset_name.*--train_file"),
        ({"dataset_name": "embedded", "train_file": "a.tsv"}, "got both 'embedded'"),
        ({"dataset_name": "embedded", "target_lang": "fr"}, "got en-fr; give --train_file"),
    ],
)
def test_a_source_that_cannot_be_says_what_to_give(options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_parallel(**options)  # type: ignore[arg-type]


def test_a_missing_train_split_is_an_error_unless_told_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", TSV)
    with pytest.raises(ValueError, match="got only validation; give --train_file"):
        load_parallel(validation_file=path)
    assert load_parallel(validation_file=path, require_train=False) == {"validation": PAIRS}


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


@pytest.mark.parametrize("config", ["de-en", "en-de", None])
def test_a_translation_feature_is_read_whichever_way_its_configuration_is_named(
    dataset_folder: str, config: str | None
) -> None:
    loaded = load_parallel(dataset_folder, config, max_eval_samples=1)
    assert loaded == {"train": PAIRS, "validation": PAIRS[:1]}


def test_a_dataset_without_translations_names_its_features(dataset_folder: str) -> None:
    with pytest.raises(ValueError, match=r"expected a feature 'translation'.*got text; .*--train_file"):
        load_parallel(dataset_folder, "plain")


def test_an_unknown_configuration_names_the_local_alternative(dataset_folder: str) -> None:
    with pytest.raises(ValueError, match=r"configuration 'cs-en'.*--train_file and --validation_file"):
        load_parallel(dataset_folder, "cs-en")


# What makes importing the package `name` fail as where it is not installed.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"datasets", "pyarrow"}:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocker())
from tritonsparse.train.corpora import load_parallel
"""


def run(program: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_local_files_and_the_embedded_corpus_work_without_datasets_and_pyarrow(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", NESTED)
    program = BLOCKER + (
        "print(len(load_parallel(train_file=sys.argv[1])['train']))\n"
        "print(len(load_parallel('embedded', max_train_samples=9, max_eval_samples=2)['train']))\n"
        "try: load_parallel('wmt/wmt14', 'de-en')\n"
        "except ValueError as error: print(error)\n"
    )
    first, second, error = run(program, path).splitlines()
    assert (first, second) == ("3", "9")
    assert "pip install datasets, or read local files with --train_file" in error


def test_offline_an_unknown_dataset_is_one_sentence_that_names_the_local_alternative(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    program = (
        "from tritonsparse.train.corpora import load_parallel\n"
        "try: load_parallel('nobody/no-such-corpus', 'en-de')\n"
        "except ValueError as error: print(error)\n"
    )
    printed = run(program, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("load_parallel: expected a dataset that can be loaded, got 'nobody/no-such-corpus'")
    assert printed[0].endswith("or read local files with --train_file and --validation_file")


def test_cleaning_drops_by_words_and_only_by_ratio_when_asked() -> None:
    pairs = [("a", "b c d"), ("a " * 251, "b"), ("a b", "c d")]
    assert clean_pairs(pairs) == [pairs[0], pairs[2]]
    assert clean_pairs(pairs, max_ratio=1.5) == [pairs[2]]
