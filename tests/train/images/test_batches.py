"""Batches of images: what each epoch sees is a function of the seed, the epoch and the image, and of nothing else."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonsparse.eval.image_sets import ImageSet
from tritonsparse.eval.preprocessing import Preprocessing
from tritonsparse.train.images.batches import PADDING, ImageBatches, augment, random_rectangle
from tritonsparse.train.images.label_corruption import corrupt

PLAIN = Preprocessing((0.5,), (0.5,))
quick = settings(max_examples=60, deadline=None)


def numbered(count: int) -> ImageSet:
    """Image i is of the value i, its label is i."""
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 2, 2).clone()
    return ImageSet(torch.arange(count), [str(i) for i in range(count)], pixels)


def seen(epoch: int, count: int, size: int, **options: Any) -> list[list[list[int]]]:
    """Labels, by step and by batch; that pixels and labels go together is checked on the way."""
    batches, result = ImageBatches(numbered(count), PLAIN, size, **options), []
    for step in range(batches.steps_per_epoch):
        parts = batches.step_batches(epoch, step)
        for part in parts:
            assert part.pixels[:, 0, 0, 0].tolist() == part.labels.tolist() and part.weight == len(part.labels)
        result.append([part.labels.tolist() for part in parts])
    return result


@given(st.integers(8, 60), st.integers(1, 9), st.integers(1, 2), st.integers(1, 2), st.integers(0, 3))
@quick
def test_an_epoch_takes_every_image_once(count: int, size: int, world: int, accumulated: int, epoch: int) -> None:
    group = world * accumulated
    ranks = [seen(epoch, count, size, group=group, rank=rank, world=world) for rank in range(world)]
    steps = ImageBatches(numbered(count), PLAIN, size, group=group).steps_per_epoch
    assert all(len(rank) == steps and all(len(step) == accumulated for step in rank) for rank in ranks)
    taken = [label for rank in ranks for step in rank for batch in step for label in batch]
    assert len(set(taken)) == len(taken)
    # Only what cannot give each batch of the last step two images is left out.
    left = count % (size * group)
    assert len(taken) == (count if left >= 2 * group or left == 0 else count - left)
    assert all(0 < len(batch) <= size for rank in ranks for step in rank for batch in step)


def test_two_ranks_share_what_one_process_accumulates_in_another_order_each_epoch() -> None:
    together = seen(1, 40, 5, group=2)
    ranks = [seen(1, 40, 5, group=2, rank=rank, world=2) for rank in range(2)]
    assert [[step[0], other[0]] for step, other in zip(*ranks, strict=True)] == together
    # The first batches, for statistics, are those of every rank.
    first = [ImageBatches(numbered(20), PLAIN, 6, group=2, rank=rank, world=2).first(2) for rank in range(2)]
    one, other = ([batch.labels.tolist() for batch in batches] for batches in first)
    assert one == other and [len(part) for part in one] == [6, 6]
    # Epochs are shuffled differently, and the same again.
    first, second = seen(0, 30, 6, seed=3), seen(1, 30, 6, seed=3)
    assert first != second
    assert sorted(label for step in first for batch in step for label in batch) == list(range(30))
    assert seen(1, 30, 6, seed=3) == second != seen(1, 30, 6, seed=4)


@pytest.mark.parametrize("augmentation", ["crop_flip", "crop", "imagenet", "none"])
def test_threads_and_position_change_no_pixel(augmentation: str) -> None:
    torch.manual_seed(0)
    images = ImageSet(torch.arange(20), [""], torch.randint(256, (20, 3, 12, 10), dtype=torch.uint8))

    def batches(workers: int, size: int) -> ImageBatches:
        return ImageBatches(images, Preprocessing((0.5,), (0.5,), 8, 8), size, augmentation, seed=1, workers=workers)

    def by_label(*parts: Any) -> dict[int, Tensor]:
        return {int(n): image for part in parts for n, image in zip(part.labels, part.pixels, strict=True)}

    def same(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    serial = [batches(0, 5).step_batches(2, step)[0] for step in range(4)]
    threaded = batches(3, 5)
    for step, expected in enumerate(serial):
        (found,) = threaded.step_batches(2, step)
        assert torch.equal(found.pixels, expected.pixels) and torch.equal(found.labels, expected.labels)
    # From the middle of an epoch, as a resumed run begins.
    assert torch.equal(batches(2, 5).step_batches(2, 3)[0].pixels, serial[3].pixels)
    # An image is what it is in whatever batch it lies.
    whole = by_label(batches(0, 20).step_batches(2, 0)[0])
    assert same(by_label(*serial), whole)
    assert same(by_label(batches(0, 20).step_batches(3, 0)[0]), whole) == (augmentation == "none")


def shifts(how: str, image: Tensor) -> set[tuple[int, int, bool]]:
    """Every (down, right, mirrored) that 300 draws give, found by comparing with all there could be."""
    padded, known = torch.nn.functional.pad(image, (PADDING,) * 4), {}
    height, width = image.shape[1:]
    for top in range(2 * PADDING + 1):
        for left in range(2 * PADDING + 1):
            cut = padded[:, top : top + height, left : left + width]
            known[cut.numpy().tobytes()] = (top, left, False)
            known[cut.flip(2).numpy().tobytes()] = (top, left, True)
    return {known[augment(image, how, PLAIN, Random(number)).contiguous().numpy().tobytes()] for number in range(300)}


def test_crops_are_shifts_by_up_to_four_and_half_are_mirrored() -> None:
    torch.manual_seed(0)
    image = torch.randint(1, 256, (2, 9, 11), dtype=torch.uint8)
    cropped, flipped = shifts("crop", image), shifts("crop_flip", image)
    for found in (cropped, flipped):
        assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(9))
    assert not any(mirrored for _, _, mirrored in cropped)
    # Of 81 shifts, 150 draws should meet 81 (1 - e^(-150/81)) = 68.
    mirrored = sum(each[2] for each in flipped)
    assert mirrored > 55 and len(flipped) - mirrored > 55


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**31))
@quick
def test_rectangles_lie_in_the_image(height: int, width: int, seed: int) -> None:
    top, left, h, w = random_rectangle(height, width, Random(seed))
    assert h > 0 and w > 0 and top >= 0 and left >= 0 and top + h <= height and left + w <= width


def test_rectangles_have_the_areas_and_ratios_that_are_asked_for() -> None:
    drawn = [random_rectangle(300, 300, Random(number)) for number in range(2000)]
    areas = torch.tensor([h * w / 90000 for _, _, h, w in drawn])
    ratios = torch.tensor([w / h for _, _, h, w in drawn])
    assert float(areas.min()) > 0.075 and 0.45 < float(areas.mean()) < 0.58
    assert 0.73 < float(ratios.min()) < 0.78 and 1.28 < float(ratios.max()) < 1.37
    assert float(ratios.log().mean().abs()) < 0.02
    # 2 x 400, too long for any: whatever the area, w / h of at most 4/3 wants h > 2 unless the area is tiny.
    assert (0, (400 - 3) // 2, 2, 3) in {random_rectangle(2, 400, Random(number)) for number in range(30)}


def test_what_cannot_be_batched_is_refused() -> None:
    refused: dict[str, dict[str, Any]] = {
        "crop_flip, crop, imagenet, none": {"augmentation": "mixup"}, "--image_size": {"augmentation": "imagenet"},
        "at least 8 images": {"group": 4}, "batch size of at least 1": {"batch_size": 0},
    }  # fmt: skip
    for words, options in refused.items():
        with pytest.raises(ValueError, match=f"ImageBatches: expected.*{words}"):
            ImageBatches(numbered(7), PLAIN, **{"batch_size": 2, **options})


def test_corrupted_labels_are_never_the_true_ones_and_the_rest_stay() -> None:
    images = ImageSet(torch.arange(1000) % 10, list("0123456789"), torch.zeros(1000, 1, 2, 2, dtype=torch.uint8))
    found = corrupt(images, 400, seed=1)
    changed = found.labels != images.labels
    assert int(changed.sum()) == 400 == len(found.images) == len(found.wrong)
    assert torch.equal(found.labels[changed], found.wrong)
    assert torch.equal(found.images.labels, images.labels[changed])
    assert not (found.images.labels == found.wrong).any()
    # All nine other classes alike: 44 each, within four deviations.
    steps = ((found.wrong - found.images.labels) % 10).bincount(minlength=10)
    assert steps[0] == 0 and int((steps[1:] - 400 / 9).abs().max()) < 4 * (400 * 8 / 81) ** 0.5
    assert torch.equal(corrupt(images, 400, seed=1).labels, found.labels)
    assert not torch.equal(corrupt(images, 400, seed=2).labels, found.labels)
    with pytest.raises(ValueError, match="between 1 and 7 images"):
        corrupt(numbered(7), 8, seed=0)
    # Other labels take the place of the set's.
    (batch,) = ImageBatches(numbered(6), PLAIN, 6, labels=torch.arange(6) + 100).step_batches(0, 0)
    assert (batch.labels - 100).tolist() == batch.pixels[:, 0, 0, 0].tolist()
