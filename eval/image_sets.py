"""Labelled images: where they come from, and how they become what a model sees.

    embedded          scikit-learn's digits (1,797 grey images of 8x8): no file, no network
    a hub id          "ILSVRC/imagenet-1k", "uoft-cs/cifar10": any dataset with an image and a class label
    a folder          of IDX files (MNIST, Fashion-MNIST), of <split>.npz, or of <split>/<class>/<image>

Pixels are uint8 [channels, height, width]. Small sets are decoded at once; large ones when asked, image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .image_files import UnfitImage, decode, read
from .image_folders import SPLITS, load_folder
from .labelled_images import ImageSet, held, matched

__all__ = ["ImageSet", "decode", "load_folder", "load_images"]


def load_images(
    name: str | None,
    config: str | None = None,
    folder: str | Path | None = None,
    channels: int | None = None,
    splits: Collection[str] = tuple(SPLITS),
) -> dict[str, ImageSet]:
    """The splits of a set: those there are of "train", "validation" and "test".

    All have the classes of train, by name; where train is not loaded, each has its own.

    Args:
        name: "embedded", or a hub id; None where `folder` is given.
        config: the hub dataset's configuration.
        folder: a folder of IDX files, npz files or images.
        channels: 1 or 3: decoded images are made grey or coloured; None = coloured.
        splits: which to load.

    Raises:
        ValueError: none or both of name and folder, nothing there that is understood, an image that cannot be decoded,
            a class of another split that train has not, or one of train without an image.
        ImportError: what reads the set is not installed.
    """
    if (name is None) == (folder is None):
        raise ValueError(
            f"load_images: expected a dataset's name or a folder, got {name!r} and {folder!r}; give one of them"
        )
    if folder is not None:
        found = load_folder(Path(folder), channels, splits)
    elif name == "embedded":
        found = {split: images for split, images in _digits().items() if split in splits}
    else:
        found = _from_hub(str(name), config, channels, splits)
    if "train" in found:
        train = found["train"]
        for split in found:
            found[split] = matched(f"load_images ({split})", found[split], train.classes, "train")
    return found


def _digits() -> dict[str, ImageSet]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "load_images: expected scikit-learn for the embedded digits, got none; pip install scikit-learn"
        ) from error
    digits = load_digits()
    # 0..16 -> 0..255; every fifth image tests, as the set is ordered by writer.
    pixels = torch.from_numpy(np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    tests = torch.arange(len(labels)) % 5 == 4
    classes = [str(digit) for digit in range(10)]
    return {
        "train": ImageSet(labels[~tests], classes, pixels[~tests]),
        "test": ImageSet(labels[tests], classes, pixels[tests]),
    }


def _from_hub(name: str, config: str | None, channels: int | None, splits: Collection[str]) -> dict[str, ImageSet]:
    from datasets import ClassLabel, Image, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(name, config)
    except (ValueError, OSError, RuntimeError, ImportError, DatasetsError) as error:
        raise ValueError(
            f"load_images: expected a dataset that can be loaded, got {name!r}, configuration {config!r} "
            f"({type(error).__name__}: {' '.join(str(error).split())}); check the name, the configuration and the "
            f"network, or give --data_dir"
        ) from error
    result = {}
    for split, names in SPLITS.items():
        known = next((each for each in names if each in loaded), None)
        if known is None or split not in splits:
            continue
        part = loaded[known]
        columns = [key for key, feature in part.features.items() if isinstance(feature, Image)]
        targets = [key for key, feature in part.features.items() if isinstance(feature, ClassLabel)]
        if not columns or not targets:
            raise ValueError(
                f"load_images: expected a column of images and one of class labels in {name!r}, got "
                f"{list(part.features)}; name another dataset"
            )
        numbers = part[targets[0]][:]
        if None in numbers:
            raise ValueError(
                f"load_images: expected a label in every row of {name!r}, got none in row {numbers.index(None) + 1} of "
                f"{known}; leave such rows out"
            )
        labels = torch.tensor(numbers)
        if not len(labels) or (labels < 0).any():
            # The hub's test sets of competitions come without labels.
            continue
        # The files themselves: `datasets` would decode them in its own way.
        files = part.cast_column(columns[0], Image(decode=False))
        opener = _opener(files, columns[0], channels or 3, f"of {name}, {known}")
        result[split] = ImageSet(labels, part.features[targets[0]].names, held(opener, len(labels)))
    if not result:
        raise ValueError(f"load_images: expected {', '.join(splits)} in {name!r}, got {list(loaded)}; name another one")
    return result


def _opener(part: Sequence[Any], column: str, channels: int, where: str) -> Callable[[int], Tensor]:
    def image(number: int) -> Tensor:
        row, place = part[number][column], f"row {number + 1} {where}"
        if row is None:
            raise UnfitImage(f"load_images: expected an image in {place}, got none; leave such rows out")
        if row["bytes"] is None:
            return read(Path(row["path"]), channels, place)
        return decode(row["bytes"], channels, place)

    return image
