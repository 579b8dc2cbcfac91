"""Sentence pairs from local files: JSON lines, TSV, CSV, parquet and parallel plain text, each also gzipped.

The standard library reads all but parquet, which needs `pyarrow`. Messages name `load_parallel`, whose
arguments the files are.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Pair = tuple[str, str]
_FORMATS = "one of .jsonl, .json, .tsv, .csv, .parquet, or parallel text ending in the languages' codes"


def read_pairs(path: str, source: str, target: str) -> Iterator[Pair]:
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
            yield sides(row, source, target, f"{path}, entry {number}")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield sides(_parsed(line, path, number), source, target, f"{path}, line {number}")


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
    sides(dict.fromkeys(reader.fieldnames or (), ""), source, target, f"{path}, line 1")
    for row in reader:
        yield sides(row, source, target, f"{path}, line {reader.line_num}")


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
        sides(dict.fromkeys(table.column_names), source, target, path)
    for batch in table.select(columns).to_batches(1000):
        for row in batch.to_pylist():
            yield sides(row, source, target, path)


def sides(row: Any, source: str, target: str, where: str) -> Pair:
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
