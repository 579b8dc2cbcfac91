"""Whether the fields of a method are of the types that they are declared with: JSON and Python hold anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any

__all__ = ["check_types"]

_LARGEST = 3.4e38
_WORDS = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "str": "a name",
    "Sequence[float]": "a list of finite numbers",
    "list[float]": "a list of finite numbers",
}


def check_types(config: Any, name: str, infinite: Collection[str] = (), part: str = "") -> None:
    """Refuse a field whose value is of another type, or no finite number; types not listed above are their class's.

    config: a dataclass object. infinite: fields that infinities mean something in. part: what
    stands before a field's name, where the object is itself a field.

    Raises:
        ValueError: the first such field, named.
    """
    for field in dataclasses.fields(config):
        kinds = [kind.strip() for kind in str(getattr(field.type, "__name__", field.type)).split("|")]
        value = getattr(config, field.name)
        if not field.init or not set(kinds) <= {*_WORDS, "None"}:
            continue
        if not any(_is(kind, value, field.name in infinite) for kind in kinds):
            words = " or ".join(_WORDS.get(kind, "nothing") for kind in kinds)
            words = words.replace("finite ", "") if field.name in infinite else words
            raise ValueError(f"{name}: expected {part}{field.name} as {words}, got {value!r}; correct it")


def _is(kind: str, value: Any, infinite: bool) -> bool:
    if kind == "None":
        return value is None
    if kind in ("bool", "str"):
        return isinstance(value, bool if kind == "bool" else str)
    if kind == "int":
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind == "float":
        number = isinstance(value, Real) and not isinstance(value, bool)
        # As float32, which thresholds and coefficients become.
        return number and (abs(value) <= _LARGEST or (infinite and abs(value) == math.inf))
    return isinstance(value, Sequence) and not isinstance(value, str) and all(_is("float", x, infinite) for x in value)
