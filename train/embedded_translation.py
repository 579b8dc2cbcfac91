"""The embedded English-German corpus: sentences made by a small grammar of both languages, without a network.

Every sentence is built once as a meaning (a `Clause` of noun phrases, a verb, a tense, an adverbial) and
spoken in both languages: German gender, case, word order and separable prefixes are all there to learn.

The splits are disjoint by construction. A checksum assigns every *sentence*, English or German, to a split;
a pair whose two sides are assigned differently is thrown away. A sentence therefore occurs in one split only,
on either side, for every seed and size. Sizes nest: a smaller split is the beginning of a larger one.
"""

from __future__ import annotations

import datetime
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from . import german as de
from .german import ACCUSATIVE, DATIVE, ER, NOMINATIVE, PLURAL, SIE, Adjective, Noun, Verb

T = TypeVar("T")
Pair = tuple[str, str]
Two = tuple[str, str]  # one phrase in English and in German

DEFAULT_SIZES = {"train": 40_000, "validation": 500, "test": 500}
# Draws in a row that may bring nothing new before the grammar counts as exhausted.
_PATIENCE = 50_000
_ASSIGNED = {0: "test", 1: "validation"}


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


def generate(seed: int = 0, sizes: Mapping[str, int] | None = None) -> dict[str, list[Pair]]:
    """(English, German) pairs by split; within a split no sentence occurs twice, on either side.

    Args:
        seed: Any integer; equal seeds give equal corpora in every process and Python version.
        sizes: Pairs per split, of "train", "validation", "test"; a missing split is left out.

    Raises:
        ValueError: An unknown split, a negative size, or more pairs than the grammar can make.

    >>> generate(sizes={"test": 1})
    {'test': [("In the morning our school isn't dirty.", 'Am Morgen ist unsere Schule nicht schmutzig.')]}
    """
    sizes = DEFAULT_SIZES if sizes is None else sizes
    for split, size in sizes.items():
        if split not in DEFAULT_SIZES or size < 0:
            raise ValueError(
                f"generate: expected sizes of at least 0 for splits named {', '.join(DEFAULT_SIZES)}, "
                f"got {split!r}: {size}; correct that entry of sizes"
            )
    draw = Draw(seed)
    pairs: dict[str, list[Pair]] = {split: [] for split in sizes}
    seen_english: set[str] = set()
    seen_german: set[str] = set()
    missing, idle = sum(sizes.values()), 0
    while missing:
        english, german = draw.pick(_SENTENCES)(draw)
        split, idle = _split(english), idle + 1
        wanted = split in pairs and len(pairs[split]) < sizes[split] and split == _split(german)
        if wanted and english not in seen_english and german not in seen_german:
            seen_english.add(english)
            seen_german.add(german)
            pairs[split].append((english, german))
            missing, idle = missing - 1, 0
        if idle > _PATIENCE:
            counts = ", ".join(f"{name} {len(found):,}" for name, found in pairs.items())
            raise ValueError(
                f"generate: expected sizes the grammar can fill ({counts}), got {dict(sizes)}; ask for fewer"
            )
    return pairs


def _split(sentence: str) -> str:
    # One in eleven, not one in a hundred: a held-out pair needs both of its sides to fall there.
    return _ASSIGNED.get(zlib.crc32(sentence.encode()) % 11, "train")


@dataclass(frozen=True, slots=True)
class NounPhrase:
    """`person` is one of german.ICH ... german.SIE; `negative` marks kein, which negates the clause."""

    en: str
    en_object: str
    de: tuple[str, str, str]
    person: int = ER
    definite: bool = True
    pronoun: bool = False
    negative: bool = False


def _pronoun(en: str, en_object: str, german: str, person: int) -> NounPhrase:
    nominative, accusative, dative = german.split()
    return NounPhrase(en, en_object, (nominative, accusative, dative), person, pronoun=True)


# "you" is du alone, and no accusative "them" is used ("sie", as "her" is): German stays unambiguous.
PRONOUNS = {
    "I": _pronoun("I", "me", "ich mich mir", de.ICH),
    "you": _pronoun("you", "you", "du dich dir", de.DU),
    "he": _pronoun("he", "him", "er ihn ihm", ER),
    "she": _pronoun("she", "her", "sie sie ihr", ER),
    "we": _pronoun("we", "us", "wir uns uns", de.WIR),
    "they": _pronoun("they", "them", "sie sie ihnen", SIE),
}
_PERSONS = tuple(PRONOUNS.values())
WHO = _pronoun("who", "whom", "wer wen wem", ER)

_DETERMINERS = {
    "": "",
    "the": "der",
    "this": "dies",
    "every": "jed",
    "a": "ein",
    "no": "kein",
    "my": "mein",
    "your": "dein",
    "his": "sein",
    "her": "ihr",
    "our": "unser",
}
_DEFINITE = frozenset(_DETERMINERS) - {"", "a", "no"}


