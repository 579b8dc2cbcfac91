"""Kinds of sentence about figures, drawn at random: numbers, dates, hours, prices, measurements."""

from __future__ import annotations

from collections.abc import Callable

from . import german as de
from .clauses import TENSES
from .draws import IN_PLACE, KNOWN, PERSONS, Draw, drawn_day, drawn_noun_phrase, drawn_place, drawn_subject
from .english import cardinal, ordinal
from .figures import MONTHS, WEEKDAYS, clock, date, digits
from .german import DATIVE, ER, NOMINATIVE, SIE
from .grammar import Complements, clause, noun_phrase, relation
from .lexicon import Adjective, Two, phrases
from .nouns import NOUNS
from .sentences import sentence
from .verbs import BE, COST, SEEING, TRADE, WEIGH


def _number(draw: Draw) -> Two:
    n = draw.integer(0, 10 ** draw.integer(2, 6) - 1)
    kind = draw.random()
    if kind < 0.5:
        return cardinal(n), de.cardinal(n)
    if kind < 0.65:
        english, german = digits(n, draw.integer(1, 2) if draw.chance(0.6) else 0)
        return sentence(f"the number is {english}", f"die Zahl ist {german}")
    if kind < 0.8:
        year = draw.integer(1101, 1999)
        year += year % 100 == 0
        low = year % 100
        english = f"{cardinal(year // 100)} {'oh-' + cardinal(low) if low < 10 else cardinal(low)}"
        return f"in {english}", f"im Jahr {de.year(year)}"
    n = draw.integer(1, 31) if draw.chance(0.4) else draw.integer(1, 999)
    noun = draw.pick(NOUNS[draw.pick(("person", "place", "event", "vehicle"))])
    nth = Adjective(ordinal(n), "", "", "", de.ordinal(n))
    phrase = noun_phrase(draw.pick(("the", "the", "her", "our")), noun, nth)
    if kind < 0.9:
        return phrase.en, phrase.de[NOMINATIVE]
    said = clause(draw.pick(PERSONS), draw.pick(SEEING), draw.pick(TENSES), Complements(phrase))
    return sentence(said.english(), said.german())


_BEGINNINGS = (
    ("begins", "begin", "beginnt", "beginnen", ""),
    ("ends", "end", "endet", "enden", ""),
    ("takes place", "take place", "findet", "finden", "statt"),
)


def _date(draw: Draw) -> Two:
    day = drawn_day(draw)
    english, german = date(day)
    weekday = WEEKDAYS[day.weekday()]
    spelt = ordinal(day.day), de.ordinal(day.day)
    month = MONTHS[day.month - 1]
    kind = draw.integer(0, 8)
    if kind == 0:
        return f"on {weekday[0]}, {english}", f"am {weekday[1]}, dem {german}"
    if kind == 1:
        return sentence(f"today is {weekday[0]}, {english}", f"heute ist {weekday[1]}, der {german}")
    if kind == 2:
        return f"{day.day:02}/{day.month:02}/{day.year}", f"{day.day:02}.{day.month:02}.{day.year}"
    if kind == 3:
        return f"the {spelt[0]} of {month[0]} {day.year}", f"der {spelt[1]}e {month[1]} {day.year}"
    if kind == 4:
        return f"in {month[0]} {day.year}", f"im {month[1]} {day.year}"
    if kind <= 6:
        subject = drawn_subject(draw)
        be = "was" if subject.person in (de.ICH, ER) else "were"
        subject_de, finite = subject.de[NOMINATIVE], de.WURDE[subject.person]
        return sentence(f"{subject.en} {be} born on {english}", f"{subject_de} {finite} am {german} geboren")
    event = drawn_noun_phrase(draw, ("event",), KNOWN, 0.2)
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
    return sentence(
        f"{event.en} {many if plural else one} {when[0]}",
        f"{event.de[NOMINATIVE]} {viele if plural else eins} {when[1]}{right}",
    )


_ARRIVALS = (("arrives", "kommt", "an"), ("leaves", "fährt", "ab"))


