"""Images that lie in a folder: IDX files (MNIST, Fashion-MNIST), <split>.npz, or <split>/<class>/<image>."""

from __future__ import annotations

import gzip
import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .image_files import decode, read
from .labelled_images import ImageSet, held

__all__ = ["SPLITS", "load_folder"]

logger = logging.getLogger(__name__)

# The names under which folders and the hub know a split, in the order they are looked for.
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test", "t10k")}
_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Beside hidden names: what archivers, file servers and file systems leave behind.
_LITTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini")


def load_folder(
    folder: Path, channels: int | None = None, splits: Collection[str] = tuple(SPLITS)
) -> dict[str, ImageSet]:
    """The splits that lie in `folder`, as IDX files, as <split>.npz or as folders of classes; see `load_images`.

    Raises:
        ValueError: none of these is there, or a file is not what its name says.
    """
    found: dict[str, ImageSet] = {}
    for split, names in SPLITS.items():
        for name in names if split in splits else ():
            idx = sorted(folder.glob(f"{name}-images*idx3-ubyte*"))
            if idx:
                found[split] = _from_idx(idx[0])
            elif (folder / f"{name}.npz").is_file():
                found[split] = _from_npz(folder / f"{name}.npz", channels or 3)
            elif (folder / name).is_dir():
                found[split] = _from_classes(folder / name, channels or 3, whole=split == "train")
            else:
                continue
            break
    if not found:
        raise ValueError(
            f"load_folder: expected IDX files, <split>.npz or folders of classes ({', '.join(splits)}) in "
            f"{folder}, got none; correct the path"
        )
    return found


def _read(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"load_folder: expected gzip data, got {path} ({error}); download it again") from error


def _idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file: two zero bytes, the type (8 = uint8), the number of dimensions, the sizes, the elements."""
    data = _read(path)
    head = 4 + 4 * dimensions
    sizes = struct.unpack(f">{dimensions}I", data[4:head]) if len(data) >= head else ()
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) != head + int(np.prod(sizes)):
        raise ValueError(
            f"load_folder: expected an IDX file of uint8 with {dimensions} dimensions, got {path} of "
            f"{len(data)} bytes beginning {data[:4].hex()}; download it again"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=head).copy()).reshape(sizes)


def _from_idx(path: Path) -> ImageSet:
    partner = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if not partner.is_file():
        raise ValueError(f"load_folder: expected {partner.name} beside {path}, got no such file; add it")
    pixels, labels = _idx(path, 3)[:, None], _idx(partner, 1).long()
    return _checked(labels, pixels, len(pixels), path)


def _from_npz(path: Path, channels: int) -> ImageSet:
    """Arrays `labels` and `images` ([n, h, w] or [n, h, w, c], uint8), or `jpeg` (files end to end) and `offsets`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"load_folder: expected arrays of numbers, got {path} ({error}); write it again") from error
    labels = torch.from_numpy(arrays["labels"].astype(np.int64)) if "labels" in arrays else None
    if labels is None or not ("images" in arrays or {"jpeg", "offsets"} <= arrays.keys()):
        raise ValueError(
            f"load_folder: expected arrays labels and images, or labels, jpeg and offsets, got {sorted(arrays)} in "
            f"{path}; rename them"
        )
    if "images" in arrays:
        images = torch.from_numpy(arrays["images"])
        pixels = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        return _checked(labels, pixels, len(pixels), path)
    data, places = arrays["jpeg"].tobytes(), list(pairwise(arrays["offsets"].tolist()))

    def image(number: int) -> Tensor:
        return decode(data[slice(*places[number])], channels, f"image {number} of {path}")

    return _checked(labels, held(image, len(places)), len(places), path)


def _checked(labels: Tensor, pixels: Tensor | Callable[[int], Tensor], count: int, path: Path) -> ImageSet:
    """count: how many images there are."""
    whole = not isinstance(pixels, Tensor) or (pixels.dtype == torch.uint8 and pixels.dim() == 4)
    if not whole or not 0 < count == len(labels) or int(labels.min()) < 0:
        shape = f"of {list(pixels.shape)}, {pixels.dtype}" if isinstance(pixels, Tensor) else "files"
        raise ValueError(
            f"load_folder: expected as many uint8 images as labels from 0 on, got {count} images {shape} and "
            f"{len(labels)} labels in {path}; correct the file"
        )
    return ImageSet(labels, [str(number) for number in range(int(labels.max()) + 1)], pixels)


def _from_classes(folder: Path, channels: int, whole: bool) -> ImageSet:
    """whole: an empty folder is no class; elsewhere a class may be without images."""
    classes = [entry.name for entry in _entries(folder) if entry.is_dir()]
    loose = [entry.name for entry in _entries(folder) if entry.suffix.lower() in _SUFFIXES and not entry.is_dir()]
    if loose:
        raise ValueError(
            f"load_folder: expected images in folders of classes, got {loose[0]} beside them in {folder}; put it into "
            f"the folder of its class"
        )
    files = [(path, number) for number, name in enumerate(classes) for path in _images(folder / name)]
    if not files:
        raise ValueError(f"load_folder: expected images in folders of classes, got none in {folder}; correct the path")
    labels = torch.tensor([number for _, number in files])
    empty = [name for number, name in enumerate(classes) if whole and not (labels == number).any()]
    if empty:
        raise ValueError(
            f"load_folder: expected images in every folder of {folder}, got none in {empty[0]}; remove the folder, or "
            f"add images of its class"
        )
    paths = [path for path, _ in files]
    return ImageSet(labels, classes, held(lambda number: read(paths[number], channels, str(paths[number])), len(files)))


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder and was put there."""
    return [entry for entry in sorted(folder.iterdir()) if entry.name[0] != "." and entry.name not in _LITTER]


def _images(folder: Path) -> Iterator[Path]:
    """The images in a folder and those below, links followed; other files are left out with a warning."""
    others = []
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _images(entry)
        elif entry.suffix.lower() in _SUFFIXES:
            yield entry
        else:
            others.append(entry.name)
    if others:
        logger.warning("%d files in %s are no images, such as %s; they are left out", len(others), folder, others[0])
