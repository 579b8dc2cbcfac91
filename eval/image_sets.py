"""Labelled images: where they come from, and how they become what a model sees.

    embedded          scikit-learn's digits (1,797 grey images of 8x8): no file, no network
    a hub id          "ILSVRC/imagenet-1k", "uoft-cs/cifar10": any dataset with an image and a class label
    a folder          of IDX files (MNIST, Fashion-MNIST), of <split>.npz, or of <split>/<class>/<image>

Pixels are uint8 [channels, height, width]. Small sets lie in memory as one tensor; large ones are decoded when asked.
"""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ImageSet", "decode", "load_folder", "load_images"]

# The names under which folders and the hub know a split, in the order they are looked for.
_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test", "t10k")}
# Hub sets up to this many bytes of pixels (CIFAR) are decoded once; their images are of one size.
_IN_MEMORY = 1 << 29
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class ImageSet:
    """One split.

    labels: [n], int64. classes: the names of the labels. pixels: [n, channels, height, width], uint8, or a function
    from a number below n to [channels, height, width], uint8, which any thread may call.
    """

    labels: Tensor
    classes: list[str]
    pixels: Tensor | Callable[[int], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """[channels, height, width], uint8."""
        return self.pixels[index] if isinstance(self.pixels, Tensor) else self.pixels(index)

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at `indices`, in that order; a lazy set stays lazy."""
        pixels = self.pixels
        if isinstance(pixels, Tensor):
            return ImageSet(self.labels[indices], self.classes, pixels[indices])
        table = indices.tolist()
        return ImageSet(self.labels[indices], self.classes, lambda number: pixels(table[number]))


def load_images(
    name: str | None, config: str | None = None, folder: str | Path | None = None, channels: int | None = None
) -> dict[str, ImageSet]:
    """The splits of a set: those there are of "train", "validation" and "test", whose classes agree.

    Args:
        name: "embedded", or a hub id; None where `folder` is given.
        config: the hub dataset's configuration.
        folder: a folder of IDX files, npz files or images.
        channels: 1 or 3: decoded images are made grey or coloured; None = as they are, coloured if they differ.

    Raises:
        ValueError: none or both of name and folder, or nothing there that is understood.
        ImportError: what reads the set is not installed.
    """
    if (name is None) == (folder is None):
        raise ValueError(
            f"load_images: expected a dataset's name or a folder, got {name!r} and {folder!r}; give one of them"
        )
    if folder is not None:
        return load_folder(Path(folder), channels)
    if name == "embedded":
        return _digits()
    return _from_hub(str(name), config, channels)


def load_folder(folder: Path, channels: int | None = None) -> dict[str, ImageSet]:
    """The splits that lie in `folder`, as IDX files, as <split>.npz or as folders of classes; see `load_images`.

    Raises:
        ValueError: none of these is there, or a file is not what its name says.
    """
    found: dict[str, ImageSet] = {}
    for split, names in _SPLITS.items():
        for name in names:
            idx = sorted(folder.glob(f"{name}-images*idx3-ubyte*"))
            if idx:
                found[split] = _from_idx(idx[0])
            elif (folder / f"{name}.npz").is_file():
                found[split] = _from_npz(folder / f"{name}.npz")
            elif (folder / name).is_dir():
                found[split] = _from_classes(folder / name, channels or 3)
            else:
                continue
            break
    if "train" not in found and not found:
        raise ValueError(
            f"load_folder: expected IDX files, <split>.npz or folders of classes (train, validation, test) in "
            f"{folder}, got none; correct the path"
        )
    return found


def decode(data: bytes, channels: int) -> Tensor:
    """An image file's bytes as uint8 [channels, height, width].

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("decode: expected Pillow to decode images, got none; pip install pillow") from error
    with Image.open(io.BytesIO(data)) as image:
        return _from_pil(image, channels)


def _from_pil(image: Any, channels: int) -> Tensor:
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], channels).permute(2, 0, 1).contiguous()


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


