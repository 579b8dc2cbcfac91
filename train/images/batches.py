"""Batches of images for the training loop: shuffled anew each epoch, augmented, decoded ahead by threads.

What an image becomes in an epoch is a function of (seed, epoch, its number), and which step it falls on of (seed,
epoch): neither the number of ranks nor of threads changes anything, and a resumed run sees what it would have seen.

    "crop_flip"    4 zero pixels on each side, a random cut of the old size, half of them mirrored (He et al., 4.2)
    "crop"         the same without mirroring, for digits
    "imagenet"     a random rectangle of 8 to 100 % of the area and of aspect 3/4 to 4/3, resized; half mirrored
    "none"         the evaluation's cut
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.eval.accuracy import stacked
from tritonsparse.eval.image_sets import ImageSet
from tritonsparse.eval.preprocessing import Preprocessing, resize_crop

__all__ = ["AUGMENTATIONS", "ImageBatch", "ImageBatches", "augment", "random_rectangle"]

AUGMENTATIONS = ("crop_flip", "crop", "imagenet", "none")
PADDING = 4


@dataclass(frozen=True)
class ImageBatch:
    """pixels: [B, C, H, W], uint8. labels: [B], int64."""

    pixels: Tensor
    labels: Tensor

    @property
    def weight(self) -> int:
        """Images: what the loss of a step is divided by."""
        return len(self.labels)


def augment(image: Tensor, how: str, preprocessing: Preprocessing, random: Random) -> Tensor:
    """One training image, uint8 [C, H, W] -> [C, H', W'], as the head of this file says."""
    if how == "imagenet":
        size = preprocessing.shape or (preprocessing.resize, preprocessing.resize)
        assert isinstance(size[0], int) and isinstance(size[1], int)  # checked by ImageBatches
        top, left, height, width = random_rectangle(image.shape[1], image.shape[2], random)
        image = resize_crop(image, top, left, height, width, (size[0], size[1]))
    else:
        image = preprocessing.cut(image)
        if how in ("crop", "crop_flip"):
            height, width = image.shape[1:]
            top, left = random.randrange(2 * PADDING + 1), random.randrange(2 * PADDING + 1)
            image = F.pad(image, (PADDING,) * 4)[:, top : top + height, left : left + width]
    mirrored = how in ("crop_flip", "imagenet") and random.random() < 0.5
    return image.flip(2) if mirrored else image


def random_rectangle(height: int, width: int, random: Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a cut as torchvision's RandomResizedCrop draws it, of scale (0.08, 1) and ratio
    (3/4, 4/3): up to ten attempts, then the largest centred cut within the ratio."""
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass
class ImageBatches:
    """The training set, in batches (`Batches` of run/loop.py).

    batch_size: images of one rank's batch. group: ranks x accumulated batches, which make up a step. workers: threads
    that decode and augment the next step meanwhile; 0 = none. labels: other labels than the set's own.

    The last step of an epoch takes what is left, divided evenly; fewer than two images a batch are left out.

    Raises:
        ValueError: fewer images than a step's smallest batches need, an unknown augmentation, or "imagenet" without a
            size.
    """

    images: ImageSet
    preprocessing: Preprocessing
    batch_size: int
    augmentation: str = "none"
    seed: int = 0
    group: int = 1
    rank: int = 0
    world: int = 1
    workers: int = 0
    labels: Tensor | None = None
    _order: tuple[int, Tensor] | None = field(default=None, init=False, repr=False)
    _pool: ThreadPoolExecutor | None = field(default=None, init=False, repr=False)
    _ahead: dict[tuple[int, int], list[list[Future[Tensor]]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(
                f"ImageBatches: expected an augmentation among {', '.join(AUGMENTATIONS)}, got "
                f"{self.augmentation!r}; choose one"
            )
        if self.augmentation == "imagenet" and self.preprocessing.crop is None and self.preprocessing.resize is None:
            raise ValueError(
                "ImageBatches: expected an image size for augmentation 'imagenet', got none; pass --image_size"
            )
        if len(self.images) < 2 * self.group or self.batch_size < 1:
            raise ValueError(
                f"ImageBatches: expected a batch size of at least 1 and at least {2 * self.group} images (two for each "
                f"batch of a step), got {self.batch_size} and {len(self.images)}; use more images or fewer processes"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        step = self.batch_size * self.group
        full, left = divmod(len(self.images), step)
        return full + (left >= 2 * self.group)

    def step_batches(self, epoch: int, step: int) -> list[ImageBatch]:
        """This rank's batches of optimizer step `step` of `epoch`."""
        chunks = self._chunks(epoch, step)
        if self.workers == 0:
            return [self._batch(part, [self._image(epoch, index) for index in part.tolist()]) for part in chunks]
        decoded = self._ahead.pop((epoch, step), None) or self._submit(epoch, step)
        self._ahead.clear()
        following = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
        self._ahead[following] = self._submit(*following)
        return [
            self._batch(part, [future.result() for future in futures])
            for part, futures in zip(chunks, decoded, strict=True)
        ]

    def first(self, count: int) -> Iterator[ImageBatch]:
        """The first `count` batches of epoch 0, the same on every rank: for statistics, not for training."""
        order = self._shuffled(0)
        for number in range(min(count, -(-len(order) // self.batch_size))):
            part = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield self._batch(part, [self._image(0, index) for index in part.tolist()])

    def _shuffled(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            draw = Random(f"order/{self.seed}/{epoch}").getrandbits(63)
            generator = torch.Generator().manual_seed(draw)
            self._order = (epoch, torch.randperm(len(self.images), generator=generator))
        return self._order[1]

    def _chunks(self, epoch: int, step: int) -> list[Tensor]:
        """The numbers of the images of each of this rank's batches."""
        size = self.batch_size * self.group
        whole = self._shuffled(epoch)[step * size : (step + 1) * size]
        parts = whole.tensor_split(self.group)
        return list(parts[self.rank :: self.world])

    def _submit(self, epoch: int, step: int) -> list[list[Future[Tensor]]]:
        pool = self._pool = self._pool or ThreadPoolExecutor(self.workers)
        image: Callable[[int, int], Tensor] = self._image
        return [[pool.submit(image, epoch, index) for index in part.tolist()] for part in self._chunks(epoch, step)]

    def _image(self, epoch: int, index: int) -> Tensor:
        random = Random(f"image/{self.seed}/{epoch}/{index}")
        return augment(self.images.image(index), self.augmentation, self.preprocessing, random)

    def _batch(self, part: Tensor, images: list[Tensor]) -> ImageBatch:
        labels = self.images.labels if self.labels is None else self.labels
        return ImageBatch(stacked(images), labels[part])
