"""Bilingual entries: nouns, adjectives, verbs and fixed phrases, and the compact tables they are written in."""

from __future__ import annotations

from dataclasses import dataclass

from .english import regular_past, with_s
from .german import DATIVE, HABEN, NOMINATIVE, SEIN, conjugate, weak_participle

Two = tuple[str, str]  # one phrase in English and in German


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun in both languages. `weak` masculines (der Junge) take the plural's form in all other cases."""

    en: str
    en_plural: str
    de: str
    de_plural: str
    gender: int
    weak: bool

    def form(self, case: int, plural: bool) -> str:
        if plural:
            return self.de_plural + ("n" if case == DATIVE and self.de_plural[-1] not in "ns" else "")
        return self.de_plural if self.weak and case != NOMINATIVE else self.de


@dataclass(frozen=True, slots=True)
class Adjective:
    """An adjective in both languages; `stem` is what attributive endings are joined to (teuer -> teur-)."""

    en: str
    en_comparative: str
    de: str
    de_comparative: str
    stem: str


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb in both languages.

    `en` holds base, third person, past and past participle of the first word; `particle` moves behind a
    pronoun ("pick him up"), `preposition` does not ("look for him"). `present` has no separable `prefix`,
    `infinitive` and `participle` have it. A verb with a `preterite` uses it for the past, not the perfect.
    """

    en: tuple[str, str, str, str]
    particle: str
    preposition: str
    present: tuple[str, ...]
    infinitive: str
    participle: str
    perfect: tuple[str, ...]
    prefix: str
    preterite: tuple[str, ...] = ()


def phrases(text: str) -> tuple[Two, ...]:
    """Parse "today=heute, at night=nachts"."""
    entries = (entry.split("=") for entry in text.split(", "))
    return tuple((english, german) for english, german in entries)


def nouns(table: str) -> tuple[Noun, ...]:
    found = []
    for entry in table.split(","):
        english, german, gender, plural = entry.split()
        singular, _, irregular = english.replace("_", " ").partition("/")
        known = "mfn".index(gender.replace("w", "m"))
        found.append(Noun(singular, irregular or with_s(singular), german, plural, known, gender == "w"))
    return tuple(found)


def adjectives(table: str) -> dict[str, Adjective]:
    found = {}
    for entry in table.split(","):
        english, german = entry.split()
        en, _, en_more = english.partition("/")
        de, de_more, stem = ([*german.split("/"), "", ""])[:3]
        root = de.removesuffix("e")
        found[en] = Adjective(en, en_more or f"more {en}", de, de_more or root + "er", stem or root)
    return found


def verb(entry: str) -> Verb:
    """Parse "pick+up = ab+holen", "see saw seen = sehen ~sieh gesehen", "hike = wandern sein"."""
    english, german = (side.split() for side in entry.split("="))
    base, past, participle = (english + english[-1:])[:3] if len(english) > 1 else (english[0], "", "")
    base, _, particle = base.partition("+")
    base, _, preposition = base.partition("_")
    past, participle = past or regular_past(base), participle or regular_past(base)
    prefix, _, infinitive = german[0].rpartition("+")
    changed, strong = "", ""
    for token in german[1:]:
        if token.startswith("~"):
            changed = token[1:]
        elif token != "sein":
            strong = token
    return Verb(
        en=(base, {"have": "has", "be": "is"}.get(base) or with_s(base, "o"), past, participle),
        particle=particle.replace("_", " "),
        preposition=preposition,
        present=conjugate(infinitive, changed),
        infinitive=prefix + infinitive,
        participle=strong or weak_participle(prefix, infinitive),
        perfect=SEIN if "sein" in german[1:] else HABEN,
        prefix=prefix,
    )


def verbs(table: str) -> tuple[Verb, ...]:
    return tuple(verb(entry) for entry in table.split(","))
