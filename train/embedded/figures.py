"""Figures, times of day and dates, as both languages write or say them."""

from __future__ import annotations

import datetime

from . import german as de
from .english import cardinal
from .lexicon import Two, phrases

WEEKDAYS = phrases(
    "Monday=Montag, Tuesday=Dienstag, Wednesday=Mittwoch, Thursday=Donnerstag, Friday=Freitag, "
    "Saturday=Samstag, Sunday=Sonntag"
)
MONTHS = phrases(
    "January=Januar, February=Februar, March=März, April=April, May=Mai, June=Juni, July=Juli, "
    "August=August, September=September, October=Oktober, November=November, December=Dezember"
)


def digits(value: int, decimals: int = 0) -> Two:
    """Figures of `value` / 10**decimals: 1234567 with two decimals is "12,345.67" and "12.345,67"."""
    whole, part = divmod(value, 10**decimals)
    english = f"{whole:,}" + (f".{part:0{decimals}}" if decimals else "")
    return english, english.translate({44: ".", 46: ","})


def clock(hour: int, minute: int) -> Two:
    """Time of day to five minutes as it is spoken, 1 <= hour <= 12: "half past three" is "halb vier"."""
    coming = hour % 12 + 1
    this_hour, next_hour = de.cardinal(hour), de.cardinal(coming)
    if minute == 0:
        return f"{cardinal(hour)} o'clock", f"{de.cardinal(hour, before_noun=True)} Uhr"
    steps = {15: "a quarter", 30: "half"}
    late = minute > 30
    amount = 60 - minute if late else minute
    english = f"{steps.get(amount) or cardinal(amount)} " + (
        f"to {cardinal(coming)}" if late else f"past {cardinal(hour)}"
    )
    if minute == 30:
        return english, f"halb {next_hour}"
    if minute in (25, 35):
        return english, f"fünf {'nach' if late else 'vor'} halb {next_hour}"
    step = "Viertel" if amount == 15 else de.cardinal(amount)
    return english, f"{step} vor {next_hour}" if late else f"{step} nach {this_hour}"


def date(day: datetime.date) -> Two:
    """ "14 March 1987" and "14. März 1987"."""
    english, german = MONTHS[day.month - 1]
    return f"{day.day} {english} {day.year}", f"{day.day}. {german} {day.year}"