def noun_phrase(
    article: str,
    noun: Noun,
    adjective: Adjective | None = None,
    plural: bool = False,
    mass: bool = False,
    count: Two = ("", ""),
) -> NounPhrase:
    """Declined noun phrase with an English determiner, "" for none; "no" is "a" or "any" after "not"."""
    stem = "" if plural and article == "a" else _DETERMINERS[article]
    gender = PLURAL if plural else noun.gender
    english = noun.en_plural if plural else noun.en
    if adjective:
        english = f"{adjective.en} {english}"
    if count[0]:
        english = f"{count[0]} {english}"
    if article in ("a", "no") and not plural and not mass:
        english = f"{'an' if english[0] in 'aeiou' else 'a'} {english}"
    elif article == "no":
        english = f"any {english}"
    elif stem:
        english = f"{'these' if plural and article == 'this' else article} {english}"
    cases = []
    for case in (NOMINATIVE, ACCUSATIVE, DATIVE):
        german = noun.form(case, plural)
        if adjective:
            german = f"{adjective.stem}{de.adjective_ending(stem, gender, case)} {german}"
        if count[1]:
            german = f"{count[1]} {german}"
        cases.append(f"{de.determiner(stem, gender, case)} {german}" if stem else german)
    spoken = cases[0], cases[1], cases[2]
    person = SIE if plural else ER
    return NounPhrase(english, english, spoken, person, article in _DEFINITE, negative=article == "no")


# Tense name: English auxiliary, its negative, what follows it; the German modal, whose infinitive goes last.
_MODALS = {
    "can": ("can", "can't", "", ("kann", "kannst", "kann", "können", "können")),
    "could": ("could", "couldn't", "", ("konnte", "konntest", "konnte", "konnten", "konnten")),
    "should": ("should", "shouldn't", "", ("sollte", "solltest", "sollte", "sollten", "sollten")),
    "may": ("may", "may not", "", ("darf", "darfst", "darf", "dürfen", "dürfen")),
    "will": ("will", "won't", "", ("werde", "wirst", "wird", "werden", "werden")),
    "would like": ("would", "wouldn't", "like to ", ("möchte", "möchtest", "möchte", "möchten", "möchten")),
    "must": ("", "", "have to ", ("muss", "musst", "muss", "müssen", "müssen")),
    "had to": ("", "", "had to ", ("musste", "musstest", "musste", "mussten", "mussten")),
    "want": ("", "", "want to ", ("will", "willst", "will", "wollen", "wollen")),
    "wanted": ("", "", "wanted to ", ("wollte", "wolltest", "wollte", "wollten", "wollten")),
}
_PAST_TENSES = ("past", "could", "had to", "wanted", "passive")
_NEGATIVE = {"am": "am not", "may": "may not", "can": "can't", "will": "won't"}
ADVERBS = {
    "often": "oft",
    "always": "immer",
    "sometimes": "manchmal",
    "rarely": "selten",
    "never": "nie",
    "usually": "meistens",
    "already": "schon",
}


@dataclass(frozen=True, slots=True)
class Clause:
    """A meaning, and how both languages say it; `tail` and `middle` hold all but subject and verb."""

    subject: NounPhrase
    verb: Verb
    tense: str
    tail: str
    middle: str
    negated: bool
    adverb: str
    front: Two

    def english(self, question: bool = False) -> str:
        """Statement, or yes-no question with its auxiliary first."""
        plain, auxiliary, rest = self._english_verb()
        subject, adverb = self.subject.en, self.adverb
        words: tuple[str, ...]
        if question:
            words = (auxiliary, subject, adverb, rest, self.tail)
        elif self.negated:
            words = (self.front[0], subject, _NEGATIVE.get(auxiliary, auxiliary + "n't"), rest, self.tail)
        elif plain:
            words = (self.front[0], subject, adverb, plain, self.tail)
        else:
            words = (self.front[0], subject, auxiliary, adverb, rest, self.tail)
        return " ".join(filter(None, words))

    def _english_verb(self) -> tuple[str, str, str]:
        """The finite verb used alone ("" if there always is an auxiliary), the auxiliary, what follows it."""
        base, third, past, participle = self.verb.en
        person, singular = self.subject.person, self.subject.person == ER
        be = {"past": {de.ICH: "was", ER: "was"}, "present": {de.ICH: "am", ER: "is"}}
        if self.tense == "passive":
            return "", be["past"].get(person, "were"), participle
        if self.verb is de.BE and self.tense in be:
            return "", be[self.tense].get(person, "were" if self.tense == "past" else "are"), ""
        if self.tense == "perfect":
            return "", "has" if singular else "have", participle
        if self.tense == "past":
            return past, "did", base
        do = "does" if singular else "do"
        if self.tense == "present":
            return third if singular else base, do, base
        auxiliary, _, link, _ = _MODALS[self.tense]
        if auxiliary:
            return "", auxiliary, link + base
        now = {"had to ": "have to ", "wanted to ": "want to "}.get(link)
        if now:
            return link + base, "did", now + base
        finite = {"have to ": "has to ", "want to ": "wants to "}[link] if singular else link
        return finite + base, do, link + base

    def german(self, order: str = "main") -> str:
        """In the order `main` (finite verb second), `verb first`, or `verb last`."""
        finite, right = self._german_verb()
        subject = self.subject.de[NOMINATIVE]
        if order == "verb last":
            separable = right == self.verb.prefix
            words: tuple[str, ...] = (
                subject,
                self.middle,
                right + finite if separable else f"{right} {finite}",
            )
        elif order == "verb first":
            words = (finite, subject, self.middle, right)
        elif self.front[1]:
            words = (self.front[1], finite, subject, self.middle, right)
        else:
            words = (subject, finite, self.middle, right)
        return " ".join(filter(None, words))

    def _german_verb(self) -> tuple[str, str]:
        """The finite verb, and what closes the clause: separable prefix, participle or infinitive."""
        verb, person = self.verb, self.subject.person
        if self.tense == "present":
            return verb.present[person], verb.prefix
        if self.tense == "past" and verb.preterite:
            return verb.preterite[person], ""
        if self.tense in ("past", "perfect"):
            return verb.perfect[person], verb.participle
        if self.tense == "passive":
            return de.WURDE[person], verb.participle
        return _MODALS[self.tense][3][person], verb.infinitive