def _read(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file: two zero bytes, the type (8 = uint8), the number of dimensions, the sizes, the elements."""
    data = _read(path)
    head = 4 + 4 * dimensions
    sizes = struct.unpack(f">{dimensions}I", data[4:head]) if len(data) >= head else ()
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) != head + int(np.prod(sizes)):
        raise ValueError(
            f"load_folder: expected an IDX file of uint8 with {dimensions} dimensions, got {path.name} of "
            f"{len(data)} bytes beginning {data[:4].hex()}; download it again"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=head).copy()).reshape(sizes)


def _from_idx(path: Path) -> ImageSet:
    partner = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if not partner.is_file():
        raise ValueError(f"load_folder: expected {partner.name} beside {path.name}, got no such file; add it")
    pixels, labels = _idx(path, 3)[:, None], _idx(partner, 1).long()
    return _checked(labels, _numbers(labels), pixels, path)


def _from_npz(path: Path) -> ImageSet:
    """Arrays `labels` and `images` ([n, h, w] or [n, h, w, c], uint8), or `jpeg` (files end to end) and `offsets`."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    labels = torch.from_numpy(arrays["labels"].astype(np.int64)) if "labels" in arrays else None
    if labels is None or not ("images" in arrays or {"jpeg", "offsets"} <= arrays.keys()):
        raise ValueError(
            f"load_folder: expected arrays labels and images, or labels, jpeg and offsets, got {sorted(arrays)} in "
            f"{path.name}; rename them"
        )
    if "images" in arrays:
        images = torch.from_numpy(arrays["images"])
        pixels = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    else:
        data, offsets = arrays["jpeg"].tobytes(), arrays["offsets"].tolist()
        pixels = torch.stack([decode(data[first:last], 3) for first, last in pairwise(offsets)])
    return _checked(labels, _numbers(labels), pixels, path)


def _numbers(labels: Tensor) -> list[str]:
    return [str(number) for number in range(int(labels.max()) + 1)]


def _checked(labels: Tensor, classes: list[str], pixels: Tensor, path: Path) -> ImageSet:
    if len(labels) != len(pixels) or pixels.dtype != torch.uint8 or pixels.dim() != 4:
        raise ValueError(
            f"load_folder: expected as many uint8 images as labels, got {list(pixels.shape)} {pixels.dtype} and "
            f"{len(labels)} labels in {path.name}; correct the file"
        )
    return ImageSet(labels, classes, pixels)


def _from_classes(folder: Path, channels: int) -> ImageSet:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files = [
        (path, number)
        for number, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not files:
        raise ValueError(f"load_folder: expected images in folders of classes, got none in {folder}; correct the path")
    labels = torch.tensor([number for _, number in files])
    return ImageSet(labels, classes, lambda index: decode(files[index][0].read_bytes(), channels))


def _from_hub(name: str, config: str | None, channels: int | None) -> dict[str, ImageSet]:
    from datasets import ClassLabel, Image, load_dataset

    loaded = load_dataset(name, config)
    result = {}
    for split, names in _SPLITS.items():
        known = next((each for each in names if each in loaded), None)
        if known is None:
            continue
        part = loaded[known]
        columns = [key for key, feature in part.features.items() if isinstance(feature, Image)]
        targets = [key for key, feature in part.features.items() if isinstance(feature, ClassLabel)]
        if not columns or not targets:
            raise ValueError(
                f"load_images: expected a column of images and one of class labels in {name!r}, got "
                f"{list(part.features)}; name another dataset"
            )
        labels = torch.tensor(part[targets[0]][:])
        if (labels < 0).any():
            # The hub's test sets of competitions come without labels.
            continue
        opener = _opener(part, columns[0], channels or 3)
        small = len(labels) * opener(0).numel() <= _IN_MEMORY
        pixels = torch.stack([opener(index) for index in range(len(labels))]) if small else opener
        result[split] = ImageSet(labels, part.features[targets[0]].names, pixels)
    if "train" not in result:
        raise ValueError(f"load_images: expected a train split in {name!r}, got {list(loaded)}; name another dataset")
    return result


def _opener(part: Sequence[Any], column: str, channels: int) -> Callable[[int], Tensor]:
    return lambda index: _from_pil(part[index][column], channels)
