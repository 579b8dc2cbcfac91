"""From stored pixels to a model's input: resize, centre crop, scale, normalise; saved beside the model.

The file is transformers' `preprocessor_config.json` of a `BitImageProcessor`, so others' programs prepare images alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .image_sets import ImageSet

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "channel_statistics", "resize_crop"]

FILE = "preprocessor_config.json"
# Of ImageNet's training set, as every recipe for it has them.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """mean, std: per channel, of pixels in [0, 1]. resize: length of the shorter side, None = left as it is.
    crop: side of the square cut from the middle, None = none."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    crop: int | None = None

    def cut(self, image: Tensor) -> Tensor:
        """[C, H, W], uint8 -> resized and cut, uint8."""
        if self.resize is not None:
            height, width = image.shape[1:]
            scale = self.resize / min(height, width)
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            image = resize_crop(image, 0, 0, height, width, size)
        if self.crop is not None:
            top, left = ((size - self.crop) // 2 for size in image.shape[1:])
            image = image[:, max(top, 0) : max(top, 0) + self.crop, max(left, 0) : max(left, 0) + self.crop]
        return image

    def normalise(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W], uint8, on any device -> float32 of mean 0 and deviation 1 over the training set."""
        mean = torch.tensor(self.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels.device)[:, None, None]
        return (pixels.float() / 255.0 - mean) / std

    def save(self, folder: Path) -> None:
        """Write `preprocessor_config.json`."""
        config: dict[str, Any] = {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": len(self.mean) == 3,
            "do_resize": self.resize is not None,
            "size": {"shortest_edge": self.resize or self.crop or 32},
            "do_center_crop": self.crop is not None,
            "crop_size": {"height": self.crop or 32, "width": self.crop or 32},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": 2,
        }
        (folder / FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Preprocessing:
        """Read a model's `preprocessor_config.json`: of a processor that resizes the shorter side and cuts the middle.

        Raises:
            ValueError: there is none.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(
                f"Preprocessing.load: expected {FILE} in {folder}, got no such file; the training program writes it"
            )
        config = json.loads(path.read_text(encoding="utf-8"))
        size, crop = config.get("size", {}), config.get("crop_size", {})
        resize = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
        return cls(
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
            resize=resize if config.get("do_resize") else None,
            crop=(crop["height"] if isinstance(crop, dict) else crop) if config.get("do_center_crop") else None,
        )


def resize_crop(image: Tensor, top: int, left: int, height: int, width: int, size: tuple[int, int]) -> Tensor:
    """The rectangle of `image` ([C, H, W], uint8) resized to `size`: bilinear with antialiasing, rounded to uint8.

    torch's own kernel for uint8, the one that torchvision's transforms v2 call.
    """
    part = image[:, top : top + height, left : left + width]
    if part.shape[1:] == torch.Size(size):
        return part
    return F.interpolate(part[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]


def channel_statistics(images: ImageSet, limit: int = 20000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over the first `limit` images of a set in memory; ImageNet's of a lazy one."""
    if not isinstance(images.pixels, Tensor):
        return IMAGENET_MEAN, IMAGENET_STD
    pixels = images.pixels[:limit].double() / 255.0
    mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))
    return tuple(mean.tolist()), tuple(std.tolist())