def clause(
    subject: NounPhrase,
    verb: Verb,
    tense: str = "present",
    *,
    accusative: NounPhrase | None = None,
    dative: NounPhrase | None = None,
    rest: Two = ("", ""),
    time: Two = ("", ""),
    fronted: bool = False,
    negated: bool = False,
    adverb: str = "",
) -> Clause:
    """Put the parts of a clause into each language's order.

    English: verb, particle, objects, rest, time. German middle field: pronouns, time, objects, rest; "nicht"
    and "schon" stand after definite objects, and no "nicht" is said where an object has "kein". A negated
    perfect says "yet" and "noch", so that it is not the German of a negated past.
    """
    objects = [(phrase, case) for phrase, case in ((dative, DATIVE), (accusative, ACCUSATIVE)) if phrase]
    tail = [verb.preposition, *(phrase.en_object for phrase, _ in objects)]
    # "picks up the child" but "picks him up"
    tail.insert(len(tail) if objects and objects[-1][0].pronoun else 0, verb.particle)
    tail += [rest[0], "yet" if negated and tense == "perfect" else "", "" if fronted else time[0]]
    pronouns = " ".join(phrase.de[case] for phrase, case in objects if phrase.pronoun)
    nouns = " ".join(phrase.de[case] for phrase, case in objects if not phrase.pronoun)
    german_time = "" if fronted else time[1]
    yet = "noch" if negated and tense == "perfect" else ""
    if negated and not any(phrase.negative for phrase, _ in objects):
        middle = [pronouns, nouns, german_time, yet, "nicht", rest[1]]
    elif adverb == "already" and all(phrase.definite for phrase, _ in objects):
        middle = [pronouns, nouns, german_time, ADVERBS[adverb], rest[1]]
    else:
        middle = [pronouns, german_time, yet or ADVERBS.get(adverb, ""), nouns, rest[1]]
    words = (" ".join(filter(None, tail)), " ".join(filter(None, middle)))
    return Clause(subject, verb, tense, *words, negated, adverb, time if fronted else ("", ""))


def relation(english: str, german: str, case: int, phrase: NounPhrase) -> Two:
    """A prepositional phrase in both languages."""
    return f"{english} {phrase.en_object}", de.contract(german, phrase.de[case])


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
        return f"{_ONES[hour]} o'clock", f"{de.cardinal(hour, before_noun=True)} Uhr"
    steps = {15: "a quarter", 30: "half"}
    late = minute > 30
    amount = 60 - minute if late else minute
    english = f"{steps.get(amount) or cardinal(amount)} " + (f"to {_ONES[coming]}" if late else f"past {_ONES[hour]}")
    if minute == 30:
        return english, f"halb {next_hour}"
    if minute in (25, 35):
        return english, f"fünf {'nach' if late else 'vor'} halb {next_hour}"
    step = "Viertel" if amount == 15 else de.cardinal(amount)
    return english, f"{step} vor {next_hour}" if late else f"{step} nach {this_hour}"


_WEEKDAYS = tuple(
    zip(
        ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
        ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"],
        strict=True,
    )
)
_MONTHS = tuple(
    zip(
        [
            "January",
            "February",
            "March",
            "April",
            "May",
            "June",
            "July",
            "August",
            "September",
            "October",
            "November",
            "December",
        ],
        [
            "Januar",
            "Februar",
            "März",
            "April",
            "Mai",
            "Juni",
            "Juli",
            "August",
            "September",
            "Oktober",
            "November",
            "Dezember",
        ],
        strict=True,
    )
)
_FIRST_DAY, _LAST_DAY = (datetime.date(year, 1, 1).toordinal() for year in (1900, 2031))


def _phrases(text: str) -> tuple[Two, ...]:
    entries = (entry.split("=") for entry in text.split(", "))
    return tuple((english, german) for english, german in entries)


_HABITS = _phrases(
    "today=heute, now=jetzt, every day=jeden Tag, every week=jede Woche, every year=jedes Jahr, "
    "at night=nachts, in the morning=am Morgen, in the evening=am Abend, at the weekend=am Wochenende, "
    "in summer=im Sommer, in winter=im Winter, on Mondays=montags, on Fridays=freitags, on Sundays=sonntags"
)
_PAST_TIMES = _phrases(
    "yesterday=gestern, last week=letzte Woche, last month=letzten Monat, last year=letztes Jahr, "
    "yesterday evening=gestern Abend, this morning=heute Morgen, the day before yesterday=vorgestern"
)
_COMING_TIMES = _phrases(
    "tomorrow=morgen, next week=nächste Woche, next month=nächsten Monat, next year=nächstes Jahr, "
    "this evening=heute Abend, tomorrow morning=morgen früh, the day after tomorrow=übermorgen"
)
_SPANS = _phrases("days=Tagen, weeks=Wochen, months=Monaten, years=Jahren, hours=Stunden")


