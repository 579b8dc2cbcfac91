"""What all command lines share: what an option takes, said once where it is declared; errors in one line.

    parser = Parser("accuracy", __doc__)
    parser.add_argument("--batch_size", type=COUNT, default=256)
    parser.rules.append(refuse_unfit)      # what holds between options

A word that does not fit is a ValueError that names the option, what it takes and what it got. `one_line` prints it as
"error: ..." and makes it exit status 2; Ctrl-C is 130 and SIGTERM 143, as shells have it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError

__all__ = [
    "BELOW_ONE", "COUNT", "DEVICE", "JSON_OBJECT", "MENDABLE", "NATURAL", "NON_NEGATIVE", "PATTERN", "POSITIVE", "SEED",
    "TEXT", "THREADS", "Parser", "Stopped", "Value", "naming", "one_line", "one_of", "real", "reason", "say",
    "stoppable", "whole",
]  # fmt: skip

# What is raised about arguments, files and devices, by this package and by those that it calls.
MENDABLE = (
    ValueError, TypeError, LookupError, OSError, EOFError, ImportError, RuntimeError, ArithmeticError, MemoryError,
    zlib.error, SafetensorError,
)  # fmt: skip
_FLOAT = torch.finfo(torch.float32)
# What JSON, floats and 64-bit integers all hold exactly.
_LARGEST = 2**53


@dataclass(frozen=True)
class Value:
    """What an option takes, whether it is a word of a command line or a value of a recipe.

    what: in words. kinds: types that a recipe may give. read: a word -> the value, ValueError if it is none.
    fits: whether a value is in range.
    """

    what: str
    kinds: tuple[type, ...]
    read: Callable[[str], Any]
    fits: Callable[[Any], bool] = lambda value: True
    remedy: str = "correct it"

    def __call__(self, word: str) -> Any:
        """The value of a word; argparse calls this."""
        try:
            value = self.read(word)
        except (ValueError, OverflowError, RuntimeError):
            value = None
        if value is None or not self.fits(value):
            raise argparse.ArgumentTypeError(f"{self.what}, got {word!r}; {self.remedy}")
        return value

    def takes(self, value: Any) -> bool:
        """Whether a recipe may hold `value`."""
        right_type = isinstance(value, self.kinds) and (not isinstance(value, bool) or bool in self.kinds)
        return right_type and self.fits(value)


def whole(least: int, most: int = _LARGEST) -> Value:
    """A whole number in digits."""

    def read(word: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", word):
            raise ValueError
        return int(word)

    above = f"of at least {least}, at most 2^53" if most == _LARGEST else f"from {least} to {most}"
    return Value(f"a whole number {above}", (int,), read, lambda value: least <= value <= most)


def real(
    least: float = -math.inf, most: float = math.inf, *, open_below: bool = False, open_above: bool = False
) -> Value:
    """A number of float32, as tensors compute; `open_below` and `open_above` leave the ends out."""

    def fits(value: float) -> bool:
        low = max(least, _FLOAT.tiny) <= value if open_below and least == 0 else least <= value
        high = value < most if open_above else value <= most
        return abs(value) <= _FLOAT.max and low and high

    if most < math.inf:
        what = f"a number in {'(' if open_below else '['}{least:g}, {most:g}{')' if open_above else ']'}"
    else:
        what = f"a number {'above' if open_below else 'of at least'} {least:g} that float32 holds"
    return Value(what, (int, float), float, fits)


def one_of(names: Collection[str]) -> Value:
    """One of some names."""
    return Value(f"one of {', '.join(names)}", (str,), str, lambda value: value in names, "choose one")


def _printable(value: str) -> bool:
    """A file name may hold bytes that are no text, which no log or JSON file could name."""
    return bool(value.strip()) and "\0" not in value and not any("\ud800" <= each <= "\udfff" for each in value)


def _json_object(word: str) -> dict[str, Any]:
    found = json.loads(word)
    if not isinstance(found, dict):
        raise ValueError
    return found


def _device(word: str) -> str:
    device = torch.device(word)
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= here.get(device.type, 0):
        raise ValueError
    return word


def _pattern(word: str) -> str:
    from tritonsparse.pattern import parse

    parse(word)
    return word


def _is_pattern(value: str) -> bool:
    try:
        return bool(_pattern(value))
    except ValueError:
        return False


COUNT, NATURAL, THREADS = whole(1), whole(0), whole(1, 1024)
# What NumPy's generator takes.
SEED = whole(0, 2**32 - 1)
NON_NEGATIVE, POSITIVE = real(0.0), real(0.0, open_below=True)
# What is dropped, pruned or smoothed away, and what is kept of an average: never all.
BELOW_ONE = real(0.0, 1.0, open_above=True)
TEXT = Value("text that is not empty, in UTF-8", (str,), str, _printable)
JSON_OBJECT = Value(
    "a JSON object", (dict,), _json_object, remedy="quote it for the shell, as in '{\"threshold_init\": -5}'"
)
DEVICE = Value("a device of this machine", (str,), _device, remedy='give "cpu", or "cuda" where there is a GPU')
PATTERN = Value(
    "a pattern", (str,), str, _is_pattern,
    "write unstructured, block:R, block:RxC, N:M with N < M, N:M:transposable or channel",
)  # fmt: skip


def reason(error: Exception) -> str:
    """The first line of what another package says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def naming(function: str, expected: str, got: object, remedy: str) -> Iterator[None]:
    """What other packages raise about a value meanwhile becomes one sentence that names it; ours are such already."""
    try:
        yield
    except MENDABLE as error:
        if ": expected " in str(error):
            raise
        raise ValueError(f"{function}: expected {expected}, got {got!r} ({reason(error)}); {remedy}") from error


