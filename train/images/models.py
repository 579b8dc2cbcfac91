"""Image classifiers from scratch by name, and saved ones made to fit a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import (
    AutoModelForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from tritonsparse.eval.command_line import naming
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

__all__ = ["IMAGE_MODELS", "build_model", "load_model"]


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


def build_model(name: str, classes: Sequence[str], channels: int, side: int) -> nn.Module:
    """A model from scratch for images of `channels` channels and `side` x `side` pixels.

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
    return built


def load_model(path: str, classes: Sequence[str]) -> nn.Module:
    """A saved image classifier; with a new head where it has another number of classes."""
    with naming("image_classification", "an image classifier", path, "pass another --model_name_or_path"):
        model: nn.Module = AutoModelForImageClassification.from_pretrained(
            path, ignore_mismatched_sizes=True, **_labels(classes)
        )
    return model


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: number for number, name in enumerate(classes)}}