def _count(draw: Draw) -> Two:
    """Two to twelve in words, or more in figures."""
    if draw.chance(0.7):
        n = draw.integer(2, 12)
        return cardinal(n), de.cardinal(n)
    return digits(draw.integer(13, 199) if draw.chance(0.7) else draw.integer(200, 9999))


def _day(draw: Draw) -> datetime.date:
    return datetime.date.fromordinal(draw.integer(_FIRST_DAY, _LAST_DAY - 1))


def date(day: datetime.date) -> Two:
    """ "14 March 1987" and "14. März 1987"."""
    english, german = _MONTHS[day.month - 1]
    return f"{day.day} {english} {day.year}", f"{day.day}. {german} {day.year}"


def _time(draw: Draw, tense: str) -> Two:
    """An adverbial of time that goes with the tense."""
    kind = draw.random()
    if tense in _PAST_TENSES:
        if kind < 0.15:
            english, german = date(_day(draw))
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
        english, german = draw.pick(_WEEKDAYS)
        return f"on {english}", f"am {german}"
    return draw.pick(_COMING_TIMES)


_OWN = ("my", "your", "his", "her", "our")
_SUBJECT_ARTICLES = ("the", "the", "the", "a", "this", "every", *_OWN)
_OBJECT_ARTICLES = ("the", "the", "the", "a", "a", "a", "this", "", *_OWN)
_KNOWN = ("the", "the", "the", "this", *_OWN)
_IN_PLACE = ("the", "the", "the", "the", "my", "our", "this")


def _noun_phrase(draw: Draw, kinds: Sequence[str], articles: Sequence[str], adjective: float = 0.35) -> NounPhrase:
    """A phrase of one of the kinds of noun; the article "" means a number, and a plural noun."""
    kind = draw.pick(kinds)
    noun, article = draw.pick(de.NOUNS[kind]), draw.pick(articles)
    described = draw.pick(de.FITTING[kind]) if draw.chance(adjective) else None
    if kind in de.MASS_KINDS:
        return noun_phrase("" if article in ("a", "every") else article, noun, described, mass=True)
    if not article:
        return noun_phrase("", noun, described, plural=True, count=_count(draw))
    return noun_phrase(article, noun, described, plural=article != "every" and draw.chance(0.25))


def _subject(draw: Draw, negated: bool = False, kind: str = "person") -> NounPhrase:
    if kind == "person" and draw.chance(0.45):
        return draw.pick(_PERSONS)
    # "Every man does not sleep" would say two things; so would its German.
    return _noun_phrase(draw, (kind,), _KNOWN if negated else _SUBJECT_ARTICLES)


def _person_object(draw: Draw, subject: NounPhrase, case: int, articles: Sequence[str]) -> NounPhrase:
    if draw.chance(0.35):
        phrase = draw.pick(_PERSONS)
        # First and second person would need a reflexive; accusative "them" is ruled out above.
        first = (de.ICH, de.WIR)
        reflexive = phrase.person == subject.person != ER or (phrase.person in first and subject.person in first)
        if not reflexive and (phrase.person != SIE or case == DATIVE):
            return phrase
    return _noun_phrase(draw, ("person",), articles)


def _place(draw: Draw) -> Two:
    return relation("in", "in", DATIVE, _noun_phrase(draw, ("place",), _IN_PLACE, 0.2))


_TRANSITIVE = tuple((tuple(kinds.split()), verb) for kinds, verbs in de.TRANSITIVE.items() for verb in verbs)
_PREPOSITIONAL = tuple((*governed, verb) for governed, verbs in de.PREPOSITIONAL_VERBS.items() for verb in verbs)
_DIRECTIONS = (
    ("to", "zu", DATIVE),
    ("to", "zu", DATIVE),
    ("into", "in", ACCUSATIVE),
    ("through", "durch", ACCUSATIVE),
    ("out of", "aus", DATIVE),
)
_POSITIONS = _phrases("on=auf, on=auf, under=unter, behind=hinter, next to=neben, in front of=vor")
_RECEIVABLE = ("reading", "food", "clothes", "thing", "container")
_MEASURES = (
    ("meal", _phrases("kilograms of=Kilogramm, grams of=Gramm, pounds of=Pfund")),
    ("drink", _phrases("bottles of=Flaschen, glasses of=Gläser, litres of=Liter, cups of=Tassen")),
)
_Parts = tuple[NounPhrase, Verb, dict[str, Any]]


def _transitive(draw: Draw, negated: bool) -> _Parts:
    kinds, verb = draw.pick(_TRANSITIVE)
    subject, articles = _subject(draw, negated), ("the", "no", "my", "his") if negated else _OBJECT_ARTICLES
    if "person" in kinds and draw.chance(0.5):
        phrase = _person_object(draw, subject, ACCUSATIVE, articles)
    else:
        phrase = _noun_phrase(draw, kinds, articles)
    return subject, verb, {"accusative": phrase, "rest": _place(draw) if draw.chance(0.12) else ("", "")}


