"""Entries are inflected as dictionaries list them, noun phrases agree, clauses have each language's word order."""

from __future__ import annotations

from typing import Any

import pytest

from tritonsparse.train.embedded import german as de
from tritonsparse.train.embedded import verbs
from tritonsparse.train.embedded.german import ACCUSATIVE, DATIVE, NOMINATIVE
from tritonsparse.train.embedded.grammar import (
    PRONOUNS,
    WHO,
    Clause,
    Complements,
    NounPhrase,
    clause,
    noun_phrase,
    relation,
)
from tritonsparse.train.embedded.nouns import ADJECTIVES, NOUNS

WORDS = {noun.en: noun for nouns in NOUNS.values() for noun in nouns}
VERBS = {
    verb.infinitive: verb
    for found in (
        *verbs.TRANSITIVE.values(), *verbs.PREPOSITIONAL_VERBS.values(), verbs.DATIVE_VERBS, verbs.DITRANSITIVE,
        verbs.MOTION, verbs.PUT, verbs.STAND, verbs.ACTIVITIES, verbs.EVENTS, verbs.ANIMAL_ACTIVITIES,
        (verbs.BE, verbs.HAVE, verbs.COST, verbs.WEIGH),
    )
    for verb in found
}  # fmt: skip


# infinitive: ich, du, er, participle (with its auxiliary in the third person)
CONJUGATED = """
    kaufen: kaufe kaufst kauft hat gekauft          arbeiten: arbeite arbeitest arbeitet hat gearbeitet
    öffnen: öffne öffnest öffnet hat geöffnet       tanzen: tanze tanzt tanzt hat getanzt
    sehen: sehe siehst sieht hat gesehen            lesen: lese liest liest hat gelesen
    essen: esse isst isst hat gegessen              schlafen: schlafe schläfst schläft hat geschlafen
    helfen: helfe hilfst hilft hat geholfen         einladen: lade lädst lädt hat eingeladen
    behalten: behalte behältst behält hat behalten  wandern: wandere wanderst wandert ist gewandert
    bügeln: bügle bügelst bügelt hat gebügelt       reparieren: repariere reparierst repariert hat repariert
    besuchen: besuche besuchst besucht hat besucht  aufstehen: stehe stehst steht ist aufgestanden
    anbieten: biete bietest bietet hat angeboten    zuhören: höre hörst hört hat zugehört
    umarmen: umarme umarmst umarmt hat umarmt       folgen: folge folgst folgt ist gefolgt
    beten: bete betest betet hat gebetet            anprobieren: probiere probierst probiert hat anprobiert
    gehen: gehe gehst geht ist gegangen             vergessen: vergesse vergisst vergisst hat vergessen
    sein: bin bist ist ist gewesen                  haben: habe hast hat hat gehabt
"""
COMPARED = """
    good: better besser       old: older älter                   big: bigger größer      tired: more tired müder
    poor: poorer ärmer        expensive: more expensive teurer   dark: darker dunkler
"""


def entries(table: str) -> list[tuple[str, str]]:
    pairs = (entry.split(": ") for line in table.splitlines() for entry in line.split("  ") if entry.strip())
    return [(word.strip(), forms.strip()) for word, forms in pairs]


def test_several_hundred_stems_are_conjugated_and_compared() -> None:
    assert sum(map(len, NOUNS.values())) + len(VERBS) + len(ADJECTIVES) > 350
    for infinitive, forms in entries(CONJUGATED):
        verb = VERBS[infinitive]
        assert " ".join((*verb.present[:3], verb.perfect[de.ER], verb.participle)) == forms
    for adjective, forms in entries(COMPARED):
        assert f"{ADJECTIVES[adjective].en_comparative} {ADJECTIVES[adjective].de_comparative}" == forms


