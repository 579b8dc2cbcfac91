"""Where text comes from: the embedded corpus, the Hugging Face hub, or local files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SPLITS", "TextSource", "load_hub"]

SPLITS = ("train", "validation", "test")
EMBEDDED = "embedded"
# What datasets on the hub call each split.
HUB_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_LOCAL = "or read local files with --train_file and --validation_file"


@dataclass(frozen=True)
class TextSource:
    """A dataset, or local files.

    dataset: "embedded", a hub id ("wmt/wmt14"), or a local folder that `datasets` can read. configuration: the
    dataset's. files: split -> local file, instead of a dataset.
    """

    dataset: str | None = None
    configuration: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, args: argparse.Namespace) -> TextSource:
        """What the arguments of a program name; the embedded corpus where they name nothing."""
        files = {split: getattr(args, f"{split}_file") for split in SPLITS}
        dataset = args.dataset_name or (None if args.train_file else EMBEDDED)
        return cls(dataset, args.dataset_config_name, {split: path for split, path in files.items() if path})

    def check(self, function: str) -> None:
        """Refuse a source that is none, or two.

        Raises:
            ValueError: neither a dataset nor files, or both.
        """
        if bool(self.dataset) == bool(self.files):
            got = f"both {self.dataset!r} and {sorted(self.files)}" if self.files else "neither"
            raise ValueError(
                f"{function}: expected either dataset_name or local files, got {got}; give --dataset_name (embedded, "
                f"or a hub id), or --train_file and --validation_file"
            )


def load_hub(function: str, source: TextSource, alternatives: Sequence[str] = ()) -> dict[str, Any]:
    """The splits of a dataset: split -> rows, as `datasets` gives them; those of `SPLITS` that it has.

    Args:
        function: stands in messages.
        source: names the dataset and its configuration.
        alternatives: other names of the configuration, tried in order where there is none of the first name.

    Raises:
        ValueError: `datasets` is not installed, or the dataset or all its configurations cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{function}: expected the package datasets for dataset_name {source.dataset!r}, got {error}; pip install "
            f"datasets, {_LOCAL}"
        ) from error
    found: Any = None
    first: Exception | None = None
    for configuration in (source.configuration, *alternatives):
        try:
            found = datasets.load_dataset(source.dataset, configuration)
            break
        except ValueError as error:  # `datasets` has no narrower type for an unknown configuration
            first = first or error
        except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # unknown, gated, offline
            first = error
            break
    if found is None:
        reason = " ".join(str(first).split()).rstrip(".")
        raise ValueError(
            f"{function}: expected a dataset that can be loaded, got {source.dataset!r}, configuration "
            f"{source.configuration!r} ({type(first).__name__}: {reason}); check the name, the configuration and the "
            f"network, {_LOCAL}"
        ) from first
    present = {split: [name for name in names if name in found] for split, names in HUB_SPLITS.items()}
    return {split: found[names[0]] for split, names in present.items() if names}
