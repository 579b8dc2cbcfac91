"""Kinds of sentence drawn at random: statements, questions, passives, joined clauses, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .clauses import DEEDS, KINDS_AND_VERBS, drawn_clause
from .draws import KNOWN, OBJECT_ARTICLES, Draw, drawn_noun_phrase, drawn_place, drawn_subject, drawn_time
from .german import ACCUSATIVE, ER, NOMINATIVE
from .grammar import WHO, Complements, clause
from .lexicon import Two, phrases
from .nouns import COLOURS, FITTING
from .verbs import BE


def sentence(english: str, german: str, mark: str = ".") -> Two:
    return english[0].upper() + english[1:] + mark, german[0].upper() + german[1:] + mark


def _statement(draw: Draw) -> Two:
    said = drawn_clause(draw)
    return sentence(said.english(), said.german())


def _yes_no(draw: Draw) -> Two:
    asked = drawn_clause(draw, fronting=0, positive=True)
    return sentence(asked.english(question=True), asked.german("verb first"), "?")


_QUESTIONS = phrases("why=warum, when=wann, how often=wie oft, why=warum")


def _w_question(draw: Draw) -> Two:
    english, german = draw.pick(_QUESTIONS)
    asked = drawn_clause(draw, fronting=0, positive=True, adverbial=0.5 if english == "why" else 0)
    if asked.tense == "perfect" and english != "why":
        english, german = "why", "warum"
    return sentence(f"{english} {asked.english(question=True)}", f"{german} {asked.german('verb first')}", "?")


def _object_question(draw: Draw) -> Two:
    """What or who is the object: "What does he buy?", "Whom" being left to grammar books."""
    kinds, verb = draw.pick(KINDS_AND_VERBS)
    english, german = ("who", "wen") if kinds == ("person",) else ("what", "was")
    tense = draw.pick(("present", "past", "past", "can", "will", "must", "want", "should", "would like"))
    time = drawn_time(draw, tense) if draw.chance(0.5) else ("", "")
    verb = replace(verb, preposition=f"{verb.particle} {verb.preposition}".strip(), particle="")
    asked = clause(drawn_subject(draw), verb, tense, time=time)
    return sentence(f"{english} {asked.english(question=True)}", f"{german} {asked.german('verb first')}", "?")


def _who(draw: Draw) -> Two:
    """ "Who" as the subject, which takes neither inversion nor "do"."""
    asked = replace(drawn_clause(draw, 0, positive=True, contents=DEEDS), subject=WHO)
    return sentence(asked.english(), asked.german(), "?")


def _passive(draw: Draw) -> Two:
    kinds, verb = draw.pick(KINDS_AND_VERBS)
    negated = draw.chance(0.15)
    subject = drawn_noun_phrase(draw, kinds, KNOWN if negated else OBJECT_ARTICLES)
    time = drawn_time(draw, "passive") if draw.chance(0.7) else ("", "")
    rest = drawn_place(draw) if draw.chance(0.2) else ("", "")
    said = clause(
        subject, verb, "passive", Complements(rest=rest), time=time, fronted=draw.chance(0.4), negated=negated
    )
    return sentence(said.english(), said.german())


_JOINTS = phrases("because=weil, because=weil, although=obwohl, if=wenn")
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


def _joined(draw: Draw) -> Two:
    """A main and a subordinate clause, in either order."""
    english, german = draw.pick(_JOINTS)
    main, other = drawn_clause(draw, 0.3, adverbial=0.4), drawn_clause(draw, 0, adverbial=0.3)
    conditions = f"{english} {other.english()}", f"{german} {other.german('verb last')}"
    if english == "because" or draw.chance(0.4):
        return sentence(f"{main.english()} {conditions[0]}", f"{main.german()}, {conditions[1]}")
    main = replace(main, front=("", ""))
    return sentence(f"{conditions[0]}, {main.english()}", f"{conditions[1]}, {main.german('verb first')}")


def _opinion(draw: Draw) -> Two:
    english, german = draw.pick(_OPINIONS)
    said = drawn_clause(draw, 0, adverbial=0.6)
    return sentence(f"{english} {said.english()}", f"{german} {said.german('verb last')}")


def _comparison(draw: Draw) -> Two:
    kind = draw.pick(("person", "animal", "clothes", "thing", "vehicle", "place", "reading"))
    adjective = draw.pick([word for word in FITTING[kind] if word.en not in COLOURS])
    tense, negated = draw.pick(("present", "present", "past")), draw.chance(0.15)
    subject = other = drawn_subject(draw, negated, kind)
    while other.pronoun or other.en == subject.en:
        other = drawn_noun_phrase(draw, (kind,), KNOWN, 0.1)
    if negated or draw.chance(0.3):
        rest = f"as {adjective.en} as {other.en}", f"so {adjective.de} wie {other.de[NOMINATIVE]}"
        rest = rest if negated else (rest[0], "genau" + rest[1])
    else:
        rest = (
            f"{adjective.en_comparative} than {other.en}",
            f"{adjective.de_comparative} als {other.de[NOMINATIVE]}",
        )
    said = clause(subject, BE, tense, Complements(rest=rest), negated=negated)
    return sentence(said.english(), said.german())


def _existence(draw: Draw) -> Two:
    """ "There are two dogs in the garden", where German keeps one form, "gibt es", for one and many."""
    kinds = draw.pick((("animal",), ("person",), ("thing", "furniture", "container", "reading"), ("food", "drink")))
    negated, past = draw.chance(0.2), draw.chance(0.3)
    phrase = drawn_noun_phrase(draw, kinds, ("no",) if negated else ("a", "", ""))
    english, german = drawn_place(draw)
    be = ("was" if past else "is") if phrase.person == ER else ("were" if past else "are")
    finite = "gab" if past else "gibt"
    there = f"there {be}" + ("n't" if negated else "")
    if draw.chance(0.5):
        return sentence(f"{there} {phrase.en} {english}", f"es {finite} {phrase.de[ACCUSATIVE]} {german}")
    return sentence(f"{english} {there} {phrase.en}", f"{german} {finite} es {phrase.de[ACCUSATIVE]}")


SENTENCES: tuple[Callable[[Draw], Two], ...] = (
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
)