def the(words: str) -> NounPhrase:
    """ "my old dog" or "these dogs" (a plural is found by the noun's form) as a noun phrase."""
    article, *middle, last = words.split()
    plural = last not in WORDS
    noun = next(n for n in WORDS.values() if last in (n.en, n.en_plural))
    adjective = ADJECTIVES[middle[0]] if middle else None
    return noun_phrase("this" if article == "these" else article, noun, adjective, plural)


# Articles and adjectives: nominative, accusative, dative, by hand from a grammar's tables.
@pytest.mark.parametrize(
    ("english", "nominative", "accusative", "dative"),
    [
        ("the old man", "der alte Mann", "den alten Mann", "dem alten Mann"),
        ("the old woman", "die alte Frau", "die alte Frau", "der alten Frau"),
        ("the old house", "das alte Haus", "das alte Haus", "dem alten Haus"),
        ("the old houses", "die alten Häuser", "die alten Häuser", "den alten Häusern"),
        ("a small dog", "ein kleiner Hund", "einen kleinen Hund", "einem kleinen Hund"),
        ("a small cat", "eine kleine Katze", "eine kleine Katze", "einer kleinen Katze"),
        ("a small child", "ein kleines Kind", "ein kleines Kind", "einem kleinen Kind"),
        ("a small dogs", "kleine Hunde", "kleine Hunde", "kleinen Hunden"),
        ("no small dog", "kein kleiner Hund", "keinen kleinen Hund", "keinem kleinen Hund"),
        ("no small dogs", "keine kleinen Hunde", "keine kleinen Hunde", "keinen kleinen Hunden"),
        ("our new car", "unser neues Auto", "unser neues Auto", "unserem neuen Auto"),
        ("our new cars", "unsere neuen Autos", "unsere neuen Autos", "unseren neuen Autos"),
        ("this expensive jacket", "diese teure Jacke", "diese teure Jacke", "dieser teuren Jacke"),
        ("these dark rings", "diese dunklen Ringe", "diese dunklen Ringe", "diesen dunklen Ringen"),
        ("every tired boy", "jeder müde Junge", "jeden müden Jungen", "jedem müden Jungen"),
        ("my neighbour", "mein Nachbar", "meinen Nachbarn", "meinem Nachbarn"),
    ],
)
def test_articles_and_adjectives_agree(english: str, nominative: str, accusative: str, dative: str) -> None:
    assert the(english).de == (nominative, accusative, dative)


def test_mass_nouns_and_numbers_take_strong_endings_and_prepositions_contract_with_the_article_only() -> None:
    water = noun_phrase("", WORDS["water"], ADJECTIVES["cold"], mass=True)
    assert (water.en, water.de) == ("cold water", ("kaltes Wasser", "kaltes Wasser", "kaltem Wasser"))
    soup = noun_phrase("no", WORDS["soup"], ADJECTIVES["hot"], mass=True)
    assert (soup.en, soup.de[ACCUSATIVE]) == ("any hot soup", "keine heiße Suppe")
    dogs = noun_phrase("", WORDS["dog"], ADJECTIVES["black"], plural=True, count=("three", "drei"))
    assert (dogs.en, dogs.de[DATIVE]) == ("three black dogs", "drei schwarzen Hunden")
    assert relation("in", "in", DATIVE, the("the garden"))[1] == "im Garten"
    assert relation("to", "zu", DATIVE, the("the old school"))[1] == "zur alten Schule"
    assert relation("in", "in", DATIVE, the("our garden"))[1] == "in unserem Garten"
    assert relation("from", "von", DATIVE, the("the houses"))[1] == "von den Häusern"
    assert the("the garden").de[NOMINATIVE] == "der Garten"


@pytest.mark.parametrize(
    ("english", "written"),
    [
        ("a apple", "an apple"), ("a old man", "an old man"), ("these knives", "these knives"), ("a mice", "mice"),
        ("no eggs", "any eggs"), ("no egg", "an egg"), ("my children", "my children"), ("the boxes", "the boxes"),
        ("our stories", "our stories"),
    ],
)  # fmt: skip
def test_english_articles_and_plurals(english: str, written: str) -> None:
    assert the(english).en == written


