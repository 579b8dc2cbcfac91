"""One reader of text files: the lines that the bytes hold, or one sentence with file and line, in every program."""

from __future__ import annotations

import codecs
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from tritonsparse.eval.bleu import _read_lines
from tritonsparse.eval.language_models import read_lines
from tritonsparse.eval.text_files import parallel_lines, stream_lines
from tritonsparse.train.corpora import load_parallel
from tritonsparse.train.text import load_text

# As every program reads a file; of parallel text the first side, whose second is alike.
READERS: dict[str, Callable[[str], list[str]]] = {
    "stream": lambda path: list(stream_lines("x", path)),
    "bleu": _read_lines,
    "perplexity, agreement": lambda path: read_lines("x", path),
    "language_modeling": lambda path: list(load_text(train_file=path, validation_file=path)["train"]),
    "translation": lambda path: [left for left, _ in load_parallel(train_file=f"{path},{path}")["train"]],
}
READ = {
    "plain": (b"one\ntwo\n", ["one", "two"]),
    "no last end": (b"one\ntwo", ["one", "two"]),
    "windows": (b"one\r\ntwo\r\n", ["one", "two"]),
    "mark": (codecs.BOM_UTF8 + "ä\n".encode(), ["ä"]),
    "mark alone on a line": (codecs.BOM_UTF8 + b"one", ["one"]),
    "other line ends": ("a\rb\u2028c\x85d\x0be\x0cf\x1cg\ntwo\n".encode(), ["a\rb\u2028c\x85d\x0be\x0cf\x1cg", "two"]),
    "a mark inside": ("a\ufeffb\n".encode(), ["a\ufeffb"]),
}
REFUSED = {
    "latin-1": ("ß\n".encode("latin-1"), "line 1), got the byte 0xdf; convert"),
    "late": (b"one\n" * 999 + b"t\xe9\n", "line 1000), got the byte 0xe9; convert"),
    "surrogate": (b"one\n\xed\xa0\xbd\n", "line 2), got the byte 0xed; convert"),
    "utf-16": ("one\n".encode("utf-16"), "line 1), got the byte 0xff (UTF-16)"),
    "utf-16-be": (codecs.BOM_UTF16_BE + "one\n".encode("utf-16-be"), "line 1), got the byte 0xfe (UTF-16)"),
    "utf-32": ("one\n".encode("utf-32"), "line 1), got the byte 0xff (UTF-32)"),
    "no mark": ("one\n".encode("utf-16-le"), "line 1), got a NUL character"),
    "nul": (b"one\ntw\0o\n", "line 2), got a NUL character"),
    "packed": (gzip.compress(b"one\n"), "got the byte 0x8b (gzip data)"),
    "xz": (lzma.compress(b"one\n"), "got the byte 0xfd (xz data)"),
    "old mac": (b"one\rtwo\rthree\r", "got \\r alone in line 1"),
    "empty": (b"", "got an empty file"),
    "only a mark": (codecs.BOM_UTF8, "got an empty file"),
    "cut.gz": (gzip.compress(b"one\n" * 999)[:-9], "damaged data (Compressed file ended"),
    "other.gz": (b"one\n", "damaged data (Not a gzipped file"),
    "flipped.gz": (gzip.compress(b"one\n")[:10] + b"\xff" * 9, "damaged data"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", READ)
def test_the_lines_are_those_that_the_bytes_hold(tmp_path: Path, reader: str, packed: str, kind: str) -> None:
    (raw, lines), path = READ[kind], tmp_path / f"text{packed}"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert READERS[reader](str(path)) == lines


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_text_is_refused_by_file_and_line(tmp_path: Path, reader: str, kind: str) -> None:
    (raw, words), path = REFUSED[kind], tmp_path / kind
    path.write_bytes(raw)
    with pytest.raises(ValueError) as caught:
        READERS[reader](str(path))
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_a_folder_and_unequal_files_are_named(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 2)):
        (tmp_path / name).write_text("x\n" * count)
    first, second = (str(tmp_path / name) for name in "ab")
    with pytest.raises(FileNotFoundError, match="x: expected a file, got /no/such, which does not exist"):
        read_lines("x", "/no/such")
    with pytest.raises(ValueError, match=f"got the folder {tmp_path}; name a file in it"):
        read_lines("x", str(tmp_path))
    with pytest.raises(ValueError, match=f"as many lines in {first} as in {second}, got 3 and 2; align"):
        parallel_lines("x", first, second)
