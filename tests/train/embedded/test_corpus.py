"""The embedded corpus: its splits, its digest, what every pair looks like, and the figures in it in words."""

from __future__ import annotations

import datetime
import hashlib
import re

import pytest

from tritonsparse.train.embedded import german as de
from tritonsparse.train.embedded.corpus import generate
from tritonsparse.train.embedded.english import cardinal, ordinal
from tritonsparse.train.embedded.figures import clock, date, digits

# SHA-256 of repr(generate()): seed 0, default sizes.
DIGEST = "90813cb6b7a4c59d54863127808ff03196745f3bb0a8a066b832278039efae6f"
MONTHS = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember"
DAYS = "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag"
MARKS = "weil dass wenn ob obwohl nicht kein als im zum zur halb Viertel Wer Warum wurde schon möchte statt"
Corpus = dict[str, list[tuple[str, str]]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return generate()


def test_default_sizes_are_filled_with_distinct_sentences_that_no_two_splits_share(corpus: Corpus) -> None:
    """The digest sees a change of the corpus that nobody meant: measured results name this corpus."""
    assert hashlib.sha256(repr(corpus).encode()).hexdigest() == DIGEST
    assert {split: len(pairs) for split, pairs in corpus.items()} == {"train": 40_000, "validation": 500, "test": 500}
    for side in (0, 1):
        sentences = [pair[side] for pairs in corpus.values() for pair in pairs]
        assert len(set(sentences)) == len(sentences) == 41_000
    # A smaller split is the beginning of a larger one.
    small = generate(sizes={"train": 50, "test": 7})
    assert small == {"train": corpus["train"][:50], "test": corpus["test"][:7]}
    for sizes, words in (({"dev": 3}, "train, validation, test"), ({"train": -1}, "at least 0")):
        with pytest.raises(ValueError, match=words):
            generate(sizes=sizes)


def test_no_sentence_of_one_seed_s_test_split_is_in_another_seed_s_train_split(corpus: Corpus) -> None:
    other = generate(seed=1, sizes={"test": 200, "validation": 200})
    assert other["test"] != corpus["test"][:200]
    for side in (0, 1):
        train = {pair[side] for pair in corpus["train"]}
        assert not any(pair[side] in train for pairs in other.values() for pair in pairs)


def test_every_pair_is_written_naturally_and_all_of_them_show_each_construction(corpus: Corpus) -> None:
    for english, german in corpus["train"]:
        for text in (english, german):
            assert text == text.strip() and "  " not in text and " ," not in text and "None" not in text
        assert english[-1] == german[-1] or not english[0].isupper()  # phrases and prices end as they may
        assert not re.search(r"\b(a [aeio]|an [^aeiou])", english), english
        assert not re.search(r"\b(in dem|in das|zu dem|zu der|von dem|an dem)\b", german), german
        if english[-1] in ".?":
            assert german[0].isupper() or german[0].isdigit()
    german = " ".join(pair[1] for pair in corpus["train"][:6000])
    for mark in (*MARKS.split(), "gibt es", "noch nicht"):
        assert re.search(rf"\b{mark}\b", german), mark


def test_dates_name_the_right_day_of_the_week(corpus: Corpus) -> None:
    checked = 0
    for english, german in corpus["train"]:
        if match := re.search(r"(\w+tag|Mittwoch), de[mr] (\d+)\. (\w+) (\d{4})", german):
            name, day, month, year = match.groups()
            when = datetime.date(int(year), MONTHS.split().index(month) + 1, int(day))
            assert DAYS.split()[when.weekday()] == name, german
            assert when.strftime("%A").lower() in english.lower()
            checked += 1
    assert checked > 20


CARDINALS = [
    (0, "zero", "null"), (1, "one", "eins"), (12, "twelve", "zwölf"), (16, "sixteen", "sechzehn"),
    (17, "seventeen", "siebzehn"), (20, "twenty", "zwanzig"), (21, "twenty-one", "einundzwanzig"),
    (30, "thirty", "dreißig"), (66, "sixty-six", "sechsundsechzig"), (77, "seventy-seven", "siebenundsiebzig"),
    (101, "one hundred and one", "einhunderteins"), (700, "seven hundred", "siebenhundert"),
    (1001, "one thousand and one", "eintausendeins"), (21_000, "twenty-one thousand", "einundzwanzigtausend"),
    (101_101, "one hundred and one thousand one hundred and one", "einhunderteintausendeinhunderteins"),
    (345_678, "three hundred and forty-five thousand six hundred and seventy-eight",
     "dreihundertfünfundvierzigtausendsechshundertachtundsiebzig"),
]  # fmt: skip
ORDINALS = [
    (1, "first", "erst"), (3, "third", "dritt"), (7, "seventh", "siebt"), (8, "eighth", "acht"),
    (19, "nineteenth", "neunzehnt"), (20, "twentieth", "zwanzigst"), (21, "twenty-first", "einundzwanzigst"),
    (100, "one hundredth", "einhundertst"), (101, "one hundred and first", "einhunderterst"),
    (112, "one hundred and twelfth", "einhundertzwölft"),
]  # fmt: skip
TIMES = [
    (3, 30, "half past three", "halb vier"), (12, 30, "half past twelve", "halb eins"),
    (1, 0, "one o'clock", "ein Uhr"), (4, 45, "a quarter to five", "Viertel vor fünf"),
    (1, 15, "a quarter past one", "Viertel nach eins"), (12, 50, "ten to one", "zehn vor eins"),
    (3, 25, "twenty-five past three", "fünf vor halb vier"), (6, 10, "ten past six", "zehn nach sechs"),
    (3, 35, "twenty-five to four", "fünf nach halb vier"),
]  # fmt: skip


def test_numbers_ordinals_and_times_of_day_in_words() -> None:
    for n, *words in CARDINALS:
        assert [cardinal(n), de.cardinal(n)] == words
    for n, *words in ORDINALS:
        assert [ordinal(n), de.ordinal(n)] == words
    for hour, minute, *said in TIMES:
        assert list(clock(hour, minute)) == said


ONES = "eins zwei drei vier fünf sechs sieben acht neun"
TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"
UNITS = {word: n for n, word in enumerate(ONES.split(), 1)} | {"ein": 1}
OTHERS = {"null": 0, "zehn": 10, "elf": 11, "zwölf": 12, "sechzehn": 16, "siebzehn": 17}


def _read_german(word: str) -> int:
    """The number a German word says, by splitting and adding; shares nothing with what wrote it."""
    for power, name in ((1000, "tausend"), (100, "hundert")):
        if name in word:
            head, tail = word.split(name)
            return power * _read_german(head) + (_read_german(tail) if tail else 0)
    known = UNITS | OTHERS | {word: 10 * n for n, word in enumerate(TENS.split(), 2)}
    if word in known:
        return known[word]
    if "und" in word:
        head, tail = word.split("und")
        assert head != "eins"
        return UNITS[head] + known[tail]
    return UNITS[word.removesuffix("zehn")] + 10


def test_german_number_words_say_their_number() -> None:
    numbers = [*range(2200), *range(2200, 1_000_000, 487), 999_999]
    words = [de.cardinal(n) for n in numbers]
    assert [_read_german(word) for word in words] == numbers
    # "eins" only at the end, and only where the number ends in 01
    assert all(word.endswith("eins") == (n % 100 == 1) for n, word in zip(numbers, words, strict=True))
    assert not any("eins" in word[:-4] for word in words)


def test_years_figures_and_dates_are_written_as_each_language_does() -> None:
    assert de.year(1987) == "neunzehnhundertsiebenundachtzig" and de.year(1905) == "neunzehnhundertfünf"
    assert de.year(2024) == "zweitausendvierundzwanzig"
    assert digits(1_234_567, 2) == ("12,345.67", "12.345,67")
    assert digits(5, 1) == ("0.5", "0,5") and digits(1234) == ("1,234", "1.234")
    assert date(datetime.date(1987, 3, 14)) == ("14 March 1987", "14. März 1987")