ME, YOU, HE, SHE, WE, THEY = PRONOUNS.values()
MILK = noun_phrase("the", WORDS["milk"], mass=True)
Words = str | NounPhrase | None


def say(subject: Words, verb: str, tense: str = "", what: Words = None, to: Words = None, **options: Any) -> Clause:
    """A clause of words; `rest` is (English, German), or what `relation` takes."""

    def phrase(words: Words) -> NounPhrase | None:
        return the(words) if isinstance(words, str) else words

    rest = options.pop("rest", ("", ""))
    if len(rest) > 2:
        rest = relation(*rest[:3], the(rest[3]))
    return clause(
        phrase(subject), VERBS[verb], tense or "present", Complements(phrase(what), phrase(to), rest), **options
    )


TODAY, NOW, YESTERDAY = ("today", "heute"), ("now", "jetzt"), ("yesterday", "gestern")
NEGATED, ALREADY, FIRST = {"negated": True}, {"adverb": "already"}, {"fronted": True}
INTO, ON = ("into", "in", ACCUSATIVE, "the house"), ("on", "auf", ACCUSATIVE, "the table")
FOR, TO = ("for", "auf", ACCUSATIVE, "the girl"), ("to", "zu", DATIVE, "the station")
UNDER, IN = ("under", "unter", DATIVE, "the chairs"), ("in", "in", DATIVE, "the old kitchen")
MAIN, LAST, QUESTION = "main", "verb last", "verb first"
# One row a construction: (clause, order of the German clause, English = German); a question asks both.
SAID = [
    # accusative objects, separable verbs
    (say(HE, "sehen", "", "the big dog"), MAIN, "he sees the big dog = er sieht den großen Hund"),
    (say(YOU, "abholen", "", "the child"), MAIN, "you pick up the child = du holst das Kind ab"),
    (say(SHE, "abholen", "", HE), MAIN, "she picks him up = sie holt ihn ab"),
    (say(WE, "suchen", "", HE), MAIN, "we look for him = wir suchen ihn"),
    (say(WE, "aufstehen", "want"), MAIN, "we want to get up = wir wollen aufstehen"),
    (say(SHE, "aufstehen"), LAST, "she gets up = sie aufsteht"),
    # verb second with something in front
    (say(SHE, "lesen", "", "a letter", time=TODAY, **FIRST), MAIN,
     "today she reads a letter = heute liest sie einen Brief"),
    (say(ME, "kaufen", "past", "a hat", time=YESTERDAY, **FIRST), MAIN,
     "yesterday I bought a hat = gestern habe ich einen Hut gekauft"),
    (say(WE, "arbeiten", "", time=NOW, **FIRST, **NEGATED), MAIN, "now we don't work = jetzt arbeiten wir nicht"),
    # perfect with haben and sein
    (say(THEY, "gehen", "past", rest=TO), MAIN, "they went to the station = sie sind zum Bahnhof gegangen"),
    (say(SHE, "trinken", "perfect", MILK, **ALREADY), MAIN,
     "she has already drunk the milk = sie hat die Milch schon getrunken"),
    (say(SHE, "schreiben", "perfect", "a poem", **ALREADY), MAIN,
     "she has already written a poem = sie hat schon ein Gedicht geschrieben"),
    (say(SHE, "schreiben", "perfect", "the poem", **NEGATED), MAIN,
     "she hasn't written the poem yet = sie hat das Gedicht noch nicht geschrieben"),
    (say(SHE, "schreiben", "perfect", "no poem", **NEGATED), MAIN,
     "she hasn't written a poem yet = sie hat noch kein Gedicht geschrieben"),
    # subordinate clauses
    (say("my friend", "kommen", "past", rest=INTO), LAST,
     "my friend came into the house = mein Freund ins Haus gekommen ist"),
    (say(HE, "öffnen", "must", "the suitcase"), LAST, "he has to open the suitcase = er den Koffer öffnen muss"),
    (say(ME, "sein", "", rest=("tired", "müde")), LAST, "I am tired = ich müde bin"),
    # modal verbs
    (say(ME, "helfen", "can", to="the old woman"), MAIN, "I can help the old woman = ich kann der alten Frau helfen"),
    (say(HE, "einladen", "would like", "every guest"), MAIN,
     "he would like to invite every guest = er möchte jeden Gast einladen"),
    (say(HE, "warten", "had to", **NEGATED), MAIN, "he didn't have to wait = er musste nicht warten"),
    # kein and nicht
    (say(SHE, "haben", "", "no brother", **NEGATED), MAIN, "she doesn't have a brother = sie hat keinen Bruder"),
    (say(SHE, "haben", "", "no brothers", **NEGATED), MAIN, "she doesn't have any brothers = sie hat keine Brüder"),
    (say(SHE, "kennen", "", "your boss", **NEGATED), MAIN, "she doesn't know your boss = sie kennt deinen Chef nicht"),
    (say(HE, "sein", "past", rest=("hungry", "hungrig"), **NEGATED), MAIN, "he wasn't hungry = er war nicht hungrig"),
    (say(ME, "sein", "", rest=("rich", "reich"), **NEGATED), MAIN, "I am not rich = ich bin nicht reich"),
    (say(ME, "warten", "", rest=FOR, **NEGATED), MAIN, "I don't wait for the girl = ich warte nicht auf das Mädchen"),
    # two objects, pronouns before time
    (say(HE, "geben", "past", "a apple", "the child", time=YESTERDAY), MAIN,
     "he gave the child an apple yesterday = er hat gestern dem Kind einen Apfel gegeben"),
    (say(HE, "zeigen", "will", "his dog", ME, time=("tomorrow", "morgen")), MAIN,
     "he will show me his dog tomorrow = er wird mir morgen seinen Hund zeigen"),
    # two-way prepositions
    (say(HE, "legen", "", "the book", rest=ON), MAIN, "he lays the book on the table = er legt das Buch auf den Tisch"),
    (say("the book", "liegen", "", rest=UNDER), MAIN,
     "the book lies under the chairs = das Buch liegt unter den Stühlen"),
    (say("a cat", "schlafen", "", rest=IN), MAIN,
     "a cat sleeps in the old kitchen = eine Katze schläft in der alten Küche"),
    # questions
    (say("your sister", "lesen", "", "the newspaper"), QUESTION,
     "does your sister read the newspaper = liest deine Schwester die Zeitung"),
    (say(YOU, "schwimmen", "past"), QUESTION, "did you swim = bist du geschwommen"),
    (say(THEY, "sein", "past", rest=("happy", "glücklich")), QUESTION, "were they happy = waren sie glücklich"),
    (say(WHO, "stehlen", "past", "my bag"), MAIN, "who stole my bag = wer hat meine Tasche gestohlen"),
    # comparison, passive, adverbs of frequency
    (say(HE, "sein", "", rest=("older than the queen", "älter als die Königin")), MAIN,
     "he is older than the queen = er ist älter als die Königin"),
    (say("the houses", "bauen", "passive", time=("in 1990", "im Jahr 1990")), MAIN,
     "the houses were built in 1990 = die Häuser wurden im Jahr 1990 gebaut"),
    (say(THEY, "singen", "", adverb="often"), MAIN, "they often sing = sie singen oft"),
    (say(SHE, "sein", "", rest=("lazy", "faul"), adverb="never"), MAIN, "she is never lazy = sie ist nie faul"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "order", "sentences"), SAID, ids=[sentences for _, _, sentences in SAID])
def test_sentences_have_the_word_order_of_both_languages(said: Clause, order: str, sentences: str) -> None:
    assert f"{said.english(question=order == QUESTION)} = {said.german(order)}" == sentences
