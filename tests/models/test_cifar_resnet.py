"""The networks for small images: the paper's counts, the shapes, and transformers' rules."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

import tritonsparse as ts
from tritonsparse.flops import layer_macs
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification


def build(**options: Any) -> CifarResNetForImageClassification:
    torch.manual_seed(0)
    return CifarResNetForImageClassification(CifarResNetConfig(**options))


# He et al., table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M parameters. The exact counts are of the text's layers:
# convolutions 432 + 6n 9 16^2 / 3 ..., two numbers a channel of every norm, 650 of the classifier.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameters_and_multiply_adds_are_the_paper_s(depth: int, millions: float) -> None:
    n = (depth - 2) // 6
    with torch.device("meta"):
        model = build(depth=depth)
    convolutions = 432 + 9 * (2 * n * 16**2 + (16 * 32 + (2 * n - 1) * 32**2) + (32 * 64 + (2 * n - 1) * 64**2))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == convolutions + 2 * (16 + 2 * n * (16 + 32 + 64)) + 650
    assert round(total / 1e6, 2 if millions < 1 else 1) == millions
    if depth == 20:
        macs = layer_macs(model.eval(), pixel_values=torch.randn(1, 3, 32, 32, device="meta"))
        # 27 16 at 32^2; 6 layers of 9 16^2 at 32^2; (9 16 32 + 5 9 32^2) at 16^2; (9 32 64 + 5 9 64^2) at 8^2; 640.
        assert sum(macs.values()) == 442_368 + 14_155_776 + 12_976_128 + 12_976_128 + 640 == 40_551_040


def test_images_of_several_sizes_run_through_both_shortcuts() -> None:
    for shortcut, (channels, side) in itertools.product(("identity", "projection"), ((3, 32), (1, 28), (1, 8))):
        model = build(depth=8, num_channels=channels, shortcut=shortcut, num_labels=7)
        output = model(torch.randn(2, channels, side, side), labels=torch.tensor([0, 6]))
        assert output.logits.shape == (2, 7)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    # The identity pads channels with zeros and has no parameters.
    block, x = build(depth=8, num_channels=1).eval().blocks[1], torch.rand(1, 16, 6, 6)
    for convolution in (block.conv1, block.conv2):
        nn.init.zeros_(convolution.weight)
    y = block(x)
    assert y.shape == (1, 32, 3, 3) and torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any() and block.projection is None


def test_it_is_saved_and_loaded_by_the_auto_classes(tmp_path: Path) -> None:
    model = build(depth=8, widths=[8, 8, 16], shortcut="projection", id2label={0: "cat", 1: "dog"}).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and AutoConfig.from_pretrained(tmp_path).widths == [8, 8, 16]
    assert again.config.id2label == {0: "cat", 1: "dog"} and again.config.num_labels == 2
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x).logits, model(x).logits)
    assert torch.equal(again(x, return_dict=False)[0], model(x).logits)


def test_convolutions_start_as_he_has_them_norms_at_one_all_become_sparse_and_odd_sizes_are_refused() -> None:
    model = build(depth=8, widths=[64, 64, 64])
    # Deviation sqrt(2 / (9 64)) over 36,864 draws.
    assert float(model.blocks[0].conv1.weight.detach().std()) == pytest.approx((2 / 576) ** 0.5, rel=0.02)
    assert all((norm.weight == 1).all() for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    sparsifier = ts.sparsify(model, "static", sparsity=0.5)
    assert len(sparsifier.layers) == 8 and sparsifier.skipped == []
    cases: Any = (("depth", 18, r"6n \+ 2"), ("widths", [16, 32], "three widths"), ("shortcut", "none", "projection"))
    for name, value, words in cases:
        with pytest.raises(ValueError, match=f"CifarResNetConfig: expected.*{words}"):
            CifarResNetConfig(**{name: value})
