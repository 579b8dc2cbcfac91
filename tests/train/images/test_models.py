"""Image models from scratch: the papers' counts, and what was put right in transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tritonsparse.flops import layer_macs
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from tritonsparse.selection import select
from tritonsparse.train.images.models import IMAGE_MODELS, build_model, load_model

CLASSES = [str(number) for number in range(1000)]


# STR's own counts (its csv of budgets; arXiv:2002.03231): ResNet-50 without the 100,352 of its average pool.
@pytest.mark.parametrize(
    ("name", "layers", "depthwise", "weights", "macs"),
    [("resnet50", 54, 0, 25_502_912, 4_089_184_256), ("mobilenet_v1", 28, 13, 4_209_088, 568_740_352)],
)
def test_weights_and_multiply_adds_are_str_s(name: str, layers: int, depthwise: int, weights: int, macs: int) -> None:
    with torch.device("meta"):
        model = build_model(name, CLASSES, 3, 224).eval()
        found = layer_macs(model, pixel_values=torch.empty(1, 3, 224, 224))
    sizes = {name: model.get_submodule(name).weight.numel() for name in found}
    assert (len(found), sum(sizes.values()), sum(found.values())) == (layers, weights, macs)
    # Depthwise convolutions are dense by default and sparse when named; all else is sparse.
    chosen, skipped = select(model, None, None)
    assert len(chosen) == layers - depthwise
    assert [skip.reason for skip in skipped] == ["depthwise convolution"] * depthwise
    assert len(select(model, ["*"], None)[0]) == layers


def test_mobilenet_trains_without_its_dropout_and_with_torch_s_momentum() -> None:
    model = build_model("mobilenet_v1", CLASSES[:10], 3, 224)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.0]
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize("name", [name for name in IMAGE_MODELS if "resnet" in name and "50" not in name])
def test_every_small_preset_takes_grey_images_and_knows_its_classes(name: str) -> None:
    model = build_model(name, ["cat", "dog", "cow"], 1, 28)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "cow"} and model.config.label2id["cow"] == 2
    assert getattr(model.config, "image_size", 28) == 28
    if name.startswith("resnet8"):
        assert model(torch.randn(2, 1, 28, 28)).logits.shape == (2, 3)


def test_a_saved_model_gets_a_new_head_for_other_classes_and_an_unknown_preset_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, widths=[4, 4, 8], num_labels=10))
    model.save_pretrained(tmp_path)
    same, other = load_model(str(tmp_path), CLASSES[:10]), load_model(str(tmp_path), ["a", "b"])
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    assert other.classifier.weight.shape == (2, 8) and other.config.id2label == {0: "a", 1: "b"}
    assert torch.equal(other.conv.weight, model.conv.weight)
    with pytest.raises(ValueError, match=r"preset: expected one of .*resnet20.*, got 'resnet9'"):
        build_model("resnet9", CLASSES, 3, 32)