def _having(draw: Draw, negated: bool) -> _Parts:
    articles = ("no",) if negated else ("a", "a", "")
    return (
        _subject(draw, negated),
        de.HAVE,
        {"accusative": _noun_phrase(draw, ("animal", *_RECEIVABLE, "vehicle"), articles)},
    )


def _measured(draw: Draw, negated: bool) -> _Parts:
    if negated:
        return _transitive(draw, negated)
    kind, units = draw.pick(_MEASURES)
    unit, noun = draw.pick(units), draw.pick(de.NOUNS[kind])
    n = draw.integer(2, 12)
    amount = digits(10 * n + 5, 1) if unit[1] in ("Kilogramm", "Liter") else (cardinal(n), de.cardinal(n))
    german = f"{amount[1]} {unit[1]} {noun.de}"
    phrase = NounPhrase("", f"{amount[0]} {unit[0]} {noun.en}", (german, german, german), SIE, definite=False)
    verb = draw.pick(next(verbs for kinds, verbs in de.TRANSITIVE.items() if kinds.endswith("drink meal")))
    return _subject(draw), verb, {"accusative": phrase}


def _dative(draw: Draw, negated: bool) -> _Parts:
    subject = _subject(draw, negated)
    articles = ("the", "no", "my") if negated else _SUBJECT_ARTICLES
    return subject, draw.pick(de.DATIVE_VERBS), {"dative": _person_object(draw, subject, DATIVE, articles)}


def _prepositional(draw: Draw, negated: bool) -> _Parts:
    preposition, case, verb = draw.pick(_PREPOSITIONAL)
    subject = _subject(draw, negated)
    phrase = _person_object(draw, subject, case, _KNOWN if negated else _SUBJECT_ARTICLES)
    english, german = relation(verb.preposition, preposition, case, phrase)
    return subject, replace(verb, preposition=""), {"rest": (english, german)}


def _ditransitive(draw: Draw, negated: bool) -> _Parts:
    subject = _subject(draw, negated)
    receiver = _person_object(draw, subject, DATIVE, _KNOWN)
    given = _noun_phrase(draw, _RECEIVABLE, ("no", "no", "the") if negated else _OBJECT_ARTICLES)
    return subject, draw.pick(de.DITRANSITIVE), {"dative": receiver, "accusative": given}


def _motion(draw: Draw, negated: bool) -> _Parts:
    verb = draw.pick(de.MOTION)
    english, german, case = draw.pick(_DIRECTIONS[: 1 if verb.prefix else None])
    place = _noun_phrase(draw, ("place",), _IN_PLACE, 0.2)
    return _subject(draw, negated), verb, {"rest": relation(english, german, case, place)}


def _activity(draw: Draw, negated: bool) -> _Parts:
    kind = draw.random()
    if kind < 0.2:
        rest = _place(draw) if draw.chance(0.5) else ("", "")
        return _subject(draw, negated, "animal"), draw.pick(de.ANIMAL_ACTIVITIES), {"rest": rest}
    if kind < 0.45:
        return _subject(draw, negated), draw.pick(de.EVENTS), {}
    return (
        _subject(draw, negated),
        draw.pick(de.ACTIVITIES),
        {"rest": _place(draw) if draw.chance(0.6) else ("", "")},
    )


def _position(draw: Draw, negated: bool) -> _Parts:
    moved = draw.chance(0.5)
    case = ACCUSATIVE if moved else DATIVE
    thing = _noun_phrase(draw, ("reading", "food", "thing"), _KNOWN)
    if draw.chance(0.3):
        rest = relation("in", "in", case, _noun_phrase(draw, ("container",), ("the", "the", "my"), 0.2))
    else:
        rest = relation(*draw.pick(_POSITIONS), case, _noun_phrase(draw, ("furniture",), _IN_PLACE, 0.2))
    if not moved:
        return thing, draw.pick(de.STAND), {"rest": rest}
    return _subject(draw, negated), draw.pick(de.PUT), {"accusative": thing, "rest": rest}


def _quality(draw: Draw, negated: bool) -> _Parts:
    kind = draw.pick(("person", "person", "animal", "thing", "clothes", "vehicle", "place", "reading"))
    adjective = draw.pick(de.FITTING[kind])
    return _subject(draw, negated, kind), de.BE, {"rest": (adjective.en, adjective.de)}


_CONTENTS: tuple[Callable[[Draw, bool], _Parts], ...] = (
    *(_transitive,) * 9,
    *(_quality,) * 3,
    *(_activity,) * 4,
    _having,
    _measured,
    _dative,
    _prepositional,
    _prepositional,
    _ditransitive,
    _ditransitive,
    _motion,
    _motion,
    _position,
    _position,
)
_DEEDS = (
    _transitive,
    _having,
    _measured,
    _dative,
    _prepositional,
    _ditransitive,
    _motion,
)  # persons do these
_TENSES = (*("present",) * 8, *("past",) * 6, *("perfect",) * 2, *("will",) * 2, *_MODALS)


