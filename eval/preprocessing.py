"""From stored pixels to a model's input: resize, centre crop, scale, normalise; saved beside the model.

The file is transformers' `preprocessor_config.json` of a `BitImageProcessor`, so others' programs prepare images alike.
Others' files are read by transformers too, and what this module makes of them is compared with what the processor
does to two images: a configuration is honoured to rounding, or refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .labelled_images import ImageSet

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "channel_statistics", "resize_crop"]

FILE = "preprocessor_config.json"
# Of ImageNet's training set, as every recipe for it has them.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BILINEAR = 2
# From this size on ConvNeXt's processor, whose crop_pct is, warps instead of cutting.
_WARPED = 384
# Switches that are honoured.
_SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images.

    mean, std: per channel, of scaled pixels. resize: length of the shorter side, or (height, width); None = left as it
    is. crop: (height, width), or the side of a square, cut from the middle, of smaller images with black around them;
    None = none. scale: what a pixel, 0 to 255, is multiplied by. resample: Pillow's number of a filter, 0 to 5.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    scale: float = 1 / 255
    resample: int = BILINEAR

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) of every image that is cut; None where it depends on the image."""
        size = self.resize if self.crop is None else _pair(self.crop)
        return size if isinstance(size, tuple) else None

    def cut(self, image: Tensor) -> Tensor:
        """[C, H, W], uint8 -> resized and cut, uint8."""
        height, width = image.shape[1:]
        if isinstance(self.resize, tuple):
            image = _resized(image, self.resize, self.resample)
        elif self.resize is not None:
            longer = int(self.resize * max(height, width) / min(height, width))
            size = (longer, self.resize) if width <= height else (self.resize, longer)
            image = _resized(image, size, self.resample)
        return image if self.crop is None else _centre(image, _pair(self.crop))

    def normalise(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W], uint8, on any device -> float32, scaled, less the mean, over the deviation.

        Grey images become as many channels as there are means.

        Raises:
            ValueError: images of another number of channels.
        """
        if pixels.shape[1] not in (1, len(self.mean)):
            raise ValueError(
                f"Preprocessing: expected images of {len(self.mean)} channels, as there are means, got "
                f"{pixels.shape[1]}; give images of the model's kind"
            )
        mean = torch.tensor(self.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels.device)[:, None, None]
        return (pixels.float() * self.scale - mean) / std

    def save(self, folder: Path) -> None:
        """Write `preprocessor_config.json`."""
        size = _named(self.resize) if isinstance(self.resize, tuple) else None
        config: dict[str, Any] = {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": len(self.mean) == 3,
            "do_resize": self.resize is not None,
            "size": size or {"shortest_edge": self.resize or max(_pair(self.crop or 32))},
            "do_center_crop": self.crop is not None,
            "crop_size": _named(_pair(self.crop or 32)),
            "do_rescale": True,
            "rescale_factor": self.scale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": self.resample,
        }
        (folder / FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, name: str | Path) -> Preprocessing:
        """What a model's `preprocessor_config.json` says, to rounding.

        Args:
            name: a model's folder, or a hub id.

        Raises:
            ValueError: there is none, it is damaged, or it asks for what is not done here.
        """
        found = cls.find(name)
        if found is None:
            raise ValueError(
                f"Preprocessing.load: expected {FILE} in {name}, got no such file; the training program writes it"
            )
        return found

    @classmethod
    def find(cls, name: str | Path) -> Preprocessing | None:
        """`load`, or None where a model comes without the file."""
        from transformers import AutoImageProcessor
        from transformers.utils.hub import cached_file

        try:
            if cached_file(str(name), FILE, _raise_exceptions_for_missing_entries=False) is None:
                return None
            processor = AutoImageProcessor.from_pretrained(str(name))
            result = cls._of(processor.to_dict())
            result._compare(processor)
        except Exception as error:  # what transformers makes of a file, and what is found unfit here
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"Preprocessing.load: expected {FILE} of {name} to say what is done here (resize, centre crop, "
                f"rescale, normalise), got {said}; change it, or use a model with another"
            ) from error
        return result

    @classmethod
    def _of(cls, config: dict[str, Any]) -> Preprocessing:
        others = [key for key, value in config.items() if key.startswith("do_") and value and key not in _SWITCHES]
        if others:
            raise ValueError(f"{', '.join(others)}")
        mean, std = (
            tuple(value) if isinstance(value, list | tuple) else (value,) * 3
            for value in (config.get("image_mean"), config.get("image_std"))
        )
        if not config.get("do_normalize"):
            mean, std = (0.0,) * len(mean), (1.0,) * len(std)
        size, cropped = config.get("size") or {}, config.get("crop_size") or {}
        resize: int | tuple[int, int] | None = None
        crop: int | tuple[int, int] | None = None
        if config.get("do_center_crop"):
            crop = (cropped["height"], cropped["width"])
        if config.get("do_resize"):
            resize = size.get("shortest_edge") or (size["height"], size["width"])
            if config.get("crop_pct") and isinstance(resize, int):
                side = resize
                resize = int(side / config["crop_pct"]) if side < _WARPED else (side, side)
                crop = crop or ((side, side) if side < _WARPED else None)
        if isinstance(crop, tuple) and crop[0] == crop[1]:
            crop = crop[0]
        scale = config["rescale_factor"] if config.get("do_rescale") else 1.0
        return cls(mean, std, resize, crop, scale, int(config.get("resample", BILINEAR)))

    def _compare(self, processor: Any) -> None:
        """Refuse a processor that makes something else of an image, in either orientation."""
        from PIL import Image

        for shape in ((61, 83), (83, 61)):
            pixels = np.random.default_rng(0).integers(0, 256, (*shape, len(self.mean))).astype(np.uint8)
            image = Image.fromarray(pixels if len(self.mean) == 3 else pixels[..., 0])
            theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))
            ours = self.normalise(self.cut(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())[None])
            # Pillow's and torchvision's filters round differently, by a level at most here and there.
            level = self.scale / min(self.std)
            if ours.shape != theirs.shape or (ours - theirs).abs().mean() > level:
                raise ValueError(
                    f"{type(processor).__name__}, which does more: {list(theirs.shape[1:])} of mean "
                    f"{theirs.mean():.3f}, where these steps give {list(ours.shape[1:])} of mean {ours.mean():.3f}"
                )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _named(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def _resized(image: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """By Pillow, as transformers' processors do it; [C, H, W], uint8."""
    if image.shape[1:] == torch.Size(size):
        return image
    from PIL import Image

    height, width = size
    channels = [
        Image.fromarray(channel).resize((width, height), Image.Resampling(resample)) for channel in image.numpy()
    ]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))


def _centre(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle, and black around what is smaller, as transformers cuts it; [C, H, W]."""
    lacking = [max(0, wanted - there) for wanted, there in zip(size, image.shape[1:], strict=True)]
    if any(lacking):
        # The odd pixel comes first.
        (top, bottom), (left, right) = ((each - each // 2, each // 2) for each in lacking)
        image = F.pad(image, (left, right, top, bottom))
    top, left = ((there - wanted) // 2 for wanted, there in zip(size, image.shape[1:], strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def resize_crop(image: Tensor, top: int, left: int, height: int, width: int, size: tuple[int, int]) -> Tensor:
    """The rectangle of `image` ([C, H, W], uint8) resized to `size`: bilinear with antialiasing, rounded to uint8.

    For training; by torch's own kernel for uint8, the one that torchvision's transforms v2 call.
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
