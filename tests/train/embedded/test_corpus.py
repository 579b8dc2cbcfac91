"""The embedded corpus: its splits, its digest, and what every pair looks like."""

from __future__ import annotations

import datetime
import hashlib
import re

import pytest

from tritonsparse.train.embedded.corpus import generate

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


def test_no_sentence_of_one_seed_s_test_split_is_in_another_seed_s_train_split(corpus: Corpus) -> None:
    other = generate(seed=1, sizes={"test": 200, "validation": 200})
    assert other["test"] != corpus["test"][:200]
    for side in (0, 1):
        train = {pair[side] for pair in corpus["train"]}
        assert not any(pair[side] in train for pairs in other.values() for pair in pairs)


def test_a_smaller_split_is_the_beginning_of_a_larger_one(corpus: Corpus) -> None:
    small = generate(sizes={"train": 50, "test": 7})
    assert small == {"train": corpus["train"][:50], "test": corpus["test"][:7]}


@pytest.mark.parametrize(("sizes", "words"), [({"dev": 3}, "train, validation, test"), ({"train": -1}, "at least 0")])
def test_sizes_that_cannot_be_are_an_error(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(sizes=sizes)


def test_every_pair_is_written_naturally(corpus: Corpus) -> None:
    for english, german in corpus["train"]:
        for text in (english, german):
            assert text == text.strip() and "  " not in text and " ," not in text and "None" not in text
        assert english[-1] == german[-1] or not english[0].isupper()  # phrases and prices end as they may
        assert not re.search(r"\b(a [aeio]|an [^aeiou])", english), english
        assert not re.search(r"\b(in dem|in das|zu dem|zu der|von dem|an dem)\b", german), german
        if english[-1] in ".?":
            assert german[0].isupper() or german[0].isdigit()


def test_the_corpus_shows_each_construction(corpus: Corpus) -> None:
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
