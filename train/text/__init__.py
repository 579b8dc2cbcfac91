"""Text for the programs: where it comes from, its vocabularies, models and batches; and a name of the first edition."""

from __future__ import annotations

from . import lines as _lines
from .source import SPLITS, TextSource

__all__ = ["load_text"]


def load_text(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
) -> dict[str, _lines.Text]:
    """`lines.load_text`, of files by name."""
    files = zip(SPLITS, (train_file, validation_file, test_file), strict=True)
    return _lines.load_text(TextSource(dataset_name, dataset_config_name, {key: path for key, path in files if path}))
