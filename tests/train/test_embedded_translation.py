"""The embedded corpus: its splits, and the grammar of both its languages."""

from __future__ import annotations

import datetime
import hashlib
import re
import subprocess
import sys

import pytest
from tritonsparse.train import german as de
from tritonsparse.train.embedded_translation import (
    PRONOUNS,
    WHO,
    NounPhrase,
    cardinal,
    clause,
    clock,
    date,
    digits,
    generate,
    noun_phrase,
    ordinal,
    relation,
)
from tritonsparse.train.german import ACCUSATIVE, DATIVE, NOMINATIVE

NOUNS = {noun.en: noun for nouns in de.NOUNS.values() for noun in nouns}
VERBS = {
    verb.infinitive: verb
    for verbs in (
        *de.TRANSITIVE.values(),
        *de.PREPOSITIONAL_VERBS.values(),
        de.DATIVE_VERBS,
        de.DITRANSITIVE,
        de.MOTION,
        de.PUT,
        de.STAND,
        de.ACTIVITIES,
        de.EVENTS,
        de.ANIMAL_ACTIVITIES,
        (de.BE, de.HAVE, de.COST, de.WEIGH),
    )
    for verb in verbs
}


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[tuple[str, str]]]:
    return generate(sizes={"train": 6000, "validation": 120, "test": 120})


def the(words: str, **options: object) -> NounPhrase:
    """ "my old dog" or "these dogs" (a plural is found by the noun's form) as a noun phrase."""
    article, *middle, last = words.split()
    plural = last not in NOUNS
    noun = next(n for n in NOUNS.values() if last in (n.en, n.en_plural))
    adjective = de.ADJECTIVES[middle[0]] if middle else None
    return noun_phrase("this" if article == "these" else article, noun, adjective, plural, **options)


def test_default_sizes_are_filled_with_distinct_sentences_that_no_two_splits_share() -> None:
    made = generate()
    assert {split: len(pairs) for split, pairs in made.items()} == {
        "train": 40_000,
        "validation": 500,
        "test": 500,
    }
    for side in (0, 1):
        sentences = [pair[side] for pairs in made.values() for pair in pairs]
        assert len(set(sentences)) == len(sentences) == 41_000


def test_no_sentence_of_one_seed_s_test_split_is_in_another_seed_s_train_split(
    corpus: dict[str, list[tuple[str, str]]],
) -> None:
    other = generate(seed=1, sizes={"test": 200, "validation": 200})
    for side in (0, 1):
        train = {pair[side] for pair in corpus["train"]}
        assert not any(pair[side] in train for pairs in other.values() for pair in pairs)


def test_a_smaller_split_is_the_beginning_of_a_larger_one(corpus: dict[str, list[tuple[str, str]]]) -> None:
    small = generate(sizes={"train": 50, "test": 7})
    assert small == {"train": corpus["train"][:50], "test": corpus["test"][:7]}


def test_the_corpus_is_equal_in_a_process_with_other_hashes(corpus: dict[str, list[tuple[str, str]]]) -> None:
    program = (
        "import hashlib; from tritonsparse.train.embedded_translation import generate; "
        "print(hashlib.sha256(repr(generate(sizes={'train': 300})).encode()).hexdigest())"
    )
    for hash_seed in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        here = hashlib.sha256(repr({"train": corpus["train"][:300]}).encode()).hexdigest()
        assert printed.stdout.strip() == here
    assert generate(seed=1, sizes={"train": 50})["train"] != corpus["train"][:50]


