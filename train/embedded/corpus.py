"""The embedded English-German corpus: sentences made by a small grammar of both languages, without a network.

Every sentence is built once as a meaning (a `Clause` of noun phrases, a verb, a tense, an adverbial) and
spoken in both languages: German gender, case, word order and separable prefixes are all there to learn.

The splits are disjoint by construction. A checksum assigns every *sentence*, English or German, to a split;
a pair whose two sides are assigned differently is thrown away. A sentence therefore occurs in one split only,
on either side, for every seed and size. Sizes nest: a smaller split is the beginning of a larger one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from .draws import Draw
from .figure_sentences import FIGURE_SENTENCES
from .sentences import SENTENCES

Pair = tuple[str, str]

DEFAULT_SIZES = {"train": 40_000, "validation": 500, "test": 500}
# Draws in a row that may bring nothing new before the grammar counts as exhausted.
_PATIENCE = 50_000
_ASSIGNED = {0: "test", 1: "validation"}
_KINDS_OF_SENTENCE = (*SENTENCES, *FIGURE_SENTENCES)


def generate(seed: int = 0, sizes: Mapping[str, int] | None = None) -> dict[str, list[Pair]]:
    """(English, German) pairs by split; within a split no sentence occurs twice, on either side.

    Args:
        seed: Any integer; equal seeds give equal corpora in every process and Python version.
        sizes: Pairs per split, of "train", "validation", "test"; a missing split is left out.

    Raises:
        ValueError: An unknown split, a negative size, or more pairs than the grammar can make.

    >>> generate(sizes={"test": 1})
    {'test': [("In the morning our school isn't dirty.", 'Am Morgen ist unsere Schule nicht schmutzig.')]}
    """
    sizes = DEFAULT_SIZES if sizes is None else sizes
    for split, size in sizes.items():
        if split not in DEFAULT_SIZES or size < 0:
            raise ValueError(
                f"generate: expected sizes of at least 0 for splits named {', '.join(DEFAULT_SIZES)}, "
                f"got {split!r}: {size}; correct that entry of sizes"
            )
    draw = Draw(seed)
    pairs: dict[str, list[Pair]] = {split: [] for split in sizes}
    seen_english: set[str] = set()
    seen_german: set[str] = set()
    missing, idle = sum(sizes.values()), 0
    while missing:
        english, german = draw.pick(_KINDS_OF_SENTENCE)(draw)
        split, idle = _split(english), idle + 1
        wanted = split in pairs and len(pairs[split]) < sizes[split] and split == _split(german)
        if wanted and english not in seen_english and german not in seen_german:
            seen_english.add(english)
            seen_german.add(german)
            pairs[split].append((english, german))
            missing, idle = missing - 1, 0
        if idle > _PATIENCE:
            counts = ", ".join(f"{name} {len(found):,}" for name, found in pairs.items())
            raise ValueError(
                f"generate: expected sizes the grammar can fill ({counts}), got {dict(sizes)}; ask for fewer"
            )
    return pairs


def _split(sentence: str) -> str:
    # One in eleven, not one in a hundred: a held-out pair needs both of its sides to fall there.
    return _ASSIGNED.get(zlib.crc32(sentence.encode()) % 11, "train")
