"""Token streams on disk: a text as int32 ids end to end, memory-mapped, made anew when the text or its ids change.

folder/vocabulary.txt   the word-level vocabulary, where there is one
folder/train.int32      ids, little-endian
folder/train.json       what they are of: the text's fingerprint and the encoder's, and how many
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsparse.models.transfo_xl import Vocabulary

from .lines import Text

__all__ = [
    "VOCABULARY_FILE", "Ids", "encode_with_tokenizer", "removed_on_error", "token_stream", "vocabulary_fingerprint",
    "word_counts",
]  # fmt: skip

Ids = NDArray[np.int32]

VOCABULARY_FILE = "vocabulary.txt"
# Lines that are encoded at a time.
_LINES = 10_000


def token_stream(
    text: Text, encode: Callable[[Sequence[str]], Sequence[int] | Ids], encoder: str, folder: Path, split: str
) -> Ids:
    """The ids of `text`, memory-mapped from `folder`; made there unless what lies there is of this text and encoder.

    Args:
        text: the lines.
        encode: lines -> their ids end to end.
        encoder: fingerprint of `encode`; other ids must come with another one.
        folder: where the stream lies; made if need be.
        split: the stream's name.

    Returns:
        int32 `[tokens]`, read-only.

    Raises:
        ValueError: the text has no line.
    """
    path, label = folder / f"{split}.int32", folder / f"{split}.json"
    key = {"text": text.fingerprint(), "encoder": encoder}
    if not _is_of(path, label, key):
        folder.mkdir(parents=True, exist_ok=True)
        tokens = 0
        temporary = folder / f".{path.name}.{os.getpid()}"
        with temporary.open("wb") as file:
            for lines in _chunks(text):
                ids = np.asarray(encode(lines), dtype="<i4")
                file.write(ids.tobytes())
                tokens += len(ids)
        if not tokens:
            temporary.unlink()
            raise ValueError(f"token_stream: expected text, got none in {text.name}; give a file that is not empty")
        # The label goes first and comes last: a stream without one is of nothing.
        label.unlink(missing_ok=True)
        os.replace(temporary, path)
        label.write_text(json.dumps({**key, "tokens": tokens}), encoding="utf-8")
    return np.memmap(path, dtype="<i4", mode="r")


@contextlib.contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Files that come to lie in `folder` meanwhile, and folders made for it, go again where what is inside fails."""
    before, absent = set(folder.glob("*")), [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for path in set(folder.glob("*")) - before:
            path.unlink(missing_ok=True)
        for each in absent:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def _is_of(path: Path, label: Path, key: dict[str, str]) -> bool:
    try:
        found = json.loads(label.read_text(encoding="utf-8"))
        return bool(found == {**key, "tokens": path.stat().st_size // 4})
    except (OSError, ValueError):
        return False


def _chunks(lines: Iterable[str]) -> Iterable[list[str]]:
    iterator = iter(lines)
    while chunk := list(itertools.islice(iterator, _LINES)):
        yield chunk


def vocabulary_fingerprint(vocabulary: Vocabulary) -> str:
    """SHA-256 of the words in order."""
    return hashlib.sha256("\n".join(vocabulary.words).encode()).hexdigest()


def encode_with_tokenizer(tokenizer: Any) -> tuple[Callable[[Sequence[str]], list[int]], str]:
    """`encode` and `encoder` of `token_stream` for a transformers tokenizer: each line with its line end.

    No special tokens are added.
    """

    def encode(lines: Sequence[str]) -> list[int]:
        ids = tokenizer([f"{line}\n" for line in lines], add_special_tokens=False)["input_ids"]
        return list(itertools.chain.from_iterable(ids))

    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return encode, hashlib.sha256(description.encode()).hexdigest()


def word_counts(lines: Iterable[str]) -> tuple[int, int]:
    """Words between whitespace, and lines: perplexity a word divides the total by their sum."""
    words = count = 0
    for line in lines:
        words, count = words + len(line.split()), count + 1
    return words, count