@pytest.mark.parametrize(
    ("sizes", "words"), [({"dev": 3}, "train, validation, test"), ({"train": -1}, "at least 0")]
)
def test_sizes_that_cannot_be_are_an_error(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(sizes=sizes)


def test_every_pair_is_written_naturally(corpus: dict[str, list[tuple[str, str]]]) -> None:
    for english, german in corpus["train"]:
        for text in (english, german):
            assert text == text.strip() and "  " not in text and " ," not in text and "None" not in text
        assert english[-1] == german[-1] or not english[0].isupper()  # phrases and prices end as they may
        assert not re.search(r"\b(a [aeio]|an [^aeiou])", english), english
        assert not re.search(r"\b(in dem|in das|zu dem|zu der|von dem|an dem)\b", german), german
        if english[-1] in ".?":
            assert german[0].isupper() or german[0].isdigit()


def test_the_corpus_shows_several_hundred_stems_in_each_construction(
    corpus: dict[str, list[tuple[str, str]]],
) -> None:
    german = " ".join(pair[1] for pair in corpus["train"])
    for mark in (
        "weil",
        "dass",
        "wenn",
        "ob",
        "obwohl",
        "nicht",
        "kein",
        "als",
        "im",
        "zum",
        "zur",
        "halb",
        "Viertel",
        "gibt es",
        "Wer",
        "Warum",
        "wurde",
        "schon",
        "noch nicht",
        "möchte",
        "statt",
    ):
        assert re.search(rf"\b{mark}\b", german), mark
    assert len(NOUNS) + len(VERBS) + len(de.ADJECTIVES) > 350


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
    water = noun_phrase("", NOUNS["water"], de.ADJECTIVES["cold"], mass=True)
    assert (water.en, water.de) == ("cold water", ("kaltes Wasser", "kaltes Wasser", "kaltem Wasser"))
    soup = noun_phrase("no", NOUNS["soup"], de.ADJECTIVES["hot"], mass=True)
    assert (soup.en, soup.de[ACCUSATIVE]) == ("any hot soup", "keine heiße Suppe")
    dogs = noun_phrase("", NOUNS["dog"], de.ADJECTIVES["black"], plural=True, count=("three", "drei"))
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


# infinitive: ich, du, er, participle (with its auxiliary in the third person)
@pytest.mark.parametrize(
    ("infinitive", "forms"),
    [
        ("kaufen", "kaufe kaufst kauft hat gekauft"),
        ("arbeiten", "arbeite arbeitest arbeitet hat gearbeitet"),
        ("öffnen", "öffne öffnest öffnet hat geöffnet"),
        ("tanzen", "tanze tanzt tanzt hat getanzt"),
        ("sehen", "sehe siehst sieht hat gesehen"),
        ("lesen", "lese liest liest hat gelesen"),
        ("essen", "esse isst isst hat gegessen"),
        ("schlafen", "schlafe schläfst schläft hat geschlafen"),
        ("helfen", "helfe hilfst hilft hat geholfen"),
        ("einladen", "lade lädst lädt hat eingeladen"),
        ("behalten", "behalte behältst behält hat behalten"),
        ("wandern", "wandere wanderst wandert ist gewandert"),
        ("bügeln", "bügle bügelst bügelt hat gebügelt"),
        ("reparieren", "repariere reparierst repariert hat repariert"),
        ("besuchen", "besuche besuchst besucht hat besucht"),
        ("aufstehen", "stehe stehst steht ist aufgestanden"),
        ("anbieten", "biete bietest bietet hat angeboten"),
        ("zuhören", "höre hörst hört hat zugehört"),
        ("umarmen", "umarme umarmst umarmt hat umarmt"),
        ("folgen", "folge folgst folgt ist gefolgt"),
        ("beten", "bete betest betet hat gebetet"),
        ("anprobieren", "probiere probierst probiert hat anprobiert"),
        ("gehen", "gehe gehst geht ist gegangen"),
        ("vergessen", "vergesse vergisst vergisst hat vergessen"),
        ("sein", "bin bist ist ist gewesen"),
        ("haben", "habe hast hat hat gehabt"),
    ],
)
def test_verbs_are_conjugated(infinitive: str, forms: str) -> None:
    verb = VERBS[infinitive]
    assert " ".join((*verb.present[:3], verb.perfect[de.ER], verb.participle)) == forms


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
            clause(
                ME, VERBS["kaufen"], "past", accusative=the("a hat"), time=("yesterday", "gestern"), **TIME
            ),
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
                accusative=noun_phrase("the", NOUNS["milk"], mass=True),
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
        (clause(ME, de.BE, rest=("tired", "müde")), "verb last", "I am tired", "ich müde bin"),
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
            clause(SHE, de.HAVE, accusative=the("no brother"), negated=True),
            "main",
            "she doesn't have a brother",
            "sie hat keinen Bruder",
        ),
        (
            clause(SHE, de.HAVE, accusative=the("no brothers"), negated=True),
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
            clause(HE, de.BE, "past", rest=("hungry", "hungrig"), negated=True),
            "main",
            "he wasn't hungry",
            "er war nicht hungrig",
        ),
        (
            clause(ME, de.BE, rest=("rich", "reich"), negated=True),
            "main",
            "I am not rich",
            "ich bin nicht reich",
        ),
        (
            clause(
                ME, VERBS["warten"], rest=relation("for", "auf", ACCUSATIVE, the("the girl")), negated=True
            ),
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
            clause(
                HE, VERBS["zeigen"], "will", dative=ME, accusative=the("his dog"), time=("tomorrow", "morgen")
            ),
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
            clause(
                the("the book"), VERBS["liegen"], rest=relation("under", "unter", DATIVE, the("the chairs"))
            ),
            "main",
            "the book lies under the chairs",
            "das Buch liegt unter den Stühlen",
        ),
        (
            clause(
                the("a cat"), VERBS["schlafen"], rest=relation("in", "in", DATIVE, the("the old kitchen"))
            ),
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
            clause(THEY, de.BE, "past", rest=("happy", "glücklich")),
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
            clause(HE, de.BE, rest=("older than the queen", "älter als die Königin")),
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
            clause(SHE, de.BE, rest=("lazy", "faul"), adverb="never"),
            "main",
            "she is never lazy",
            "sie ist nie faul",
        ),
    ],
)
def test_sentences_have_the_word_order_of_both_languages(
    said: object, order: str, english: str, german: str
) -> None:
    assert said.english(question=order == "verb first") == english  # type: ignore[attr-defined]
    assert said.german(order) == german  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("adjective", "english", "german"),
    [
        ("good", "better", "besser"),
        ("old", "older", "älter"),
        ("big", "bigger", "größer"),
        ("tired", "more tired", "müder"),
        ("expensive", "more expensive", "teurer"),
        ("poor", "poorer", "ärmer"),
        ("dark", "darker", "dunkler"),
    ],
)
def test_comparatives(adjective: str, english: str, german: str) -> None:
    found = de.ADJECTIVES[adjective]
    assert (found.en_comparative, found.de_comparative) == (english, german)


