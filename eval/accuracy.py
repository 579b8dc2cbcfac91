"""Top-1 and top-5 accuracy of an image classifier, with its cross-entropy.

    python -m tritonsparse.eval.accuracy --model runs/resnet20 --data_dir fashion-mnist --split test
    python -m tritonsparse.eval.accuracy --model runs/resnet50 --dataset_name ILSVRC/imagenet-1k --split validation
    python -m tritonsparse.eval.accuracy --model RUN/best_sparse/pretrained --twin RUN/best_dense/pretrained ...

Images are prepared as the model's `preprocessor_config.json` says. Sums are exact: every image counts once. With a
twin, also how alike the two classify (`agreement.py`; AC/DC's appendix B.5), the twin being the first of the two.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .agreement import Agreement, classification
from .checkpoints import load_pretrained
from .command_line import COUNT, DEVICE, TEXT, Parser, naming, one_line, one_of
from .image_files import UnfitImage
from .image_sets import ImageSet, load_images
from .labelled_images import MATCHES, class_names, matched
from .preprocessing import Preprocessing

__all__ = ["Accuracy", "Sums", "accuracy", "accuracy_sums", "main", "twins_agreement"]


@dataclass(frozen=True)
class Accuracy:
    """top1, top5: fractions of the images whose label is the first, or among the first five logits; top5 is 1 where
    there are no more than five classes. loss: mean cross-entropy in nats. images: how many were counted."""

    top1: float
    top5: float
    loss: float
    images: int


@dataclass(frozen=True)
class Sums:
    """What ranks add up: [correct, correct in five, cross-entropy, images], float64."""

    values: Tensor

    def mean(self) -> Accuracy:
        """The sums divided by the number of images."""
        right, right5, loss, images = self.values.tolist()
        return Accuracy(right / images, right5 / images, loss / images, int(images))


@torch.no_grad()
def accuracy_sums(
    model: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 256,
    rank: int = 0,
    world: int = 1,
    labels: Tensor | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Sums:
    """The sums over images `rank`, `rank + world`, ... of a set.

    Args:
        model: `model(pixel_values=...)` returns `.logits` [B, classes]; run in evaluation mode and left as it was.
        images: the split.
        preprocessing: as the model was trained.
        batch_size: images at a time.
        rank, world: which share of them.
        labels: [n], other labels than the set's own.
        autocast: makes the context of the forward, such as `accelerator.autocast`.

    Returns:
        Sums, on the CPU. An image whose label ties with other logits counts as right where fewer than one (or
        five) of them come before it, the order being that of `torch.topk`.
    """
    device = next(model.parameters()).device
    truth = images.labels if labels is None else labels
    total = torch.zeros(4, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for pixels, indices in batches(images, preprocessing, batch_size, rank, world):
            inputs = preprocessing.normalise(pixels.to(device))
            with autocast():
                logits = model(pixel_values=inputs).logits
            logits, target = logits.float(), truth[indices].to(device)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
            loss = F.cross_entropy(logits, target, reduction="none").double().sum()
            row = [best[:, 0].sum().double(), best.sum().double(), loss, loss.new_tensor(float(len(target)))]
            total += torch.stack(row).cpu()
    finally:
        model.train(was_training)
    return Sums(total)


def accuracy(model: nn.Module, images: ImageSet, preprocessing: Preprocessing, *, batch_size: int = 256) -> Accuracy:
    """Accuracy of `model` on all of `images`; arguments as `accuracy_sums` has them."""
    return accuracy_sums(model, images, preprocessing, batch_size=batch_size).mean()


def twins_agreement(
    twin: nn.Module, model: nn.Module, images: ImageSet, preprocessing: Preprocessing, *, batch_size: int = 256
) -> Agreement:
    """How often `twin` and `model` choose the same class of an image, and the cross-entropy from the twin's to the
    model's probabilities; both get the same pixels, in evaluation mode, and are left as they were."""
    device = next(model.parameters()).device
    inputs = (
        {"pixel_values": preprocessing.normalise(pixels.to(device))}
        for pixels, _ in batches(images, preprocessing, batch_size)
    )
    return classification(twin, model, inputs)