def _clause(
    draw: Draw,
    fronting: float = 0.4,
    positive: bool = False,
    adverbial: float = 1.0,
    contents: Sequence[Callable[[Draw, bool], _Parts]] = _CONTENTS,
) -> Clause:
    """Any clause; `fronting` of its adverbials of time come first, `adverbial` scales how many there are."""
    negated = not positive and draw.chance(0.18)
    subject, verb, parts = draw.pick(contents)(draw, negated)
    tense = draw.pick(("present", "present", "past") if verb.preterite else _TENSES)
    if verb.en[0] == verb.en[2] and subject.person != ER:
        tense = "present" if tense == "past" else tense  # "they put" would be two tenses
    adverb, time, fronted = "", ("", ""), False
    if tense == "perfect":
        if not negated:
            adverb = "already"
    elif draw.chance(0.45 * adverbial):
        time, fronted = _time(draw, tense), draw.chance(fronting)
    elif tense in ("present", "past") and not negated and draw.chance(0.25 * adverbial):
        adverb = draw.pick(tuple(ADVERBS)[:-1])
    return clause(subject, verb, tense, **parts, time=time, fronted=fronted, negated=negated, adverb=adverb)


def _sentence(english: str, german: str, mark: str = ".") -> Pair:
    return english[0].upper() + english[1:] + mark, german[0].upper() + german[1:] + mark


def _statement(draw: Draw) -> Pair:
    said = _clause(draw)
    return _sentence(said.english(), said.german())


def _yes_no(draw: Draw) -> Pair:
    asked = _clause(draw, fronting=0, positive=True)
    return _sentence(asked.english(question=True), asked.german("verb first"), "?")


_QUESTIONS = _phrases("why=warum, when=wann, how often=wie oft, why=warum")


def _w_question(draw: Draw) -> Pair:
    english, german = draw.pick(_QUESTIONS)
    asked = _clause(draw, fronting=0, positive=True, adverbial=0.5 if english == "why" else 0)
    if asked.tense == "perfect" and english != "why":
        english, german = "why", "warum"
    return _sentence(f"{english} {asked.english(question=True)}", f"{german} {asked.german('verb first')}", "?")


def _object_question(draw: Draw) -> Pair:
    """What or who is the object: "What does he buy?", "Whom" being left to grammar books."""
    kinds, verb = draw.pick(_TRANSITIVE)
    english, german = ("who", "wen") if kinds == ("person",) else ("what", "was")
    tense = draw.pick(("present", "past", "past", "can", "will", "must", "want", "should", "would like"))
    time = _time(draw, tense) if draw.chance(0.5) else ("", "")
    verb = replace(verb, preposition=f"{verb.particle} {verb.preposition}".strip(), particle="")
    asked = clause(_subject(draw), verb, tense, time=time)
    return _sentence(f"{english} {asked.english(question=True)}", f"{german} {asked.german('verb first')}", "?")


def _who(draw: Draw) -> Pair:
    """ "Who" as the subject, which takes neither inversion nor "do"."""
    asked = replace(_clause(draw, 0, positive=True, contents=_DEEDS), subject=WHO)
    return _sentence(asked.english(), asked.german(), "?")


def _passive(draw: Draw) -> Pair:
    kinds, verb = draw.pick(_TRANSITIVE)
    negated = draw.chance(0.15)
    subject = _noun_phrase(draw, kinds, _KNOWN if negated else _OBJECT_ARTICLES)
    time = _time(draw, "passive") if draw.chance(0.7) else ("", "")
    rest = _place(draw) if draw.chance(0.2) else ("", "")
    said = clause(subject, verb, "passive", rest=rest, time=time, fronted=draw.chance(0.4), negated=negated)
    return _sentence(said.english(), said.german())


_JOINTS = _phrases("because=weil, because=weil, although=obwohl, if=wenn")
_OPINIONS = (
    ("I know that", "ich weiß, dass"),
    ("I believe that", "ich glaube, dass"),
    ("we hope that", "wir hoffen, dass"),
    ("he says that", "er sagt, dass"),
    ("she thinks that", "sie denkt, dass"),
    ("they say that", "sie sagen, dass"),
    ("my father believes that", "mein Vater glaubt, dass"),
    ("I don't know whether", "ich weiß nicht, ob"),
    ("she asks whether", "sie fragt, ob"),
    ("we don't know whether", "wir wissen nicht, ob"),
)


def _joined(draw: Draw) -> Pair:
    """A main and a subordinate clause, in either order."""
    english, german = draw.pick(_JOINTS)
    main, other = _clause(draw, 0.3, adverbial=0.4), _clause(draw, 0, adverbial=0.3)
    conditions = f"{english} {other.english()}", f"{german} {other.german('verb last')}"
    if english == "because" or draw.chance(0.4):
        return _sentence(f"{main.english()} {conditions[0]}", f"{main.german()}, {conditions[1]}")
    main = replace(main, front=("", ""))
    return _sentence(f"{conditions[0]}, {main.english()}", f"{conditions[1]}, {main.german('verb first')}")


def _opinion(draw: Draw) -> Pair:
    english, german = draw.pick(_OPINIONS)
    said = _clause(draw, 0, adverbial=0.6)
    return _sentence(f"{english} {said.english()}", f"{german} {said.german('verb last')}")