class Parser(argparse.ArgumentParser):
    """argparse, strict: no abbreviations, and a ValueError of one sentence for what does not fit.

    program: its module below tritonsparse, such as "eval.accuracy". rules: called with the arguments, in order, once
    each fits by itself; they raise ValueErrors.
    """

    def __init__(self, program: str, description: str | None, command: str | None = None) -> None:
        super().__init__(
            command or f"python -m tritonsparse.{program}", description=description, allow_abbrev=False,
            exit_on_error=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.program = program.rpartition(".")[2]
        self.rules: list[Callable[[argparse.Namespace], None]] = []

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments, checked one by one and then by the rules."""
        result = super().parse_args(args, namespace)
        for rule in self.rules:
            rule(result)
        return result

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse has it."""
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            name = (error.argument_name or "").split("/")[0]
            if "; " in error.message:  # by a Value
                raise ValueError(f"{self.program}: expected {name} as {error.message}") from None
            self.error(f"{name}: {error.message}" if name else error.message)

    def error(self, message: str) -> Any:
        """What argparse finds wrong itself: unknown options, missing ones, missing values."""
        raise ValueError(f"{self.program}: expected options as --help lists them, got {message!r}; correct them")


class Stopped(BaseException):
    """SIGTERM."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM raises `Stopped` meanwhile, as Ctrl-C does KeyboardInterrupt; outside the main thread it kills."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(error: BaseException | str) -> None:
    """One line on stderr; the traceback too, where TRITONSPARSE_TRACEBACK is set."""
    if isinstance(error, BaseException) and os.environ.get("TRITONSPARSE_TRACEBACK"):
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"error: {text}", file=sys.stderr)


def one_line(program: Callable[[], int]) -> int:
    """The exit status of `program()`: its own; 2 for what the user can mend, 130 and 143 where it is stopped."""
    try:
        with stoppable():
            return program()
    except MENDABLE as error:
        say(error)
        return 2
    except KeyboardInterrupt:
        say("stopped by Ctrl-C")
        return 130
    except Stopped:
        say("stopped by SIGTERM")
        return 143
