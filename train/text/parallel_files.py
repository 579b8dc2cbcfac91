"""Sentence pairs from local files: JSON lines, TSV, CSV, parquet and parallel plain text, each also gzipped.

`eval/text_files.py` reads the lines; parquet needs `pyarrow`. A row has as many columns as its header: with a cell too
many or a quote that does not close, other sentences would make pairs. TSV knows no quotes. Messages name
`load_parallel`, whose arguments the files are.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tritonsparse.eval.text_files import parallel_lines, read_bytes, read_lines, stream_lines

FUNCTION = "load_parallel"
Pair = tuple[str, str]
_FORMATS = "one of .jsonl, .json, .tsv, .csv, .parquet, or parallel text ending in the languages' codes"
# What a writer of CSV makes of a cell with quotes in it.
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


def read_pairs(path: str, source: str, target: str) -> Iterator[Pair]:
    """Pairs of one local file, or of two that belong together."""
    kind = Path(path.removesuffix(".gz")).suffix
    if not Path(path).exists() and (pair := _named_pair(path, source, target)):
        return _parallel(*pair)
    if kind in (f".{source}", f".{target}"):
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


def _parallel(source_path: str, target_path: str) -> Iterator[Pair]:
    yield from zip(*parallel_lines(FUNCTION, source_path, target_path), strict=True)


def _json(path: str, source: str, target: str) -> Iterator[Pair]:
    lines = read_lines(FUNCTION, path)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("["):
        for number, row in enumerate(_parsed("\n".join(lines), path, 1), 1):
            yield sides(row, source, target, f"{path}, entry {number}")
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield sides(_parsed(line, path, number), source, target, f"{path}, line {number}")


def _parsed(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line, reason = first_line + getattr(error, "lineno", 1) - 1, getattr(error, "msg", error)
        raise ValueError(
            f"load_parallel: expected JSON in {path}, got {reason} in line {line}; write one JSON object per line"
        ) from error


def _tsv(path: str, source: str, target: str) -> Iterator[Pair]:
    rows = [line.split("\t") for line in read_lines(FUNCTION, path)]
    header = [cell.strip() for cell in rows[0]]
    # "EN" is a header too, and then one with a wrong name.
    named = {source.lower(), target.lower()} <= {cell.lower() for cell in header}
    left, right = _places(header, source, target, path) if named else (0, 1)
    for number, row in enumerate(rows[named:], 1 + named):
        if row == [""]:
            continue
        if len(row) != (len(header) if named else 2):
            wanted = f"{len(header)} columns as in line 1" if named else "two columns, source first"
            raise ValueError(
                f"load_parallel: expected {wanted} ({path}, line {number}), got {len(row)}; "
                f"separate them by one tab, or name the columns in a first line ({source}, {target})"
            )
        for cell in (row[left], row[right]):
            if _QUOTED.fullmatch(cell):
                raise ValueError(
                    f"load_parallel: expected no quoting in tab-separated text ({path}, line {number}), got {cell}; "
                    "write its cells without added quotes, or the file as .csv"
                )
        yield row[left], row[right]


def _csv(path: str, source: str, target: str) -> Iterator[Pair]:
    rows = [(number, row) for number, row in _csv_rows(path) if row] or [(1, [""])]
    _, first = rows[0]
    header = [cell.strip() for cell in first]
    left, right = _places(header, source, target, path)
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise ValueError(
                f"load_parallel: expected {len(header)} columns as in line 1 ({path}, line {number}), got {len(row)}; "
                'put a side that holds commas between quotes: "Yes, sir"'
            )
        yield row[left], row[right]


def _csv_rows(path: str) -> list[tuple[int, list[str]]]:
    """(number of its first line, cells) of every row."""
    # The limit, 128 KiB, is the module's for all readers; a long sentence is no error here.
    limit, begins = csv.field_size_limit(1 << 30), 1
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader((f"{line}\n" for line in stream_lines(FUNCTION, path)), strict=True)
    try:
        for row in reader:
            rows.append((begins, row))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"load_parallel: expected CSV in {path}, got a row, begun in line {begins}, whose quotes do not fit "
            f"({error}); close them, and write a quote inside a quoted cell twice"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _places(header: Sequence[str], source: str, target: str, path: str) -> tuple[int, int]:
    """Which columns of a header the two languages are."""
    sides(dict.fromkeys(header, ""), source, target, f"{path}, line 1")
    if header.count(source) > 1 or header.count(target) > 1:
        raise ValueError(
            f"load_parallel: expected one column '{source}' and one '{target}' ({path}, line 1), got "
            f"{', '.join(header)}; rename the others"
        )
    return header.index(source), header.index(target)


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
        table = pyarrow.parquet.read_table(io.BytesIO(read_bytes(FUNCTION, path)))
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"load_parallel: expected parquet data in {path}, got {error}; write it again") from error
    columns: Sequence[str] = [name for name in ("translation", source, target) if name in table.column_names]
    if not columns:
        sides(dict.fromkeys(table.column_names), source, target, path)
    rows = (row for batch in table.select(columns).to_batches(1000) for row in batch.to_pylist())
    for number, row in enumerate(rows, 1):
        yield sides(row, source, target, f"{path}, row {number}")


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
    for side in (left, right):
        if "\0" in (side or ""):
            raise ValueError(f"load_parallel: expected text ({where}), got a NUL character; leave it out")
        try:
            (side or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"load_parallel: expected Unicode text ({where}), got the lone surrogate "
                f"U+{ord(error.object[error.start]):04X}, half of a character; write the file again"
            ) from error
    return left or "", right or ""