def _comparison(draw: Draw) -> Pair:
    kind = draw.pick(("person", "animal", "clothes", "thing", "vehicle", "place", "reading"))
    adjective = draw.pick([word for word in de.FITTING[kind] if word.en not in de.COLOURS])
    tense, negated = draw.pick(("present", "present", "past")), draw.chance(0.15)
    subject = other = _subject(draw, negated, kind)
    while other.pronoun or other.en == subject.en:
        other = _noun_phrase(draw, (kind,), _KNOWN, 0.1)
    if negated or draw.chance(0.3):
        rest = f"as {adjective.en} as {other.en}", f"so {adjective.de} wie {other.de[NOMINATIVE]}"
        rest = rest if negated else (rest[0], "genau" + rest[1])
    else:
        rest = (
            f"{adjective.en_comparative} than {other.en}",
            f"{adjective.de_comparative} als {other.de[NOMINATIVE]}",
        )
    said = clause(subject, de.BE, tense, rest=rest, negated=negated)
    return _sentence(said.english(), said.german())


def _existence(draw: Draw) -> Pair:
    """ "There are two dogs in the garden", where German keeps one form, "gibt es", for one and many."""
    kinds = draw.pick((("animal",), ("person",), ("thing", "furniture", "container", "reading"), ("food", "drink")))
    negated, past = draw.chance(0.2), draw.chance(0.3)
    phrase = _noun_phrase(draw, kinds, ("no",) if negated else ("a", "", ""))
    english, german = _place(draw)
    be = ("was" if past else "is") if phrase.person == ER else ("were" if past else "are")
    finite = "gab" if past else "gibt"
    there = f"there {be}" + ("n't" if negated else "")
    if draw.chance(0.5):
        return _sentence(f"{there} {phrase.en} {english}", f"es {finite} {phrase.de[ACCUSATIVE]} {german}")
    return _sentence(f"{english} {there} {phrase.en}", f"{german} {finite} es {phrase.de[ACCUSATIVE]}")


def _number(draw: Draw) -> Pair:
    n = draw.integer(0, 10 ** draw.integer(2, 6) - 1)
    kind = draw.random()
    if kind < 0.5:
        return cardinal(n), de.cardinal(n)
    if kind < 0.65:
        english, german = digits(n, draw.integer(1, 2) if draw.chance(0.6) else 0)
        return _sentence(f"the number is {english}", f"die Zahl ist {german}")
    if kind < 0.8:
        year = draw.integer(1101, 1999)
        year += year % 100 == 0
        low = year % 100
        english = f"{cardinal(year // 100)} {'oh-' + _ONES[low] if low < 10 else cardinal(low)}"
        return f"in {english}", f"im Jahr {de.year(year)}"
    n = draw.integer(1, 31) if draw.chance(0.4) else draw.integer(1, 999)
    noun = draw.pick(de.NOUNS[draw.pick(("person", "place", "event", "vehicle"))])
    nth = Adjective(ordinal(n), "", "", "", de.ordinal(n))
    phrase = noun_phrase(draw.pick(("the", "the", "her", "our")), noun, nth)
    if kind < 0.9:
        return phrase.en, phrase.de[NOMINATIVE]
    said = clause(draw.pick(_PERSONS), draw.pick(_SEEING), draw.pick(_TENSES), accusative=phrase)
    return _sentence(said.english(), said.german())


_SEEING = de.TRANSITIVE[next(iter(de.TRANSITIVE))]
_BEGINNINGS = (
    ("begins", "begin", "beginnt", "beginnen", ""),
    ("ends", "end", "endet", "enden", ""),
    ("takes place", "take place", "findet", "finden", "statt"),
)


def _date(draw: Draw) -> Pair:
    day = _day(draw)
    english, german = date(day)
    weekday = _WEEKDAYS[day.weekday()]
    spelt = ordinal(day.day), de.ordinal(day.day)
    month = _MONTHS[day.month - 1]
    kind = draw.integer(0, 8)
    if kind == 0:
        return f"on {weekday[0]}, {english}", f"am {weekday[1]}, dem {german}"
    if kind == 1:
        return _sentence(f"today is {weekday[0]}, {english}", f"heute ist {weekday[1]}, der {german}")
    if kind == 2:
        return f"{day.day:02}/{day.month:02}/{day.year}", f"{day.day:02}.{day.month:02}.{day.year}"
    if kind == 3:
        return f"the {spelt[0]} of {month[0]} {day.year}", f"der {spelt[1]}e {month[1]} {day.year}"
    if kind == 4:
        return f"in {month[0]} {day.year}", f"im {month[1]} {day.year}"
    if kind <= 6:
        subject = _subject(draw)
        be = "was" if subject.person in (de.ICH, ER) else "were"
        subject_de, finite = subject.de[NOMINATIVE], de.WURDE[subject.person]
        return _sentence(f"{subject.en} {be} born on {english}", f"{subject_de} {finite} am {german} geboren")
    event = _noun_phrase(draw, ("event",), _KNOWN, 0.2)
    one, many, eins, viele, prefix = draw.pick(_BEGINNINGS)
    when = draw.pick(
        (
            (f"on the {spelt[0]} of {month[0]}", f"am {spelt[1]}en {month[1]}"),
            (f"on {english}", f"am {german}"),
            (f"on {weekday[0]}", f"am {weekday[1]}"),
        )
    )
    plural = event.person == SIE
    right = f" {prefix}" if prefix else ""
    return _sentence(
        f"{event.en} {many if plural else one} {when[0]}",
        f"{event.de[NOMINATIVE]} {viele if plural else eins} {when[1]}{right}",
    )


_ARRIVALS = (("arrives", "kommt", "an"), ("leaves", "fährt", "ab"), ("arrives late", "kommt zu spät", "an"))