@pytest.mark.parametrize(
    ("n", "english", "german"),
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (12, "twelve", "zwölf"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (20, "twenty", "zwanzig"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (66, "sixty-six", "sechsundsechzig"),
        (77, "seventy-seven", "siebenundsiebzig"),
        (101, "one hundred and one", "einhunderteins"),
        (700, "seven hundred", "siebenhundert"),
        (1001, "one thousand and one", "eintausendeins"),
        (21_000, "twenty-one thousand", "einundzwanzigtausend"),
        (101_101, "one hundred and one thousand one hundred and one", "einhunderteintausendeinhunderteins"),
        (
            345_678,
            "three hundred and forty-five thousand six hundred and seventy-eight",
            "dreihundertfünfundvierzigtausendsechshundertachtundsiebzig",
        ),
    ],
)
def test_number_words(n: int, english: str, german: str) -> None:
    assert (cardinal(n), de.cardinal(n)) == (english, german)


def _read_german(word: str) -> int:
    """The number a German word says, by splitting and adding; shares nothing with what wrote it."""
    if "tausend" in word:
        head, tail = word.split("tausend")
        return 1000 * _read_german(head) + (_read_german(tail) if tail else 0)
    if "hundert" in word:
        head, tail = word.split("hundert")
        return 100 * _read_german(head) + (_read_german(tail) if tail else 0)
    units = {
        "ein": 1,
        "eins": 1,
        "zwei": 2,
        "drei": 3,
        "vier": 4,
        "fünf": 5,
        "sechs": 6,
        "sieben": 7,
        "acht": 8,
        "neun": 9,
    }
    other = {
        "null": 0,
        "zehn": 10,
        "elf": 11,
        "zwölf": 12,
        "sechzehn": 16,
        "siebzehn": 17,
        "zwanzig": 20,
        "dreißig": 30,
        "vierzig": 40,
        "fünfzig": 50,
        "sechzig": 60,
        "siebzig": 70,
        "achtzig": 80,
        "neunzig": 90,
    }
    if word in units or word in other:
        return {**units, **other}[word]
    if "und" in word:
        head, tail = word.split("und")
        assert head != "eins"
        return units[head] + other[tail]
    return units[word.removesuffix("zehn")] + 10


def test_german_number_words_say_their_number() -> None:
    numbers = [*range(2200), *range(2200, 1_000_000, 487), 999_999]
    words = [de.cardinal(n) for n in numbers]
    assert [_read_german(word) for word in words] == numbers
    # "eins" only at the end, and only where the number ends in 01
    assert all(word.endswith("eins") == (n % 100 == 1) for n, word in zip(numbers, words, strict=True))
    assert not any("eins" in word[:-4] for word in words)


@pytest.mark.parametrize(
    ("n", "english", "german"),
    [
        (1, "first", "erst"),
        (3, "third", "dritt"),
        (7, "seventh", "siebt"),
        (8, "eighth", "acht"),
        (19, "nineteenth", "neunzehnt"),
        (20, "twentieth", "zwanzigst"),
        (21, "twenty-first", "einundzwanzigst"),
        (100, "one hundredth", "einhundertst"),
        (101, "one hundred and first", "einhunderterst"),
        (112, "one hundred and twelfth", "einhundertzwölft"),
    ],
)
def test_ordinals(n: int, english: str, german: str) -> None:
    assert (ordinal(n), de.ordinal(n)) == (english, german)


def test_figures_swap_point_and_comma() -> None:
    assert digits(1_234_567, 2) == ("12,345.67", "12.345,67")
    assert digits(5, 1) == ("0.5", "0,5") and digits(1234) == ("1,234", "1.234")


@pytest.mark.parametrize(
    ("hour", "minute", "english", "german"),
    [
        (3, 30, "half past three", "halb vier"),
        (12, 30, "half past twelve", "halb eins"),
        (1, 0, "one o'clock", "ein Uhr"),
        (4, 45, "a quarter to five", "Viertel vor fünf"),
        (1, 15, "a quarter past one", "Viertel nach eins"),
        (3, 25, "twenty-five past three", "fünf vor halb vier"),
        (3, 35, "twenty-five to four", "fünf nach halb vier"),
        (12, 50, "ten to one", "zehn vor eins"),
        (6, 10, "ten past six", "zehn nach sechs"),
    ],
)
def test_times_of_day(hour: int, minute: int, english: str, german: str) -> None:
    assert clock(hour, minute) == (english, german)


def test_dates_name_the_right_day_of_the_week() -> None:
    assert date(datetime.date(1987, 3, 14)) == ("14 March 1987", "14. März 1987")
    months = [
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
    ]
    days = ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"]
    checked = 0
    for english, german in generate(sizes={"train": 6000})["train"]:
        if match := re.search(r"(\w+tag|Mittwoch), de[mr] (\d+)\. (\w+) (\d{4})", german):
            name, day, month, year = match.groups()
            when = datetime.date(int(year), months.index(month) + 1, int(day))
            assert days[when.weekday()] == name, german
            assert when.strftime("%A").lower() in english.lower()
            checked += 1
    assert checked > 20


def test_years_are_spoken_in_hundreds() -> None:
    assert de.year(1987) == "neunzehnhundertsiebenundachtzig" and de.year(1905) == "neunzehnhundertfünf"
    assert de.year(2024) == "zweitausendvierundzwanzig"


def test_prepositions_contract_only_with_the_article() -> None:
    assert relation("in", "in", DATIVE, the("the garden"))[1] == "im Garten"
    assert relation("to", "zu", DATIVE, the("the old school"))[1] == "zur alten Schule"
    assert relation("in", "in", DATIVE, the("our garden"))[1] == "in unserem Garten"
    assert relation("from", "von", DATIVE, the("the houses"))[1] == "von den Häusern"
    assert the("the garden").de[NOMINATIVE] == "der Garten"
