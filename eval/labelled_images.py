"""Images with labels, the names of the labels, and how they are matched with those of another set or of a model.

A label is a place in a list of names, and lists differ: a folder lacks a class, a model has them in another order. So
labels are renumbered by name. Where one side has no names, only numbers ("0", "1", ... or "LABEL_0", ...), a label is
the number itself.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["MATCHES", "ImageSet", "class_names", "held", "match", "matched", "numbered"]

logger = logging.getLogger(__name__)

# How the labels of two are matched.
MATCHES = ("name", "position")
# Sets up to this many bytes of pixels (CIFAR, Fashion-MNIST) are decoded once.
IN_MEMORY = 1 << 29


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
            return replace(self, labels=self.labels[indices], pixels=pixels[indices])
        table = indices.tolist()
        return replace(self, labels=self.labels[indices], pixels=lambda number: pixels(table[number]))


def held(image: Callable[[int], Tensor], count: int) -> Tensor | Callable[[int], Tensor]:
    """The pixels of `count` images, decoded now where they are few; one tensor, where they are of one size too.

    Args:
        image: number -> uint8 [channels, height, width]; the first one says how much memory all would take.
        count: images.
    """
    if count and count * image(0).numel() > IN_MEMORY:
        return image
    images = [image(number) for number in range(count)]
    return torch.stack(images) if len({each.shape for each in images}) == 1 else images.__getitem__


def numbered(classes: Sequence[str]) -> bool:
    """Whether names are none: the numbers of the labels, or transformers' LABEL_0, LABEL_1, ..."""
    return all(name in (str(number), f"LABEL_{number}") for number, name in enumerate(classes))


def match(images: ImageSet, classes: Sequence[str], by_position: bool = False) -> ImageSet | None:
    """The set with labels that are places in `classes`; None where its own classes are others.

    by_position: names say nothing; label i is class i, if there are as many classes.
    """
    ours, theirs = images.classes, list(classes)
    if ours == theirs:
        return images
    unique = len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    if not by_position and unique and set(ours) <= set(theirs):
        table = torch.tensor([theirs.index(name) for name in ours])
        return replace(images, labels=table[images.labels], classes=theirs)
    fits = len(ours) == len(theirs) and (by_position or numbered(ours) or numbered(theirs))
    # A set of numbers may lack the last ones.
    if not fits and not (by_position and numbered(ours) and len(ours) < len(theirs)):
        return None
    if not by_position:
        logger.warning("classes are matched by their position, for one side has no names: %s, %s", ours[:3], theirs[:3])
    return replace(images, classes=theirs)


def class_names(config: Any, model: str) -> list[str]:
    """The names of a model's labels, in their order; `model`, for messages, is its own name.

    Raises:
        ValueError: some number has no name.
    """
    names = dict(config.id2label)
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"classes: expected names for the labels 0, 1, ... in id2label of {model}, got {sorted(names)[:5]}; "
            f"correct its config.json"
        )
    return [str(names[number]) for number in range(len(names))]


def _letters(name: str) -> str:
    """A name whatever its case, and however a file system composes its accents."""
    return unicodedata.normalize("NFKC", name).casefold()


def matched(function: str, images: ImageSet, classes: Sequence[str], whose: str, by_position: bool = False) -> ImageSet:
    """`match`, or a sentence that says what does not fit.

    Args:
        function, whose: who asks, and what `classes` are of, for messages.
        images, classes, by_position: as in `match`.

    Raises:
        ValueError: the set has classes that are none of `classes`, or names that stand for two.
    """
    found = match(images, classes, by_position)
    if found is None:
        by_letters = {_letters(name): name for name in classes}
        others = [name for name in images.classes if name not in classes]
        alike = [(name, by_letters[_letters(name)]) for name in others if _letters(name) in by_letters]
        hints = [f"{name!a} is written {there!a} there" for name, there in alike]
        got = f"{len(images.classes)} classes, among them {others[:5]}" if others else f"{len(images.classes)} classes"
        raise ValueError(
            f"{function}: expected classes of {whose}, {len(classes)} such as {list(classes)[:5]}, got {got}"
            f"{' (' + ', '.join(hints[:3]) + ')' if hints else ''}; rename them, or match them by position"
        )
    return found
