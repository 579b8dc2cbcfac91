"""Names of the first edition."""

from __future__ import annotations

from .text.corpora import load_parallel as _load
from .text.parallel_files import Pair
from .text.source import SPLITS, TextSource

__all__ = ["load_parallel"]


def load_parallel(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    source_lang: str = "en",
    target_lang: str = "de",
    max_train_samples: int | None = None,
    **files: str | None,
) -> dict[str, list[Pair]]:
    """`text.corpora.load_parallel`, of files by the names train_file, validation_file, test_file."""
    given = {split: path for split in SPLITS if (path := files.pop(f"{split}_file", None))}
    if files:
        raise TypeError(f"load_parallel: expected train_file, validation_file and test_file, got {', '.join(files)}")
    return _load(TextSource(dataset_name, dataset_config_name, given), source_lang, target_lang, max_train_samples)
