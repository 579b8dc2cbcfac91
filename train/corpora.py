"""Parallel text from wherever it is: the embedded corpus, the Hugging Face hub, or local files.

Local files need no `datasets`: JSON lines, TSV, CSV and parallel plain text, each also gzipped, are read with
the standard library, parquet with `pyarrow`. Every reader gives (source, target) pairs in the file's order.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .embedded_translation import DEFAULT_SIZES, generate

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
_FORMATS = "one of .jsonl, .json, .tsv, .csv, .parquet, or parallel text ending in the languages' codes"
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


def load_parallel(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    source_lang: str = "en",
    target_lang: str = "de",
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    *,
    require_train: bool = True,
) -> dict[str, list[Pair]]:
    """(source, target) pairs by split: "train", and "validation" and "test" where the source has them.

    Args:
        dataset_name: "embedded", a hub id ("wmt/wmt14"), or a local folder that `datasets` can read.
        dataset_config_name: Its configuration; a language pair may be named in either order.
        source_lang, target_lang: Language codes; of "en_XX" the part before "_" counts.
        train_file, validation_file, test_file: Local files instead of a dataset. Parallel text is named by
            one of its two files ("train.en.gz"), their common beginning ("dir/train"), or as "a.en,a.de".
        max_train_samples, max_eval_samples: Keep the first so many pairs of train, of each other split.
        seed: Seed of the embedded corpus; other sources keep their order.
        require_train: Whether a missing train split is an error.

    Raises:
        ValueError: No source or two, an unreadable or malformed file, a missing language, an unknown dataset.
        FileNotFoundError: A file, or the other half of parallel text, does not exist.
    """
    source, target = source_lang.split("_")[0], target_lang.split("_")[0]
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {split: path for split, path in files.items() if path}
    limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_eval_samples}
    if bool(dataset_name) == bool(files):
        got = f"both {dataset_name!r} and {sorted(files)}" if files else "neither"
        raise ValueError(
            f"load_parallel: expected either dataset_name or local files, got {got}; "
            "give --dataset_name (embedded, or a hub id), or --train_file and --validation_file"
        )
    if dataset_name == "embedded":
        splits = _embedded(source, target, limits, seed)
    elif dataset_name:
        splits = _hub(dataset_name, dataset_config_name, source, target, limits)
    else:
        splits = {}
        for split, path in files.items():
            kept = list(islice(_stripped(_read(str(path), source, target), str(path)), limits[split]))
            splits[split] = kept
            if not kept:
                raise ValueError(
                    f"load_parallel: expected sentence pairs in {path}, got none with text on both sides; "
                    "give a file that is not empty"
                )
    if require_train and "train" not in splits:
        raise ValueError(
            f"load_parallel: expected a train split, got only {', '.join(splits)}; give --train_file, "
            "or a dataset that has one"
        )
    return splits


def clean_pairs(pairs: Iterable[Pair], max_words: int = 250, max_ratio: float | None = None) -> list[Pair]:
    """Drop pairs with a side of more than `max_words` words, or one side `max_ratio` times the other's words.

    fairseq's cleaning drops above 250 and 1.5, counted in subwords; no ratio is the default here, because in
    words "Wednesday" and "am Mittwoch" already differ by two.
    """
    kept, seen = [], 0
    for pair in pairs:
        seen += 1
        short, long = sorted(len(side.split()) for side in pair)
        if long <= max_words and (max_ratio is None or long <= max_ratio * short):
            kept.append(pair)
    if seen > len(kept):
        logger.info("clean_pairs: dropped %d of %d pairs by length", seen - len(kept), seen)
    return kept


def _embedded(source: str, target: str, limits: Mapping[str, int | None], seed: int) -> dict[str, list[Pair]]:
    if {source, target} != {"en", "de"}:
        raise ValueError(
            f"load_parallel: expected en-de or de-en for dataset_name 'embedded', got {source}-{target}; "
            "give --train_file and --validation_file for another pair of languages"
        )
    sizes = {
        split: size if limits[split] is None else min(size, limits[split] or 0) for split, size in DEFAULT_SIZES.items()
    }
    made = generate(seed, sizes)
    return made if source == "en" else {split: [(de, en) for en, de in pairs] for split, pairs in made.items()}


def _stripped(pairs: Iterable[Pair], name: str) -> Iterator[Pair]:
    """Pairs without surrounding blanks; those with an empty side are dropped, and counted in the log."""
    dropped = 0
    for left, right in pairs:
        left, right = left.strip(), right.strip()
        if left and right:
            yield left, right
        else:
            dropped += 1
    if dropped:
        logger.warning("load_parallel: dropped %d pairs of %s with an empty side", dropped, name)


def _hub(
    name: str, config: str | None, source: str, target: str, limits: Mapping[str, int | None]
) -> dict[str, list[Pair]]:
    local = "or read local files with --train_file and --validation_file"
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"load_parallel: expected the package datasets for dataset_name {name!r}, got {error}; "
            f"pip install datasets, {local}"
        ) from error
    candidates = [config]
    if config is None:
        candidates += [f"{source}-{target}", f"{target}-{source}"]
    elif match := re.fullmatch(r"([A-Za-z]+)([-_])([A-Za-z]+)", config):
        candidates.append(f"{match[3]}{match[2]}{match[1]}")
    found: Any = None
    first: Exception | None = None
    for candidate in candidates:
        try:
            found = datasets.load_dataset(name, candidate)
            break
        except ValueError as error:  # `datasets` has no narrower type for an unknown configuration
            first = first or error
        except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # unknown, gated, offline
            first = error
            break
    if found is None:
        reason = " ".join(str(first).split()).rstrip(".")
        raise ValueError(
            f"load_parallel: expected a dataset that can be loaded, got {name!r}, configuration {config!r} "
            f"({type(first).__name__}: {reason}); check the name, the configuration and the network, {local}"
        ) from first
    chosen = {"train": ("train",), "validation": _VALIDATION_NAMES, "test": ("test",)}
    splits = {}
    for split, names in chosen.items():
        present = [known for known in names if known in found]
        if present:
            rows = _dataset_rows(found[present[0]], name, source, target)
            splits[split] = list(islice(_stripped(rows, f"{name} {split}"), limits[split]))
    return splits


def _dataset_rows(rows: Any, name: str, source: str, target: str) -> Iterator[Pair]:
    columns = list(rows.column_names)
    if "translation" in columns:
        for batch in rows.select_columns(["translation"]).iter(batch_size=1000):
            for pair in batch["translation"]:
                yield _sides(pair, source, target, name)
    elif source in columns and target in columns:
        for batch in rows.select_columns([source, target]).iter(batch_size=1000):
            yield from zip(batch[source], batch[target], strict=True)
    else:
        raise ValueError(
            f"load_parallel: expected a feature 'translation', or '{source}' and '{target}', in {name!r}, "
            f"got {', '.join(columns)}; choose a translation dataset, or convert it and give --train_file"
        )


def _sides(row: Any, source: str, target: str, where: str) -> Pair:
    """The two languages of a mapping, which may hold them under "translation"."""
    if isinstance(row, Mapping) and isinstance(row.get("translation"), Mapping):
        row = row["translation"]
    keys = list(row) if isinstance(row, Mapping) else []
    missing = [lang for lang in (source, target) if lang not in keys]
    if missing:
        got = ", ".join(map(str, keys)) if keys else type(row).__name__
        raise ValueError(
            f"load_parallel: expected the keys '{source}' and '{target}' ({where}), got {got}; "
            "rename the keys, or set --source_lang and --target_lang"
        )
    left, right = row[source], row[target]
    if not all(side is None or isinstance(side, str) for side in (left, right)):
        raise ValueError(
            f"load_parallel: expected text under '{source}' and '{target}' ({where}), "
            f"got {type(left).__name__} and {type(right).__name__}; convert the values to strings"
        )
    return left or "", right or ""


def _read(path: str, source: str, target: str) -> Iterator[Pair]:
    """Pairs of one local file, or of two that belong together."""
    kind = Path(path.removesuffix(".gz")).suffix
    if not Path(path).exists() and (pair := _named_pair(path, source, target)):
        return _parallel(*pair)
    if kind in (f".{source}", f".{target}"):
        _bytes(path)
        return _parallel(*_partners(path, source, target))
    readers = {".jsonl": _json, ".json": _json, ".tsv": _tsv, ".csv": _csv, ".parquet": _parquet}
    if kind in readers:
        return readers[kind](path, source, target)
    if not Path(path).exists():
        raise FileNotFoundError(
            f"load_parallel: expected a file, got {path}, which does not exist, nor does {path}.{source}; "
            "check the path"
        )
    raise ValueError(
        f"load_parallel: expected {_FORMATS} (.{source}, .{target}), each also with .gz, got {path}; "
        "rename the file, or set --source_lang and --target_lang"
    )


def _named_pair(path: str, source: str, target: str) -> tuple[str, str] | None:
    """The two files meant by "a.en,a.de", or by their common beginning."""
    left, comma, right = (part.strip() for part in path.partition(","))
    if comma:
        swapped = left.removesuffix(".gz").endswith(f".{target}") and right.removesuffix(".gz").endswith(f".{source}")
        return (right, left) if swapped else (left, right)
    for packed in ("", ".gz"):
        pair = f"{path}.{source}{packed}", f"{path}.{target}{packed}"
        if any(Path(name).exists() for name in pair):
            return pair
    return None


def _partners(path: str, source: str, target: str) -> tuple[str, str]:
    """The source's and the target's file, from either: "train.en.gz" gives "train.en.gz", "train.de.gz"."""
    packed = ".gz" if path.endswith(".gz") else ""
    plain = path.removesuffix(".gz")
    is_source = plain.endswith(f".{source}")
    stem = plain.removesuffix(f".{source}" if is_source else f".{target}")
    other = f"{stem}.{target if is_source else source}"
    candidates = [other + packed, other + ("" if packed else ".gz")]
    partner = next((name for name in candidates if Path(name).exists()), candidates[0])
    return (path, partner) if is_source else (partner, path)


def _bytes(path: str) -> bytes:
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"load_parallel: expected a file, got {path}, which does not exist; "
            "check the path (parallel text needs both of its files)"
        )
    if not file.is_file():
        raise ValueError(f"load_parallel: expected a file, got the folder {path}; name a file in it")
    try:
        raw = gzip.decompress(file.read_bytes()) if path.endswith(".gz") else file.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"load_parallel: expected gzip data in {path}, got damaged data ({error}); compress it again, "
            "or drop .gz from the name of a plain file"
        ) from error
    if not raw.strip():
        raise ValueError(f"load_parallel: expected text in {path}, got an empty file; give a file with pairs")
    return raw


def _text(path: str) -> str:
    raw = _bytes(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"load_parallel: expected UTF-8 text in {path}, got the byte 0x{raw[error.start]:02x} in line "
            f"{line}; convert the file to UTF-8"
        ) from error


def _lines(path: str) -> list[str]:
    # Not splitlines(): it also breaks at U+2028 and the like, which corpora hold inside sentences, and the
    # two sides of parallel text would slip against each other.
    text = _text(path).removesuffix("\n")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _parallel(source_path: str, target_path: str) -> Iterator[Pair]:
    left, right = _lines(source_path), _lines(target_path)
    if len(left) != len(right):
        raise ValueError(
            f"load_parallel: expected as many lines in {source_path} as in {target_path}, "
            f"got {len(left)} and {len(right)}; align the two files line by line"
        )
    yield from zip(left, right, strict=True)


def _json(path: str, source: str, target: str) -> Iterator[Pair]:
    text = _text(path)
    if text.lstrip().startswith("["):
        for number, row in enumerate(_parsed(text, path, 1), 1):
            yield _sides(row, source, target, f"{path}, entry {number}")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _sides(_parsed(line, path, number), source, target, f"{path}, line {number}")


def _parsed(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"load_parallel: expected JSON in {path}, got {error.msg} in line "
            f"{first_line + error.lineno - 1}; write one JSON object per line"
        ) from error


def _tsv(path: str, source: str, target: str) -> Iterator[Pair]:
    rows = [line.split("\t") for line in _lines(path)]
    header = [cell.strip() for cell in rows[0]]
    named = source in header and target in header
    left, right = (header.index(source), header.index(target)) if named else (0, 1)
    for number, row in enumerate(rows[named:], 1 + named):
        if row == [""]:
            continue
        if len(row) <= max(left, right) or (not named and len(row) != 2):
            raise ValueError(
                f"load_parallel: expected two columns, source first ({path}, line {number}), got {len(row)}; "
                f"separate them by one tab, or name the columns in a first line ({source}, {target})"
            )
        yield row[left], row[right]


def _csv(path: str, source: str, target: str) -> Iterator[Pair]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    _sides(dict.fromkeys(reader.fieldnames or (), ""), source, target, f"{path}, line 1")
    for row in reader:
        yield _sides(row, source, target, f"{path}, line {reader.line_num}")


def _parquet(path: str, source: str, target: str) -> Iterator[Pair]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"load_parallel: expected the package pyarrow to read {path}, got {error}; "
            "pip install pyarrow, or convert the file to JSON lines"
        ) from error
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(_bytes(path)))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"load_parallel: expected parquet data in {path}, got {error}; write it again") from error
    columns: Sequence[str] = [name for name in ("translation", source, target) if name in table.column_names]
    if not columns:
        _sides(dict.fromkeys(table.column_names), source, target, path)
    for batch in table.select(columns).to_batches(1000):
        for row in batch.to_pylist():
            yield _sides(row, source, target, path)
