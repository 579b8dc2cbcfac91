"""Noun phrases and clauses: a meaning built once, and spoken in English and in German."""

from __future__ import annotations

from dataclasses import dataclass

from . import german as de
from .german import ACCUSATIVE, DATIVE, ER, NOMINATIVE, PLURAL, SIE
from .lexicon import Adjective, Noun, Two, Verb
from .verbs import BE


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
MODALS = {
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
class Complements:
    """What stands beside a verb: objects, and a place, a direction, a quality or a price as `rest`."""

    accusative: NounPhrase | None = None
    dative: NounPhrase | None = None
    rest: Two = ("", "")


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
        if self.verb is BE and self.tense in be:
            return "", be[self.tense].get(person, "were" if self.tense == "past" else "are"), ""
        if self.tense == "perfect":
            return "", "has" if singular else "have", participle
        if self.tense == "past":
            return past, "did", base
        do = "does" if singular else "do"
        if self.tense == "present":
            return third if singular else base, do, base
        auxiliary, _, link, _ = MODALS[self.tense]
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
        return MODALS[self.tense][3][person], verb.infinitive


_NONE = Complements()


def clause(
    subject: NounPhrase,
    verb: Verb,
    tense: str = "present",
    complements: Complements = _NONE,
    *,
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
    beside, rest = ((complements.dative, DATIVE), (complements.accusative, ACCUSATIVE)), complements.rest
    objects = [(phrase, case) for phrase, case in beside if phrase]
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
