"""Phrases drawn at random: noun phrases, persons, places, counts and times that fit a tense."""

from __future__ import annotations

import datetime
import random
from collections.abc import Sequence
from typing import TypeVar

from . import german as de
from .english import cardinal
from .figures import WEEKDAYS, clock, date, digits
from .german import DATIVE, ER, SIE
from .grammar import PRONOUNS, NounPhrase, noun_phrase, relation
from .lexicon import Two, phrases
from .nouns import FITTING, MASS_KINDS, NOUNS

T = TypeVar("T")

PERSONS = tuple(PRONOUNS.values())
_OWN = ("my", "your", "his", "her", "our")
SUBJECT_ARTICLES = ("the", "the", "the", "a", "this", "every", *_OWN)
OBJECT_ARTICLES = ("the", "the", "the", "a", "a", "a", "this", "", *_OWN)
KNOWN = ("the", "the", "the", "this", *_OWN)
IN_PLACE = ("the", "the", "the", "the", "my", "our", "this")

_FIRST_DAY, _LAST_DAY = (datetime.date(year, 1, 1).toordinal() for year in (1900, 2031))
_PAST_TENSES = ("past", "could", "had to", "wanted", "passive")
_HABITS = phrases(
    "today=heute, now=jetzt, every day=jeden Tag, every week=jede Woche, every year=jedes Jahr, "
    "at night=nachts, in the morning=am Morgen, in the evening=am Abend, at the weekend=am Wochenende, "
    "in summer=im Sommer, in winter=im Winter, on Mondays=montags, on Fridays=freitags, on Sundays=sonntags"
)
_PAST_TIMES = phrases(
    "yesterday=gestern, last week=letzte Woche, last month=letzten Monat, last year=letztes Jahr, "
    "yesterday evening=gestern Abend, this morning=heute Morgen, the day before yesterday=vorgestern"
)
_COMING_TIMES = phrases(
    "tomorrow=morgen, next week=nächste Woche, next month=nächsten Monat, next year=nächstes Jahr, "
    "this evening=heute Abend, tomorrow morning=morgen früh, the day after tomorrow=übermorgen"
)
_SPANS = phrases("days=Tagen, weeks=Wochen, months=Monaten, years=Jahren, hours=Stunden")


class Draw:
    """Choices from `Random.random` alone, the one method whose sequence Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def integer(self, low: int, high: int) -> int:
        """Uniform in low..high, both included."""
        return low + int(self.random() * (high - low + 1))


def drawn_count(draw: Draw) -> Two:
    """Two to twelve in words, or more in figures."""
    if draw.chance(0.7):
        n = draw.integer(2, 12)
        return cardinal(n), de.cardinal(n)
    return digits(draw.integer(13, 199) if draw.chance(0.7) else draw.integer(200, 9999))


def drawn_day(draw: Draw) -> datetime.date:
    return datetime.date.fromordinal(draw.integer(_FIRST_DAY, _LAST_DAY - 1))


def drawn_time(draw: Draw, tense: str) -> Two:
    """An adverbial of time that goes with the tense."""
    kind = draw.random()
    if tense in _PAST_TENSES:
        if kind < 0.15:
            english, german = date(drawn_day(draw))
            return f"on {english}", f"am {german}"
        if kind < 0.25:
            year = draw.integer(1900, 2030)
            return f"in {year}", f"im Jahr {year}"
        if kind < 0.45:
            n, span = draw.integer(2, 12), draw.pick(_SPANS)
            return f"{cardinal(n)} {span[0]} ago", f"vor {de.cardinal(n)} {span[1]}"
        return draw.pick(_PAST_TIMES)
    if kind < 0.25:
        english, german = clock(draw.integer(1, 12), 5 * draw.integer(0, 11))
        return f"at {english}", f"um {german}"
    if tense == "present":
        return draw.pick(_HABITS)
    if kind < 0.45:
        n, span = draw.integer(2, 12), draw.pick(_SPANS)
        return f"in {cardinal(n)} {span[0]}", f"in {de.cardinal(n)} {span[1]}"
    if kind < 0.6:
        english, german = draw.pick(WEEKDAYS)
        return f"on {english}", f"am {german}"
    return draw.pick(_COMING_TIMES)


def drawn_noun_phrase(draw: Draw, kinds: Sequence[str], articles: Sequence[str], adjective: float = 0.35) -> NounPhrase:
    """A phrase of one of the kinds of noun; the article "" means a number, and a plural noun."""
    kind = draw.pick(kinds)
    noun, article = draw.pick(NOUNS[kind]), draw.pick(articles)
    described = draw.pick(FITTING[kind]) if draw.chance(adjective) else None
    if kind in MASS_KINDS:
        return noun_phrase("" if article in ("a", "every") else article, noun, described, mass=True)
    if not article:
        return noun_phrase("", noun, described, plural=True, count=drawn_count(draw))
    return noun_phrase(article, noun, described, plural=article != "every" and draw.chance(0.25))


def drawn_subject(draw: Draw, negated: bool = False, kind: str = "person") -> NounPhrase:
    if kind == "person" and draw.chance(0.45):
        return draw.pick(PERSONS)
    # "Every man does not sleep" would say two things; so would its German.
    return drawn_noun_phrase(draw, (kind,), KNOWN if negated else SUBJECT_ARTICLES)


def drawn_person(draw: Draw, subject: NounPhrase, case: int, articles: Sequence[str]) -> NounPhrase:
    if draw.chance(0.35):
        phrase = draw.pick(PERSONS)
        # First and second person would need a reflexive; accusative "them" is ruled out, see PRONOUNS.
        first = (de.ICH, de.WIR)
        reflexive = phrase.person == subject.person != ER or (phrase.person in first and subject.person in first)
        if not reflexive and (phrase.person != SIE or case == DATIVE):
            return phrase
    return drawn_noun_phrase(draw, ("person",), articles)


def drawn_place(draw: Draw) -> Two:
    return relation("in", "in", DATIVE, drawn_noun_phrase(draw, ("place",), IN_PLACE, 0.2))
