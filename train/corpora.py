"""Parallel text from wherever it is: the embedded corpus, the Hugging Face hub, or local files.

Local files need no `datasets`; see `parallel_files`. Every source gives (source, target) pairs in its order.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from .embedded_translation import DEFAULT_SIZES, generate
from .parallel_files import Pair, read_pairs, sides

logger = logging.getLogger(__name__)

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


def load_parallel(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    source_lang: str = "en",
    target_lang: str = "de",
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    *,
    require_train: bool = True,
) -> dict[str, list[Pair]]:
    """(source, target) pairs by split: "train", and "validation" and "test" where the source has them.

    Args:
        dataset_name: "embedded", a hub id ("wmt/wmt14"), or a local folder that `datasets` can read.
        dataset_config_name: Its configuration; a language pair may be named in either order.
        source_lang, target_lang: Language codes; of "en_XX" the part before "_" counts.
        train_file, validation_file, test_file: Local files instead of a dataset. Parallel text is named by
            one of its two files ("train.en.gz"), their common beginning ("dir/train"), or as "a.en,a.de".
        max_train_samples, max_eval_samples: Keep the first so many pairs of train, of each other split.
        seed: Seed of the embedded corpus; other sources keep their order.
        require_train: Whether a missing train split is an error.

    Raises:
        ValueError: No source or two, an unreadable or malformed file, a missing language, an unknown dataset.
        FileNotFoundError: A file, or the other half of parallel text, does not exist.
    """
    source, target = source_lang.split("_")[0], target_lang.split("_")[0]
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {split: path for split, path in files.items() if path}
    limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_eval_samples}
    if bool(dataset_name) == bool(files):
        got = f"both {dataset_name!r} and {sorted(files)}" if files else "neither"
        raise ValueError(
            f"load_parallel: expected either dataset_name or local files, got {got}; "
            "give --dataset_name (embedded, or a hub id), or --train_file and --validation_file"
        )
    if dataset_name == "embedded":
        splits = _embedded(source, target, limits, seed)
    elif dataset_name:
        splits = _hub(dataset_name, dataset_config_name, source, target, limits)
    else:
        splits = {}
        for split, path in files.items():
            kept = list(islice(_stripped(read_pairs(str(path), source, target), str(path)), limits[split]))
            splits[split] = kept
            if not kept:
                raise ValueError(
                    f"load_parallel: expected sentence pairs in {path}, got none with text on both sides; "
                    "give a file that is not empty"
                )
    if require_train and "train" not in splits:
        raise ValueError(
            f"load_parallel: expected a train split, got only {', '.join(splits)}; give --train_file, "
            "or a dataset that has one"
        )
    return splits


def clean_pairs(pairs: Iterable[Pair], max_words: int = 250, max_ratio: float | None = None) -> list[Pair]:
    """Drop pairs with a side of more than `max_words` words, or one side `max_ratio` times the other's words.

    fairseq's cleaning drops above 250 and 1.5, counted in subwords; no ratio is the default here, because in
    words "Wednesday" and "am Mittwoch" already differ by two.
    """
    kept, seen = [], 0
    for pair in pairs:
        seen += 1
        short, long = sorted(len(side.split()) for side in pair)
        if long <= max_words and (max_ratio is None or long <= max_ratio * short):
            kept.append(pair)
    if seen > len(kept):
        logger.info("clean_pairs: dropped %d of %d pairs by length", seen - len(kept), seen)
    return kept


def _embedded(source: str, target: str, limits: Mapping[str, int | None], seed: int) -> dict[str, list[Pair]]:
    if {source, target} != {"en", "de"}:
        raise ValueError(
            f"load_parallel: expected en-de or de-en for dataset_name 'embedded', got {source}-{target}; "
            "give --train_file and --validation_file for another pair of languages"
        )
    sizes = {
        split: size if limits[split] is None else min(size, limits[split] or 0) for split, size in DEFAULT_SIZES.items()
    }
    made = generate(seed, sizes)
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


def _hub(
    name: str, config: str | None, source: str, target: str, limits: Mapping[str, int | None]
) -> dict[str, list[Pair]]:
    local = "or read local files with --train_file and --validation_file"
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"load_parallel: expected the package datasets for dataset_name {name!r}, got {error}; "
            f"pip install datasets, {local}"
        ) from error
    candidates = [config]
    if config is None:
        candidates += [f"{source}-{target}", f"{target}-{source}"]
    elif match := re.fullmatch(r"([A-Za-z]+)([-_])([A-Za-z]+)", config):
        candidates.append(f"{match[3]}{match[2]}{match[1]}")
    found: Any = None
    first: Exception | None = None
    for candidate in candidates:
        try:
            found = datasets.load_dataset(name, candidate)
            break
        except ValueError as error:  # `datasets` has no narrower type for an unknown configuration
            first = first or error
        except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # unknown, gated, offline
            first = error
            break
    if found is None:
        reason = " ".join(str(first).split()).rstrip(".")
        raise ValueError(
            f"load_parallel: expected a dataset that can be loaded, got {name!r}, configuration {config!r} "
            f"({type(first).__name__}: {reason}); check the name, the configuration and the network, {local}"
        ) from first
    chosen = {"train": ("train",), "validation": _VALIDATION_NAMES, "test": ("test",)}
    splits = {}
    for split, names in chosen.items():
        present = [known for known in names if known in found]
        if present:
            rows = _dataset_rows(found[present[0]], name, source, target)
            splits[split] = list(islice(_stripped(rows, f"{name} {split}"), limits[split]))
    return splits


def _dataset_rows(rows: Any, name: str, source: str, target: str) -> Iterator[Pair]:
    columns = list(rows.column_names)
    if "translation" in columns:
        for batch in rows.select_columns(["translation"]).iter(batch_size=1000):
            for pair in batch["translation"]:
                yield sides(pair, source, target, name)
    elif source in columns and target in columns:
        for batch in rows.select_columns([source, target]).iter(batch_size=1000):
            yield from zip(batch[source], batch[target], strict=True)
    else:
        raise ValueError(
            f"load_parallel: expected a feature 'translation', or '{source}' and '{target}', in {name!r}, "
            f"got {', '.join(columns)}; choose a translation dataset, or convert it and give --train_file"
        )
