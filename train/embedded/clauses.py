"""Clauses drawn at random: what a verb needs beside it, then a tense, an adverbial, perhaps a negation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from . import german as de
from . import verbs
from .draws import (
    IN_PLACE,
    KNOWN,
    OBJECT_ARTICLES,
    SUBJECT_ARTICLES,
    Draw,
    drawn_noun_phrase,
    drawn_person,
    drawn_place,
    drawn_subject,
    drawn_time,
)
from .english import cardinal
from .figures import digits
from .german import ACCUSATIVE, DATIVE, ER, SIE
from .grammar import ADVERBS, MODALS, Clause, Complements, NounPhrase, clause, relation
from .lexicon import Verb, phrases
from .nouns import FITTING, NOUNS

KINDS_AND_VERBS = tuple((tuple(kinds.split()), verb) for kinds, known in verbs.TRANSITIVE.items() for verb in known)
_PREPOSITIONAL = tuple((*governed, verb) for governed, known in verbs.PREPOSITIONAL_VERBS.items() for verb in known)
_DIRECTIONS = (
    ("to", "zu", DATIVE),
    ("to", "zu", DATIVE),
    ("into", "in", ACCUSATIVE),
    ("through", "durch", ACCUSATIVE),
    ("out of", "aus", DATIVE),
)
_POSITIONS = phrases("on=auf, on=auf, under=unter, behind=hinter, next to=neben, in front of=vor")
_RECEIVABLE = ("reading", "food", "clothes", "thing", "container")
_MEASURES = (
    ("meal", phrases("kilograms of=Kilogramm, grams of=Gramm, pounds of=Pfund")),
    ("drink", phrases("bottles of=Flaschen, glasses of=Gläser, litres of=Liter, cups of=Tassen")),
)
_Parts = tuple[NounPhrase, Verb, Complements]


def _transitive(draw: Draw, negated: bool) -> _Parts:
    kinds, verb = draw.pick(KINDS_AND_VERBS)
    subject, articles = drawn_subject(draw, negated), ("the", "no", "my", "his") if negated else OBJECT_ARTICLES
    if "person" in kinds and draw.chance(0.5):
        phrase = drawn_person(draw, subject, ACCUSATIVE, articles)
    else:
        phrase = drawn_noun_phrase(draw, kinds, articles)
    return subject, verb, Complements(phrase, rest=drawn_place(draw) if draw.chance(0.12) else ("", ""))


def _having(draw: Draw, negated: bool) -> _Parts:
    articles = ("no",) if negated else ("a", "a", "")
    return (
        drawn_subject(draw, negated),
        verbs.HAVE,
        Complements(drawn_noun_phrase(draw, ("animal", *_RECEIVABLE, "vehicle"), articles)),
    )


def _measured(draw: Draw, negated: bool) -> _Parts:
    if negated:
        return _transitive(draw, negated)
    kind, units = draw.pick(_MEASURES)
    unit, noun = draw.pick(units), draw.pick(NOUNS[kind])
    n = draw.integer(2, 12)
    amount = digits(10 * n + 5, 1) if unit[1] in ("Kilogramm", "Liter") else (cardinal(n), de.cardinal(n))
    german = f"{amount[1]} {unit[1]} {noun.de}"
    phrase = NounPhrase("", f"{amount[0]} {unit[0]} {noun.en}", (german, german, german), SIE, definite=False)
    verb = draw.pick(next(known for kinds, known in verbs.TRANSITIVE.items() if kinds.endswith("drink meal")))
    return drawn_subject(draw), verb, Complements(phrase)


def _dative(draw: Draw, negated: bool) -> _Parts:
    subject = drawn_subject(draw, negated)
    articles = ("the", "no", "my") if negated else SUBJECT_ARTICLES
    return subject, draw.pick(verbs.DATIVE_VERBS), Complements(dative=drawn_person(draw, subject, DATIVE, articles))


def _prepositional(draw: Draw, negated: bool) -> _Parts:
    preposition, case, verb = draw.pick(_PREPOSITIONAL)
    subject = drawn_subject(draw, negated)
    phrase = drawn_person(draw, subject, case, KNOWN if negated else SUBJECT_ARTICLES)
    english, german = relation(verb.preposition, preposition, case, phrase)
    return subject, replace(verb, preposition=""), Complements(rest=(english, german))


def _ditransitive(draw: Draw, negated: bool) -> _Parts:
    subject = drawn_subject(draw, negated)
    receiver = drawn_person(draw, subject, DATIVE, KNOWN)
    given = drawn_noun_phrase(draw, _RECEIVABLE, ("no", "no", "the") if negated else OBJECT_ARTICLES)
    return subject, draw.pick(verbs.DITRANSITIVE), Complements(given, receiver)


def _motion(draw: Draw, negated: bool) -> _Parts:
    verb = draw.pick(verbs.MOTION)
    english, german, case = draw.pick(_DIRECTIONS[: 1 if verb.prefix else None])
    place = drawn_noun_phrase(draw, ("place",), IN_PLACE, 0.2)
    return drawn_subject(draw, negated), verb, Complements(rest=relation(english, german, case, place))


def _activity(draw: Draw, negated: bool) -> _Parts:
    kind = draw.random()
    if kind < 0.2:
        rest = drawn_place(draw) if draw.chance(0.5) else ("", "")
        return drawn_subject(draw, negated, "animal"), draw.pick(verbs.ANIMAL_ACTIVITIES), Complements(rest=rest)
    if kind < 0.45:
        return drawn_subject(draw, negated), draw.pick(verbs.EVENTS), Complements()
    return (
        drawn_subject(draw, negated),
        draw.pick(verbs.ACTIVITIES),
        Complements(rest=drawn_place(draw) if draw.chance(0.6) else ("", "")),
    )


def _position(draw: Draw, negated: bool) -> _Parts:
    moved = draw.chance(0.5)
    case = ACCUSATIVE if moved else DATIVE
    thing = drawn_noun_phrase(draw, ("reading", "food", "thing"), KNOWN)
    if draw.chance(0.3):
        rest = relation("in", "in", case, drawn_noun_phrase(draw, ("container",), ("the", "the", "my"), 0.2))
    else:
        rest = relation(*draw.pick(_POSITIONS), case, drawn_noun_phrase(draw, ("furniture",), IN_PLACE, 0.2))
    if not moved:
        return thing, draw.pick(verbs.STAND), Complements(rest=rest)
    return drawn_subject(draw, negated), draw.pick(verbs.PUT), Complements(thing, rest=rest)


def _quality(draw: Draw, negated: bool) -> _Parts:
    kind = draw.pick(("person", "person", "animal", "thing", "clothes", "vehicle", "place", "reading"))
    adjective = draw.pick(FITTING[kind])
    return drawn_subject(draw, negated, kind), verbs.BE, Complements(rest=(adjective.en, adjective.de))


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
# What persons do.
DEEDS = (_transitive, _having, _measured, _dative, _prepositional, _ditransitive, _motion)
TENSES = (*("present",) * 8, *("past",) * 6, *("perfect",) * 2, *("will",) * 2, *MODALS)


def drawn_clause(
    draw: Draw,
    fronting: float = 0.4,
    positive: bool = False,
    adverbial: float = 1.0,
    contents: Sequence[Callable[[Draw, bool], _Parts]] = _CONTENTS,
) -> Clause:
    """Any clause; `fronting` of its adverbials of time come first, `adverbial` scales how many there are."""
    negated = not positive and draw.chance(0.18)
    subject, verb, complements = draw.pick(contents)(draw, negated)
    tense = draw.pick(("present", "present", "past") if verb.preterite else TENSES)
    if verb.en[0] == verb.en[2] and subject.person != ER:
        tense = "present" if tense == "past" else tense  # "they put" would be two tenses
    adverb, time, fronted = "", ("", ""), False
    if tense == "perfect":
        if not negated:
            adverb = "already"
    elif draw.chance(0.45 * adverbial):
        time, fronted = drawn_time(draw, tense), draw.chance(fronting)
    elif tense in ("present", "past") and not negated and draw.chance(0.25 * adverbial):
        adverb = draw.pick(tuple(ADVERBS)[:-1])
    return clause(subject, verb, tense, complements, time=time, fronted=fronted, negated=negated, adverb=adverb)
