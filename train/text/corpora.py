"""Parallel text from wherever it is: the embedded corpus, the Hugging Face hub, or local files.

Local files need no `datasets`; see `parallel_files`. Every source gives (source, target) pairs in its order.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from ..embedded.corpus import DEFAULT_SIZES, generate
from .parallel_files import Pair, read_pairs, sides
from .source import EMBEDDED, TextSource, load_hub

__all__ = ["load_parallel"]

logger = logging.getLogger(__name__)


def load_parallel(
    source: TextSource, source_lang: str = "en", target_lang: str = "de", max_train_samples: int | None = None
) -> dict[str, list[Pair]]:
    """(source, target) pairs by split: "train", and "validation" and "test" where the source has them.

    Args:
        source: A configuration of a dataset that is a language pair may be named in either order. A local file of
            parallel text is named by one of its two files ("train.en.gz"), their common beginning ("dir/train"), or
            as "a.en,a.de".
        source_lang, target_lang: Language codes; of "en_XX" the part before "_" counts.
        max_train_samples: Keep the first so many pairs of train.

    Raises:
        ValueError: No source or two, an unreadable or malformed file, a missing language, an unknown dataset, no
            train split.
        FileNotFoundError: A file, or the other half of parallel text, does not exist.
    """
    left, right = source_lang.split("_")[0], target_lang.split("_")[0]
    source.check("load_parallel")
    if source.dataset == EMBEDDED:
        splits = _embedded(left, right, max_train_samples)
    elif source.dataset:
        splits = _hub(source, left, right, max_train_samples)
    else:
        splits = {}
        for split, path in source.files.items():
            pairs = _stripped(read_pairs(path, left, right), path)
            splits[split] = list(islice(pairs, max_train_samples if split == "train" else None))
            if not splits[split]:
                raise ValueError(
                    f"load_parallel: expected sentence pairs in {path}, got none with text on both sides; "
                    "give a file that is not empty"
                )
    if "train" not in splits:
        raise ValueError(
            f"load_parallel: expected a train split, got only {', '.join(splits)}; give --train_file, "
            "or a dataset that has one"
        )
    return splits


def _embedded(source: str, target: str, max_train_samples: int | None) -> dict[str, list[Pair]]:
    if {source, target} != {"en", "de"}:
        raise ValueError(
            f"load_parallel: expected en-de or de-en for dataset_name 'embedded', got {source}-{target}; "
            "give --train_file and --validation_file for another pair of languages"
        )
    sizes = dict(DEFAULT_SIZES)
    if max_train_samples is not None:
        sizes["train"] = min(sizes["train"], max_train_samples)
    # Not the run's seed, which would draw other test sentences too.
    made = generate(seed=0, sizes=sizes)
    return made if source == "en" else {split: [(de, en) for en, de in pairs] for split, pairs in made.items()}


def _stripped(pairs: Iterable[Pair], name: str) -> Iterator[Pair]:
    """Pairs without surrounding blanks; those with an empty side are dropped, and counted in the log."""
    dropped = 0
    for left, right in pairs:
        left, right = left.strip(), right.strip()
        if left and right:
            yield left, right
        else:
            dropped += 1
    if dropped:
        logger.warning("load_parallel: dropped %d pairs of %s with an empty side", dropped, name)


def _hub(source: TextSource, left: str, right: str, max_train_samples: int | None) -> dict[str, list[Pair]]:
    alternatives = []
    if source.configuration is None:
        alternatives = [f"{left}-{right}", f"{right}-{left}"]
    elif match := re.fullmatch(r"([A-Za-z]+)([-_])([A-Za-z]+)", source.configuration):
        alternatives = [f"{match[3]}{match[2]}{match[1]}"]
    splits = {}
    for split, rows in load_hub("load_parallel", source, alternatives).items():
        pairs = _stripped(_dataset_rows(rows, str(source.dataset), left, right), f"{source.dataset} {split}")
        splits[split] = list(islice(pairs, max_train_samples if split == "train" else None))
    return splits


def _dataset_rows(rows: Any, name: str, source: str, target: str) -> Iterator[Pair]:
    columns = list(rows.column_names)
    wanted = ["translation"] if "translation" in columns else [source, target]
    if not set(wanted) <= set(columns):
        raise ValueError(
            f"load_parallel: expected a feature 'translation', or '{source}' and '{target}', in {name!r}, "
            f"got {', '.join(columns)}; choose a translation dataset, or convert it and give --train_file"
        )
    number = 0
    for batch in rows.select_columns(wanted).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in wanted), strict=True):
            number += 1
            row = values[0] if len(wanted) == 1 else dict(zip(wanted, values, strict=True))
            yield sides(row, source, target, f"{name}, row {number}")
