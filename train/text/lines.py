"""Text from wherever it is, line by line: the embedded corpus, the Hugging Face hub, or local files.

The embedded corpus is the reference text that Python carries for its own help (`pydoc_data.topics`): some 65,000
words, other ones in other Python versions. A checksum of a paragraph puts it into a split, so what topics share is in
one split only.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonsparse.eval.text_files import stream_lines

from .source import EMBEDDED, SPLITS, TextSource, load_hub

__all__ = ["Text", "load_text"]

_ROWS = 1000


@dataclass(frozen=True)
class Text:
    """Lines without their line ends, read anew at every iteration; `name` stands in messages."""

    name: str
    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.read()

    def fingerprint(self) -> str:
        """SHA-256 of the lines."""
        digest = hashlib.sha256()
        for line in self:
            digest.update(line.encode())
            digest.update(b"\n")
        return digest.hexdigest()


def load_text(source: TextSource) -> dict[str, Text]:
    """The splits of a corpus, in the order train, validation, test; those that the source has.

    Args:
        source: a dataset must have a column "text", one line a row; local files are UTF-8, `.gz` or not, and are
            read whole once, so that nothing is written before a bad line is found.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: no source or two, an unreadable file, an unknown dataset, one without a column "text", or
            without train and validation.
    """
    source.check("load_text")
    if source.dataset == EMBEDDED:
        splits = _embedded()
    elif source.dataset:
        splits = _hub(source)
    else:
        splits = {split: _file(path) for split, path in source.files.items()}
    for split in ("train", "validation"):
        if split not in splits:
            raise ValueError(
                f"load_text: expected a {split} split, got only {', '.join(splits)}; give --{split}_file, or a dataset "
                f"that has one"
            )
    return splits


def _embedded() -> dict[str, Text]:
    from pydoc_data.topics import topics

    held_out = {0: "validation", 1: "test"}
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            split = held_out.get(zlib.crc32(paragraph.strip().encode()) % 12, "train")
            lines[split] += [*paragraph.split("\n"), ""]
    return {split: Text(f"embedded {split}", lambda part=part: iter(part)) for split, part in lines.items()}  # type: ignore[misc]


def _file(path: str) -> Text:
    if Path(path).exists() and not Path(path).is_file():
        # A pipe could be read once only.
        raise ValueError(f"load_text: expected a text file, got {path}, which is none; name a file")
    text = Text(path, lambda: stream_lines("load_text", path))
    for _ in text:
        pass
    return text


def _hub(source: TextSource) -> dict[str, Text]:
    splits = {}
    for split, rows in load_hub("load_text", source).items():
        if "text" not in rows.column_names:
            raise ValueError(
                f"load_text: expected a column 'text' in {source.dataset!r}, got {', '.join(rows.column_names)}; "
                f"choose a corpus of text, or read local files with --train_file and --validation_file"
            )
        name = f"{source.dataset} {split}"
        splits[split] = Text(name, lambda rows=rows, name=name: _rows(rows, name))  # type: ignore[misc]
    return splits


def _rows(rows: Any, name: str) -> Iterator[str]:
    number = 0
    for batch in rows.select_columns(["text"]).iter(batch_size=_ROWS):
        for text in batch["text"]:
            number += 1
            if not isinstance(text, str):
                raise ValueError(
                    f"load_text: expected text in {name}, row {number}, got {type(text).__name__}; leave such rows out"
                )
            # WikiText's rows keep the end of their line; a row of several lines is several lines.
            yield from text.removesuffix("\n").split("\n")