def _hour(draw: Draw) -> Pair:
    hour, minute = draw.integer(0, 23), draw.integer(0, 59)
    english, german = f"at {hour}:{minute:02}", f"um {hour}:{minute:02} Uhr"
    kind = draw.random()
    if kind < 0.35:
        english, german = clock(draw.integer(1, 12), 5 * draw.integer(0, 11))
        if draw.chance(0.5):
            return _sentence(f"it is {english}", f"es ist {german}")
        english, german = f"at {english}", f"um {german}"
    elif kind < 0.7:
        english = f"at {hour % 12 or 12}:{minute:02} {'am' if hour < 12 else 'pm'}"
        if draw.chance(0.3):
            return english, german
    if draw.chance(0.5):
        event = noun_phrase(draw.pick(_KNOWN), draw.pick(de.NOUNS["event"]))
        one, _, eins, _, prefix = draw.pick(_BEGINNINGS)
    else:
        event = noun_phrase(draw.pick(_KNOWN), draw.pick(de.NOUNS["vehicle"]))
        one, eins, prefix = draw.pick(_ARRIVALS[:2])
    right = f" {prefix}" if prefix else ""
    return _sentence(f"{event.en} {one} {english}", f"{event.de[NOMINATIVE]} {eins} {german}{right}")


def _price(draw: Draw) -> Pair:
    cents = draw.integer(101, 9999) if draw.chance(0.6) else draw.integer(10_000, 500_000)
    english, german = digits(cents, 2)
    kind = draw.random()
    if kind < 0.2:
        sign = draw.pick("€$£")
        return f"{sign}{english}", f"{german} {sign}"
    if kind < 0.35:
        whole, part = draw.integer(2, 99), draw.integer(2, 99)
        unit = draw.pick((("euros", "Euro"), ("dollars", "Dollar")))
        return _sentence(
            f"that costs {cardinal(whole)} {unit[0]} and {cardinal(part)} cents",
            f"das kostet {de.cardinal(whole)} {unit[1]} und {de.cardinal(part)} Cent",
        )
    if draw.chance(0.5):
        english, german = digits(cents // 10)
    unit = draw.pick((("euros", "Euro"), ("euros", "Euro"), ("dollars", "Dollar")))
    price = f"{english} {unit[0]}", f"{german} {unit[1]}"
    goods = _noun_phrase(draw, ("clothes", "thing", "furniture", "vehicle", "reading"), _KNOWN)
    if kind < 0.7:
        tenses = ("present", "past") if goods.person == ER else ("present",)  # "they cost" would be both
        said = clause(goods, de.COST, draw.pick(tenses), rest=price)
    else:
        verb, tense = draw.pick(de.TRADE), draw.pick(_TENSES)
        said = clause(_subject(draw), verb, tense, accusative=goods, rest=(f"for {price[0]}", f"für {price[1]}"))
    return _sentence(said.english(), said.german())


_LENGTHS = _phrases("long=lang, wide=breit, high=hoch, deep=tief")


def _measurement(draw: Draw) -> Pair:
    english, german = digits(10 * draw.integer(1, 99) + draw.integer(1, 9), 1)
    if draw.chance(0.5):
        english, german = digits(draw.integer(2, 1999))
    kind = draw.integer(0, 4)
    tense = draw.pick(("present", "present", "past"))
    thing = _noun_phrase(draw, ("furniture", "container", "vehicle", "thing"), _KNOWN)
    verb, rest = de.BE, ("", "")
    if kind == 0:
        long, size = draw.pick(_LENGTHS), 10 * draw.integer(1, 9) + draw.integer(1, 9)
        if draw.chance(0.5):
            english, german = digits(size, 1)
            rest = f"{english} metres {long[0]}", f"{german} Meter {long[1]}"
        else:
            rest = f"{size} centimetres {long[0]}", f"{size} Zentimeter {long[1]}"
    elif kind == 1:
        verb, rest = de.WEIGH, (f"{english} kilograms", f"{german} Kilogramm")
    elif kind == 2:
        place, other = (_noun_phrase(draw, ("place",), _IN_PLACE, 0.2) for _ in range(2))
        away = relation(f"{english} kilometres from", "von", DATIVE, other)
        thing, rest = place, (away[0], f"{german} Kilometer {away[1]} entfernt")
    elif kind == 3:
        age = draw.integer(2, 99)
        thing, rest = _subject(draw), (f"{age} years old", f"{age} Jahre alt")
    else:
        where, warmth = _place(draw), draw.integer(2, 39)
        return _sentence(f"{where[0]} it is {warmth} degrees", f"{where[1]} sind es {warmth} Grad")
    said = clause(thing, verb, tense, rest=rest)
    return _sentence(said.english(), said.german())


_SENTENCES: tuple[Callable[[Draw], Pair], ...] = (
    *(_statement,) * 20,
    *(_yes_no,) * 5,
    *(_w_question,) * 4,
    _object_question,
    _object_question,
    _who,
    *(_passive,) * 3,
    *(_joined,) * 5,
    *(_opinion,) * 4,
    *(_comparison,) * 3,
    *(_existence,) * 3,
    *(_number,) * 3,
    *(_date,) * 3,
    *(_hour,) * 2,
    *(_price,) * 3,
    *(_measurement,) * 3,
)