def batches(
    images: ImageSet, preprocessing: Preprocessing, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """(pixels [B, C, H, W] uint8, their numbers [B]) of every `world`-th image from `rank` on, in order."""
    mine = torch.arange(rank, len(images), world)
    for indices in mine.split(batch_size):
        yield stacked([preprocessing.cut(images.image(index)) for index in indices.tolist()]), indices


def stacked(images: Sequence[Tensor]) -> Tensor:
    """[C, H, W] each -> [B, C, H, W].

    Raises:
        UnfitImage: they are of different sizes.
    """
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise UnfitImage(
            f"images: expected a batch of one size, got {' and '.join(map(str, shapes[:2]))}, as channels, height "
            f"and width; train with --image_size, which is saved with the model, or make all files of one size"
        )
    return torch.stack(list(images))


def parser() -> Parser:
    """The options; `main` reads them."""
    result = Parser("eval.accuracy", __doc__)
    add = result.add_argument
    add("--model", type=TEXT, required=True, help="a checkpoint folder with preprocessor_config.json")
    add("--twin", type=TEXT, default=None, help="another such folder, of the same classes, to compare with")
    add("--dataset_name", type=TEXT, default=None, help="'embedded' or a hub id")
    add("--dataset_config_name", type=TEXT, default=None)
    add("--data_dir", type=TEXT, default=None, help="a folder of IDX files, npz files or images")
    splits = ("train", "validation", "test")
    add("--split", type=one_of(splits), default="test", help=f"one of: {', '.join(splits)}")
    add(
        "--match_classes", type=one_of(MATCHES), default="name",
        help=f"of the set with the model's: by name, or one by one: one of {', '.join(MATCHES)}",
    )  # fmt: skip
    add("--batch_size", type=COUNT, default=256)
    add("--max_samples", type=COUNT, default=None)
    add("--device", type=DEVICE, default="cuda" if torch.cuda.is_available() else "cpu")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: one JSON document on stdout; what the user can mend is one sentence on stderr, status 2."""
    return one_line(lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    preprocessing = Preprocessing.load(args.model)
    data, channels = args.dataset_name or args.data_dir, len(preprocessing.mean)
    with naming("accuracy", "images that can be loaded", data, "pass another --dataset_name or --data_dir"):
        sets = load_images(args.dataset_name, args.dataset_config_name, args.data_dir, channels, (args.split,))
    if args.split not in sets:
        raise ValueError(f"accuracy: expected a split {args.split!r}, got none; choose another --split")
    images = sets[args.split]
    if args.max_samples is not None:
        images = images.subset(torch.arange(min(args.max_samples, len(images))))
    model: Any = load_classifier(args.model).to(args.device)
    expected = getattr(model.config, "num_channels", channels)
    if expected != channels:
        raise ValueError(
            f"accuracy: expected a mean for each of the {expected} channels that {args.model} reads, got {channels} in "
            f"its preprocessor_config.json; correct it"
        )
    names = class_names(model.config, args.model)
    images = matched("accuracy", images, names, args.model, args.match_classes == "position")
    twin = None if args.twin is None else _load_twin(args.twin, model, preprocessing).to(args.device)
    result = asdict(accuracy(model, images, preprocessing, batch_size=args.batch_size))
    if twin is not None:
        alike = twins_agreement(twin, model, images, preprocessing, batch_size=args.batch_size)
        other = accuracy(twin, images, preprocessing, batch_size=args.batch_size)
        result |= {"twin": {"model": args.twin, **asdict(other), **asdict(alike)}}
    print(json.dumps({"model": args.model, "split": args.split, **result}))
    return 0


def _load_twin(folder: str, model: Any, preprocessing: Preprocessing) -> nn.Module:
    twin: Any = load_classifier(folder)
    if twin.config.id2label != model.config.id2label or Preprocessing.load(folder) != preprocessing:
        raise ValueError(
            f"accuracy: expected a twin of the same classes and preprocessing, got others in {folder}; compare models "
            f"of one data set"
        )
    checked: nn.Module = twin
    return checked


def load_classifier(folder: str) -> nn.Module:
    """Any checkpoint of `AutoModelForImageClassification`, in float32; this package's models included."""
    from transformers import AutoModelForImageClassification

    import tritonsparse.models.cifar_resnet  # noqa: F401 - registers itself

    model: nn.Module = load_pretrained("accuracy", AutoModelForImageClassification, folder, "an image classifier")
    return model


if __name__ == "__main__":
    sys.exit(main())
