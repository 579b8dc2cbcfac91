"""Noun phrases agree, and clauses have the word order of both languages."""

from __future__ import annotations

import pytest

from tritonsparse.train.embedded import verbs
from tritonsparse.train.embedded.german import ACCUSATIVE, DATIVE, NOMINATIVE
from tritonsparse.train.embedded.grammar import PRONOUNS, WHO, Clause, NounPhrase, clause, noun_phrase, relation
from tritonsparse.train.embedded.nouns import ADJECTIVES, NOUNS
from tritonsparse.train.embedded.verbs import BE, HAVE

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


def test_mass_nouns_and_numbers_take_strong_endings() -> None:
    water = noun_phrase("", WORDS["water"], ADJECTIVES["cold"], mass=True)
    assert (water.en, water.de) == ("cold water", ("kaltes Wasser", "kaltes Wasser", "kaltem Wasser"))
    soup = noun_phrase("no", WORDS["soup"], ADJECTIVES["hot"], mass=True)
    assert (soup.en, soup.de[ACCUSATIVE]) == ("any hot soup", "keine heiße Suppe")
    dogs = noun_phrase("", WORDS["dog"], ADJECTIVES["black"], plural=True, count=("three", "drei"))
    assert (dogs.en, dogs.de[DATIVE]) == ("three black dogs", "drei schwarzen Hunden")


@pytest.mark.parametrize(
    ("english", "written"),
    [
        ("a apple", "an apple"),
        ("a old man", "an old man"),
        ("these knives", "these knives"),
        ("a mice", "mice"),
        ("no eggs", "any eggs"),
        ("no egg", "an egg"),
        ("my children", "my children"),
        ("the boxes", "the boxes"),
        ("our stories", "our stories"),
    ],
)
def test_english_articles_and_plurals(english: str, written: str) -> None:
    assert the(english).en == written


def test_prepositions_contract_only_with_the_article() -> None:
    assert relation("in", "in", DATIVE, the("the garden"))[1] == "im Garten"
    assert relation("to", "zu", DATIVE, the("the old school"))[1] == "zur alten Schule"
    assert relation("in", "in", DATIVE, the("our garden"))[1] == "in unserem Garten"
    assert relation("from", "von", DATIVE, the("the houses"))[1] == "von den Häusern"
    assert the("the garden").de[NOMINATIVE] == "der Garten"


ME, YOU, HE, SHE, WE, THEY = PRONOUNS.values()
TIME = {"fronted": True}


