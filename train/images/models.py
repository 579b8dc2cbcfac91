"""Image classifiers from scratch by name, and saved ones made to fit a data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from tritonsparse.eval.checkpoints import load_beside, load_pretrained
from tritonsparse.eval.labelled_images import class_names, numbered
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

__all__ = ["IMAGE_MODELS", "INITIALISATIONS", "build_model", "load_model", "saved_classes"]

logger = logging.getLogger(__name__)


def _resnet(layer_type: str, hidden_sizes: tuple[int, ...], depths: tuple[int, ...]) -> Callable[..., nn.Module]:
    def build(**options: Any) -> nn.Module:
        config = ResNetConfig(layer_type=layer_type, hidden_sizes=hidden_sizes, depths=depths, **options)
        return ResNetForImageClassification(config)

    return build


def _mobilenet(**options: Any) -> nn.Module:
    # Without transformers' dropout of 0.999, which is the share that Google's code keeps.
    model = MobileNetV1ForImageClassification(MobileNetV1Config(classifier_dropout_prob=0.0, **options))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # transformers has 0.997, TensorFlow's name for what is 0.003 here; STR trains with torch's own 0.1.
            module.momentum = 0.1
    return model


def _small(depth: int, widths: Sequence[int] = (16, 32, 64)) -> Callable[..., nn.Module]:
    def build(**options: Any) -> nn.Module:
        return CifarResNetForImageClassification(CifarResNetConfig(depth=depth, widths=list(widths), **options))

    return build


IMAGE_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": _small(8),
    "resnet8-narrow": _small(8, (8, 16, 32)),
    "resnet20": _small(20),
    "resnet32": _small(32),
    "resnet56": _small(56),
    "wide-resnet14": _small(14, (32, 64, 128)),
    "resnet18": _resnet("basic", (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet50": _resnet("bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3)),
    "mobilenet_v1": _mobilenet,
}


INITIALISATIONS = ("fan_in", "fan_out")


def build_model(
    name: str, classes: Sequence[str], channels: int, side: int, initialisation: str | None = None
) -> nn.Module:
    """A model from scratch for images of `channels` channels and `side` x `side` pixels.

    Args:
        initialisation: Kaiming's normal by "fan_in" or "fan_out" for every convolution and the classifier; None = the
            model's own. Learned thresholds are absolute, so what they prune first depends on it (STR has "fan_in").

    Raises:
        ValueError: no model of that name.
    """
    if name not in IMAGE_MODELS:
        raise ValueError(f"preset: expected one of {', '.join(IMAGE_MODELS)}, got {name!r}; choose one of them")
    model: Any = IMAGE_MODELS[name](num_channels=channels, **_labels(classes))
    # Any size runs; this says what the model was made for, where its configuration has a place for it.
    if hasattr(model.config, "image_size"):
        model.config.image_size = side
    built: nn.Module = model
    if initialisation is not None:
        mode = cast(Literal["fan_in", "fan_out"], initialisation)
        for module in built.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
    return built


def load_model(path: str, classes: Sequence[str]) -> nn.Module:
    """A saved image classifier, in float32; with a new head where its classes are not `classes`.

    Labels without names (`numbered`) are taken for classes by their position.

    Raises:
        ValueError: there is none of that name, or it is damaged.
    """
    names = saved_classes(path)
    heads = _heads(path, len(classes))
    model = load_pretrained(
        "image_classification", AutoModelForImageClassification, path, "an image classifier", heads, **_labels(classes)
    )
    alike = list(classes) == names or (len(names) == len(classes) and (numbered(names) or numbered(classes)))
    if not alike:
        logger.warning(
            "image_classification: the head of %s, for %d classes from %r on, is replaced by a new one for %d classes "
            "from %r on", path, len(names), names[0], len(classes), classes[0],
        )  # fmt: skip
        new = AutoModelForImageClassification.from_config(model.config).state_dict()
        model.load_state_dict({key: new[key] for key in heads}, strict=False)
    loaded: nn.Module = model
    return loaded


def saved_classes(path: str) -> list[str]:
    """The names of a saved classifier's labels, in their order.

    Raises:
        ValueError: there is no such classifier.
    """
    config = load_beside("image_classification", path, "a configuration", lambda: AutoConfig.from_pretrained(path))
    return class_names(config, path)


def _heads(path: str, classes: int) -> list[str]:
    """Parameters whose shapes depend on the number of classes."""

    def shapes(count: int) -> dict[str, torch.Size]:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(path, num_labels=count)
            model = AutoModelForImageClassification.from_config(config)
        return {key: value.shape for key, value in model.state_dict().items()}

    ours, other = shapes(classes), shapes(classes + 1)
    return [key for key, shape in ours.items() if other[key] != shape]


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: number for number, name in enumerate(classes)}}
