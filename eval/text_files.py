"""Text files as every program reads them: UTF-8, line by line; what is none is refused by file and line.

Only "\\n" ends a line, with or without "\\r" before it. Texts carry U+2028, U+0085 and stray "\\r" inside sentences;
breaking there would shift parallel text. A byte order mark at the beginning is dropped; `.gz` is unpacked.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["parallel_lines", "read_bytes", "read_lines", "stream_lines"]

# How files begin that are no UTF-8; the longer first, as UTF-32's mark begins with UTF-16's.
_BEGINNINGS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16", b"\x1f\x8b": "gzip data", b"\xfd7zXZ": "xz data", b"BZh": "bzip2 data",
    b"\x28\xb5\x2f\xfd": "zstd data", b"PK\x03\x04": "a zip archive", b"PAR1": "parquet data",
}  # fmt: skip


def stream_lines(function: str, path: str) -> Iterator[str]:
    """The lines of a file without their ends, read as they are asked for.

    Args:
        function: who asks, for messages.
        path: a UTF-8 file, `.gz` or not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty or damaged, holds a NUL or a byte that is not UTF-8, or only "\\r" ends its lines.
    """
    empty, head = True, b""
    with _named(function, path), (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                head = raw[:8]
                raw = raw.removeprefix(codecs.BOM_UTF8)
                if not raw.endswith(b"\n") and b"\r" in raw[:-1]:
                    raise ValueError(
                        f"{function}: expected lines that end in \\n or \\r\\n in {path}, got \\r alone in line 1; "
                        f"convert it, as by mac2unix"
                    )
            if raw:
                empty = False
                yield _decoded(raw, head, f"{path}, line {number}", function)
    if empty:
        raise ValueError(f"{function}: expected text in {path}, got an empty file; give a file that is not empty")


def _decoded(raw: bytes, head: bytes, where: str, function: str) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"the byte 0x{raw[error.start]:02x}"
    else:
        if "\0" not in text:
            return text.removesuffix("\n").removesuffix("\r")
        found = "a NUL character"
    kind = next((f" ({name})" for start, name in _BEGINNINGS.items() if head.startswith(start)), "")
    raise ValueError(f"{function}: expected UTF-8 text ({where}), got {found}{kind}; convert the file to UTF-8")


def read_lines(function: str, path: str) -> list[str]:
    """All lines of a file; see `stream_lines`."""
    return list(stream_lines(function, path))


def parallel_lines(function: str, first: str, second: str) -> tuple[list[str], list[str]]:
    """The lines of two files that belong together line by line.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: one cannot be read, or they are of unequal length.
    """
    left, right = read_lines(function, first), read_lines(function, second)
    if len(left) != len(right):
        raise ValueError(
            f"{function}: expected as many lines in {first} as in {second}, got {len(left)} and {len(right)}; align "
            f"the two files line by line"
        )
    return left, right


def read_bytes(function: str, path: str) -> bytes:
    """A file whole, `.gz` unpacked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty or damaged.
    """
    with _named(function, path), (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        raw = file.read()
    if not raw:
        raise ValueError(f"{function}: expected data in {path}, got an empty file; give a file that is not empty")
    return raw


@contextmanager
def _named(function: str, path: str) -> Iterator[None]:
    """Errors of opening and unpacking, with the file that they are of."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{function}: expected a file, got {path}, which does not exist; check the path (parallel text needs both "
            f"of its files)"
        ) from error
    except IsADirectoryError as error:
        raise ValueError(f"{function}: expected a file, got the folder {path}; name a file in it") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{function}: expected gzip data in {path}, got damaged data ({error}); compress it again, or drop .gz "
            f"from the name of a plain file"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{function}: expected a readable file, got {path} ({error.strerror or error}); check it"
        ) from error