def _hour(draw: Draw) -> Two:
    hour, minute = draw.integer(0, 23), draw.integer(0, 59)
    english, german = f"at {hour}:{minute:02}", f"um {hour}:{minute:02} Uhr"
    kind = draw.random()
    if kind < 0.35:
        english, german = clock(draw.integer(1, 12), 5 * draw.integer(0, 11))
        if draw.chance(0.5):
            return sentence(f"it is {english}", f"es ist {german}")
        english, german = f"at {english}", f"um {german}"
    elif kind < 0.7:
        english = f"at {hour % 12 or 12}:{minute:02} {'am' if hour < 12 else 'pm'}"
        if draw.chance(0.3):
            return english, german
    if draw.chance(0.5):
        event = noun_phrase(draw.pick(KNOWN), draw.pick(NOUNS["event"]))
        one, _, eins, _, prefix = draw.pick(_BEGINNINGS)
    else:
        event = noun_phrase(draw.pick(KNOWN), draw.pick(NOUNS["vehicle"]))
        one, eins, prefix = draw.pick(_ARRIVALS)
    right = f" {prefix}" if prefix else ""
    return sentence(f"{event.en} {one} {english}", f"{event.de[NOMINATIVE]} {eins} {german}{right}")


def _price(draw: Draw) -> Two:
    cents = draw.integer(101, 9999) if draw.chance(0.6) else draw.integer(10_000, 500_000)
    english, german = digits(cents, 2)
    kind = draw.random()
    if kind < 0.2:
        sign = draw.pick("€$£")
        return f"{sign}{english}", f"{german} {sign}"
    if kind < 0.35:
        whole, part = draw.integer(2, 99), draw.integer(2, 99)
        unit = draw.pick((("euros", "Euro"), ("dollars", "Dollar")))
        return sentence(
            f"that costs {cardinal(whole)} {unit[0]} and {cardinal(part)} cents",
            f"das kostet {de.cardinal(whole)} {unit[1]} und {de.cardinal(part)} Cent",
        )
    if draw.chance(0.5):
        english, german = digits(cents // 10)
    unit = draw.pick((("euros", "Euro"), ("euros", "Euro"), ("dollars", "Dollar")))
    price = f"{english} {unit[0]}", f"{german} {unit[1]}"
    goods = drawn_noun_phrase(draw, ("clothes", "thing", "furniture", "vehicle", "reading"), KNOWN)
    if kind < 0.7:
        tenses = ("present", "past") if goods.person == ER else ("present",)  # "they cost" would be both
        said = clause(goods, COST, draw.pick(tenses), Complements(rest=price))
    else:
        verb, tense = draw.pick(TRADE), draw.pick(TENSES)
        said = clause(drawn_subject(draw), verb, tense, Complements(goods, rest=(f"for {price[0]}", f"für {price[1]}")))
    return sentence(said.english(), said.german())


_LENGTHS = phrases("long=lang, wide=breit, high=hoch, deep=tief")


def _measurement(draw: Draw) -> Two:
    english, german = digits(10 * draw.integer(1, 99) + draw.integer(1, 9), 1)
    if draw.chance(0.5):
        english, german = digits(draw.integer(2, 1999))
    kind = draw.integer(0, 4)
    tense = draw.pick(("present", "present", "past"))
    thing = drawn_noun_phrase(draw, ("furniture", "container", "vehicle", "thing"), KNOWN)
    verb, rest = BE, ("", "")
    if kind == 0:
        long, size = draw.pick(_LENGTHS), 10 * draw.integer(1, 9) + draw.integer(1, 9)
        if draw.chance(0.5):
            english, german = digits(size, 1)
            rest = f"{english} metres {long[0]}", f"{german} Meter {long[1]}"
        else:
            rest = f"{size} centimetres {long[0]}", f"{size} Zentimeter {long[1]}"
    elif kind == 1:
        verb, rest = WEIGH, (f"{english} kilograms", f"{german} Kilogramm")
    elif kind == 2:
        place, other = (drawn_noun_phrase(draw, ("place",), IN_PLACE, 0.2) for _ in range(2))
        away = relation(f"{english} kilometres from", "von", DATIVE, other)
        thing, rest = place, (away[0], f"{german} Kilometer {away[1]} entfernt")
    elif kind == 3:
        age = draw.integer(2, 99)
        thing, rest = drawn_subject(draw), (f"{age} years old", f"{age} Jahre alt")
    else:
        where, warmth = drawn_place(draw), draw.integer(2, 39)
        return sentence(f"{where[0]} it is {warmth} degrees", f"{where[1]} sind es {warmth} Grad")
    said = clause(thing, verb, tense, Complements(rest=rest))
    return sentence(said.english(), said.german())


FIGURE_SENTENCES: tuple[Callable[[Draw], Two], ...] = (
    *(_number,) * 3,
    *(_date,) * 3,
    *(_hour,) * 2,
    *(_price,) * 3,
    *(_measurement,) * 3,
)
