"""English inflection and number words."""

from __future__ import annotations

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}


def cardinal(n: int) -> str:
    """English number word of 0 <= n < 1,000,000, with the British "and"."""
    if n >= 1000:
        head, rest = f"{cardinal(n // 1000)} thousand", n % 1000
    elif n >= 100:
        head, rest = f"{_ONES[n // 100]} hundred", n % 100
    elif n >= 20:
        return _TENS[n // 10 - 2] + (f"-{_ONES[n % 10]}" if n % 10 else "")
    else:
        return _ONES[n]
    return head + (f" and {cardinal(rest)}" if 0 < rest < 100 else f" {cardinal(rest)}" if rest else "")


def ordinal(n: int) -> str:
    """English ordinal of 1 <= n < 1,000,000: its last word takes the ending."""
    words = cardinal(n)
    cut = max(words.rfind(" "), words.rfind("-")) + 1
    last = words[cut:]
    return words[:cut] + (_ORDINALS.get(last) or (last[:-1] + "ie" if last.endswith("y") else last) + "th")


def with_s(word: str, more_endings: str = "") -> str:
    """An English plural or third person: box -> boxes, city -> cities, dog -> dogs."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh", *more_endings)) else "s")


def regular_past(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ied"
    return word + ("d" if word.endswith("e") else "ed")
