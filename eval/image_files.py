"""The one way from an image file to pixels, whether it lies in a folder, in an archive or in a dataset.

orientation          as the EXIF tag says
16-bit grey          v / 257, rounded; other deep pixels (float, 32-bit integers) have no white, and are refused
palettes, CMYK       as Pillow converts them, which is transformers' do_convert_rgb: transparency is dropped
animations           the first frame
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["UnfitImage", "decode", "read"]


class UnfitImage(ValueError):
    """An image that cannot be read, decoded or batched; the message names it. It may turn up in the middle of a run."""


def decode(data: bytes, channels: int, name: str = "its bytes") -> Tensor:
    """An image file's bytes as uint8 [channels, height, width].

    Args:
        data: the file.
        channels: 1 (grey) or 3 (colours).
        name: where it is from, for messages.

    Raises:
        ImportError: Pillow is not installed.
        UnfitImage: it is no image, damaged, too large, or of pixels without a known white.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("decode: expected Pillow to decode images, got none; pip install pillow") from error
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            # Pillow 10 opens 16-bit PNG as 32-bit integers.
            deep = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM"))
            unknown = opened.mode in ("I", "F") and not deep
            image = ImageOps.exif_transpose(opened)
            kind = f"{opened.format} of mode {opened.mode!r}"
            if deep:
                image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
            array = None if unknown else np.array(image.convert(mode))
    except UnidentifiedImageError as error:
        raise UnfitImage(
            f"load_images: expected an image that can be decoded, got {name}, {len(data)} bytes of no format that "
            f"Pillow knows; replace or remove it"
        ) from error
    except Exception as error:  # Pillow's are of many types: OSError, SyntaxError, struct.error, DecompressionBombError
        raise UnfitImage(
            f"load_images: expected an image that can be decoded, got {name} "
            f"({' '.join(str(error).split()) or type(error).__name__}); replace or remove it"
        ) from error
    if array is None:
        raise UnfitImage(
            f"load_images: expected pixels of 8 bits, or grey ones of 16, got {name} ({kind}), whose white is not "
            f"known; convert it"
        )
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1).contiguous()


def read(path: Path, channels: int, name: str) -> Tensor:
    """`decode` of the file at `path`.

    Raises:
        UnfitImage: as `decode`, or the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnfitImage(
            f"load_images: expected an image that can be read, got {name} ({error.strerror}); replace or remove it"
        ) from error
    return decode(data, channels, name)
