"""A training set of which some labels are wrong on purpose, and what a model makes of them.

AC/DC, section 4.4 and appendix B.6 (arXiv:2106.12379): does a model classify a corrupted image as what it is, or as
what the label says? The second is memorised: nothing else in the set says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonsparse.eval.image_sets import ImageSet

__all__ = ["Corruption", "corrupt"]


@dataclass(frozen=True)
class Corruption:
    """labels: [n], int64, of the whole set. images: the corrupted ones, with their true labels. wrong: [count], the
    labels that training gives them."""

    labels: Tensor
    images: ImageSet
    wrong: Tensor


def corrupt(images: ImageSet, count: int, seed: int) -> Corruption:
    """`count` images at random get another label at random, each of the other classes alike.

    Raises:
        ValueError: fewer images than that, none, or fewer than two classes.
    """
    n, classes = len(images), len(images.classes)
    if not 0 < count <= n or classes < 2:
        raise ValueError(
            f"corrupt: expected between 1 and {n} images of at least 2 classes to corrupt, got {count} of {classes}; "
            f"correct --corrupted_samples"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(n, generator=generator)[:count].sort().values
    # 1 to classes - 1 further round the circle of classes: never the true one.
    wrong = (images.labels[chosen] + torch.randint(1, classes, (count,), generator=generator)) % classes
    labels = images.labels.clone()
    labels[chosen] = wrong
    return Corruption(labels, images.subset(chosen), wrong)
