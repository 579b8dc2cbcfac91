"""Word-level vocabulary with the counting rules of the Transformer-XL papers, kept as text.

Lines are stripped and split at whitespace; `<eos>` ends each, an empty one too; nothing is lower-cased. Id 0 is
`<eos>`; the other types follow by falling count over the training text, ties in order of first appearance
(WikiText-103: 267,735 types, `<unk>` being one of them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["EOS", "UNKNOWN", "Vocabulary"]

EOS, UNKNOWN = "<eos>", "<unk>"


class Vocabulary:
    """words: every type, by id."""

    def __init__(self, words: Sequence[str]) -> None:
        if not words or words[0] != EOS:
            raise ValueError(
                f"Vocabulary: expected {EOS} as the first word, got {words[0] if words else 'no words'!r}; "
                f"build it with Vocabulary.count"
            )
        self.words = list(words)
        self.ids = {word: number for number, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"Vocabulary: expected every word once, got {twice!r} twice; correct the list")

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def count(cls, lines: Iterable[str], min_count: int = 1) -> Vocabulary:
        """The vocabulary of a training text.

        Args:
            lines: the text.
            min_count: words that occur less often become `<unk>`, which is then a type whatever the text holds.
                WikiText has been through this with 3, so it takes 1.

        Raises:
            ValueError: min_count is below 1.
        """
        if min_count < 1:
            raise ValueError(f"Vocabulary.count: expected min_count of at least 1, got {min_count}; 1 keeps every word")
        counts: Counter[str] = Counter()
        for line in lines:
            counts.update(line.split())
        counts.pop(EOS, None)
        if min_count > 1:
            rare = {word: count for word, count in counts.items() if count < min_count and word != UNKNOWN}
            counts.subtract(rare)
            counts[UNKNOWN] += sum(rare.values())
            for word in rare:
                del counts[word]
        # sorted is stable: equal counts keep the order in which the words first came.
        return cls([EOS, *sorted(counts, key=lambda word: -counts[word])])

    def encode(self, lines: Iterable[str]) -> NDArray[np.int32]:
        """Ids of the lines end to end, int32.

        Raises:
            ValueError: a word is not in the vocabulary, which has no `<unk>` to take its place.
        """
        unknown = self.ids.get(UNKNOWN)
        result: list[int] = []
        for number, line in enumerate(lines, start=1):
            for word in line.split():
                found = self.ids.get(word, unknown)
                if found is None:
                    raise ValueError(
                        f"Vocabulary.encode: expected words of the vocabulary ({len(self)} types without "
                        f"{UNKNOWN}), got {word!r} in line {number}; encode the text it was counted on, or count "
                        f"it with a min_count of 2 or more, which adds {UNKNOWN}"
                    )
                result.append(found)
            result.append(0)
        return np.asarray(result, dtype=np.int32)

    def save(self, path: str | Path) -> None:
        """One word a line, UTF-8."""
        Path(path).write_text("".join(f"{word}\n" for word in self.words), encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """What `save` wrote.

        Raises:
            ValueError: the file is no such list.
        """
        # Not splitlines(): words may hold characters that Unicode counts as line ends.
        text = Path(path).read_text(encoding="utf-8")
        return cls(text.removesuffix("\n").split("\n"))