# One row a construction: (clause, order of the German clause, English, German); a question asks both.
@pytest.mark.parametrize(
    ("said", "order", "english", "german"),
    [
        # accusative objects, separable verbs
        (
            clause(HE, VERBS["sehen"], accusative=the("the big dog")),
            "main",
            "he sees the big dog",
            "er sieht den großen Hund",
        ),
        (
            clause(YOU, VERBS["abholen"], accusative=the("the child")),
            "main",
            "you pick up the child",
            "du holst das Kind ab",
        ),
        (clause(SHE, VERBS["abholen"], accusative=HE), "main", "she picks him up", "sie holt ihn ab"),
        (clause(WE, VERBS["suchen"], accusative=HE), "main", "we look for him", "wir suchen ihn"),
        (clause(WE, VERBS["aufstehen"], "want"), "main", "we want to get up", "wir wollen aufstehen"),
        (clause(SHE, VERBS["aufstehen"]), "verb last", "she gets up", "sie aufsteht"),
        # verb second with something in front
        (
            clause(SHE, VERBS["lesen"], accusative=the("a letter"), time=("today", "heute"), **TIME),
            "main",
            "today she reads a letter",
            "heute liest sie einen Brief",
        ),
        (
            clause(ME, VERBS["kaufen"], "past", accusative=the("a hat"), time=("yesterday", "gestern"), **TIME),
            "main",
            "yesterday I bought a hat",
            "gestern habe ich einen Hut gekauft",
        ),
        (
            clause(WE, VERBS["arbeiten"], negated=True, time=("now", "jetzt"), **TIME),
            "main",
            "now we don't work",
            "jetzt arbeiten wir nicht",
        ),
        # perfect with haben and sein
        (
            clause(THEY, VERBS["gehen"], "past", rest=relation("to", "zu", DATIVE, the("the station"))),
            "main",
            "they went to the station",
            "sie sind zum Bahnhof gegangen",
        ),
        (
            clause(
                SHE,
                VERBS["trinken"],
                "perfect",
                accusative=noun_phrase("the", WORDS["milk"], mass=True),
                adverb="already",
            ),
            "main",
            "she has already drunk the milk",
            "sie hat die Milch schon getrunken",
        ),
        (
            clause(SHE, VERBS["schreiben"], "perfect", accusative=the("a poem"), adverb="already"),
            "main",
            "she has already written a poem",
            "sie hat schon ein Gedicht geschrieben",
        ),
        (
            clause(SHE, VERBS["schreiben"], "perfect", accusative=the("the poem"), negated=True),
            "main",
            "she hasn't written the poem yet",
            "sie hat das Gedicht noch nicht geschrieben",
        ),
        (
            clause(SHE, VERBS["schreiben"], "perfect", accusative=the("no poem"), negated=True),
            "main",
            "she hasn't written a poem yet",
            "sie hat noch kein Gedicht geschrieben",
        ),
        # subordinate clauses
        (
            clause(
                the("my friend"),
                VERBS["kommen"],
                "past",
                rest=relation("into", "in", ACCUSATIVE, the("the house")),
            ),
            "verb last",
            "my friend came into the house",
            "mein Freund ins Haus gekommen ist",
        ),
        (
            clause(HE, VERBS["öffnen"], "must", accusative=the("the suitcase")),
            "verb last",
            "he has to open the suitcase",
            "er den Koffer öffnen muss",
        ),
        (clause(ME, BE, rest=("tired", "müde")), "verb last", "I am tired", "ich müde bin"),
        # modal verbs
        (
            clause(ME, VERBS["helfen"], "can", dative=the("the old woman")),
            "main",
            "I can help the old woman",
            "ich kann der alten Frau helfen",
        ),
        (
            clause(HE, VERBS["einladen"], "would like", accusative=the("every guest")),
            "main",
            "he would like to invite every guest",
            "er möchte jeden Gast einladen",
        ),
        (
            clause(HE, VERBS["warten"], "had to", negated=True),
            "main",
            "he didn't have to wait",
            "er musste nicht warten",
        ),
        # kein and nicht
        (
            clause(SHE, HAVE, accusative=the("no brother"), negated=True),
            "main",
            "she doesn't have a brother",
            "sie hat keinen Bruder",
        ),
        (
            clause(SHE, HAVE, accusative=the("no brothers"), negated=True),
            "main",
            "she doesn't have any brothers",
            "sie hat keine Brüder",
        ),
        (
            clause(SHE, VERBS["kennen"], accusative=the("your boss"), negated=True),
            "main",
            "she doesn't know your boss",
            "sie kennt deinen Chef nicht",
        ),
        (
            clause(HE, BE, "past", rest=("hungry", "hungrig"), negated=True),
            "main",
            "he wasn't hungry",
            "er war nicht hungrig",
        ),
        (
            clause(ME, BE, rest=("rich", "reich"), negated=True),
            "main",
            "I am not rich",
            "ich bin nicht reich",
        ),
        (
            clause(ME, VERBS["warten"], rest=relation("for", "auf", ACCUSATIVE, the("the girl")), negated=True),
            "main",
            "I don't wait for the girl",
            "ich warte nicht auf das Mädchen",
        ),
        # two objects, pronouns before time
        (
            clause(
                HE,
                VERBS["geben"],
                "past",
                dative=the("the child"),
                accusative=the("a apple"),
                time=("yesterday", "gestern"),
            ),
            "main",
            "he gave the child an apple yesterday",
            "er hat gestern dem Kind einen Apfel gegeben",
        ),
        (
            clause(HE, VERBS["zeigen"], "will", dative=ME, accusative=the("his dog"), time=("tomorrow", "morgen")),
            "main",
            "he will show me his dog tomorrow",
            "er wird mir morgen seinen Hund zeigen",
        ),
        # two-way prepositions
        (
            clause(
                HE,
                VERBS["legen"],
                accusative=the("the book"),
                rest=relation("on", "auf", ACCUSATIVE, the("the table")),
            ),
            "main",
            "he lays the book on the table",
            "er legt das Buch auf den Tisch",
        ),
        (
            clause(the("the book"), VERBS["liegen"], rest=relation("under", "unter", DATIVE, the("the chairs"))),
            "main",
            "the book lies under the chairs",
            "das Buch liegt unter den Stühlen",
        ),
        (
            clause(the("a cat"), VERBS["schlafen"], rest=relation("in", "in", DATIVE, the("the old kitchen"))),
            "main",
            "a cat sleeps in the old kitchen",
            "eine Katze schläft in der alten Küche",
        ),
        # questions
        (
            clause(the("your sister"), VERBS["lesen"], accusative=the("the newspaper")),
            "verb first",
            "does your sister read the newspaper",
            "liest deine Schwester die Zeitung",
        ),
        (clause(YOU, VERBS["schwimmen"], "past"), "verb first", "did you swim", "bist du geschwommen"),
        (
            clause(THEY, BE, "past", rest=("happy", "glücklich")),
            "verb first",
            "were they happy",
            "waren sie glücklich",
        ),
        (
            clause(WHO, VERBS["stehlen"], "past", accusative=the("my bag")),
            "main",
            "who stole my bag",
            "wer hat meine Tasche gestohlen",
        ),
        # comparison, passive, adverbs of frequency
        (
            clause(HE, BE, rest=("older than the queen", "älter als die Königin")),
            "main",
            "he is older than the queen",
            "er ist älter als die Königin",
        ),
        (
            clause(the("the houses"), VERBS["bauen"], "passive", time=("in 1990", "im Jahr 1990")),
            "main",
            "the houses were built in 1990",
            "die Häuser wurden im Jahr 1990 gebaut",
        ),
        (clause(THEY, VERBS["singen"], adverb="often"), "main", "they often sing", "sie singen oft"),
        (
            clause(SHE, BE, rest=("lazy", "faul"), adverb="never"),
            "main",
            "she is never lazy",
            "sie ist nie faul",
        ),
    ],
)
def test_sentences_have_the_word_order_of_both_languages(said: Clause, order: str, english: str, german: str) -> None:
    assert said.english(question=order == "verb first") == english
    assert said.german(order) == german
