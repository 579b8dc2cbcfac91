"""Models from scratch: the papers' sizes, ties and initialisation, and what was put right in transformers'."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, MarianMTModel

from tritonsparse.flops import layer_macs
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from tritonsparse.selection import select
from tritonsparse.train.images.models import IMAGE_MODELS, build_model, load_model
from tritonsparse.train.text import translation_presets
from tritonsparse.train.text.translation_presets import PRESETS


class Vocabulary(SimpleNamespace):
    """What the presets ask of a tokenizer."""

    def __len__(self) -> int:
        return int(self.size)


def build(preset: str, vocabulary: int, **changes: Any) -> MarianMTModel:
    return translation_presets.build_model(
        preset, Vocabulary(pad_token_id=0, eos_token_id=1, size=vocabulary), **changes
    )


@pytest.fixture(scope="module")
def tiny() -> MarianMTModel:
    torch.manual_seed(0)
    return build("transformer-tiny", 2000)


def linears(model: MarianMTModel) -> dict[str, nn.Linear]:
    """Linear layers but the output head, which is the embedding."""
    modules = model.named_modules()
    return {name: module for name, module in modules if type(module) is nn.Linear and module is not model.lm_head}


@pytest.mark.parametrize(
    ("preset", "row", "trainable", "in_linears"),
    [
        # d = 512: an encoder layer has 4 d^2 + 2 d 2048 = 3,145,728 weights, a decoder layer 4 d^2 = 1,048,576 more;
        # 6 of each; the embedding has 32,768 d = 16,777,216; the rest are biases and norms.
        ("transformer-base", (6, 512, 8, 2048, 0.1), 60.9, 44.04),
        ("transformer-big", (6, 1024, 16, 4096, 0.3), 209.9, 176.2),
    ],
)
def test_base_and_big_are_the_paper_s(preset: str, row: tuple[float, ...], trainable: float, in_linears: float) -> None:
    assert PRESETS[preset] == row
    with torch.device("meta"):
        model = build(preset, 32768)
        assert build(preset, 64, dropout=0.2).config.dropout == 0.2
    # By identity: the tied embedding counts once. The sinusoids are not trained.
    parameters = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in parameters.values()) / 1e6 == pytest.approx(trainable, abs=0.05)
    weights = sum(module.weight.numel() for module in linears(model).values())
    assert weights / 1e6 == pytest.approx(in_linears, abs=0.05)
    assert len(linears(model)) == 6 * 6 + 6 * 10


@pytest.mark.parametrize("preset", PRESETS)
def test_the_configuration_is_the_table_row(preset: str) -> None:
    with torch.device("meta"):
        config = build(preset, 64).config
    layers, d_model, heads, ffn, dropout = PRESETS[preset]
    assert (config.encoder_layers, config.decoder_layers, config.d_model) == (layers, layers, d_model)
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (heads, heads)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (ffn, ffn)
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (dropout, 0.0, 0.0)
    assert (config.activation_function, config.scale_embedding, config.vocab_size) == ("relu", True, 64)


def test_weights_are_shared_and_initialised_as_tensor2tensor_does_and_alike_from_one_seed(tiny: MarianMTModel) -> None:
    embedding = tiny.get_input_embeddings().weight
    for module in (tiny.model.encoder.embed_tokens, tiny.model.decoder.embed_tokens, tiny.get_output_embeddings()):
        assert module.weight is embedding
    for name, module in linears(tiny).items():
        bound = math.sqrt(6 / (module.in_features + module.out_features))
        largest = module.weight.abs().max().item()
        # 16,384 uniform draws come within a thousandth of the bound; their variance is bound^2 / 3.
        assert 0.999 * bound < largest <= bound, name
        assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
        assert torch.count_nonzero(module.bias) == 0, name
    assert embedding.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.02)
    assert embedding.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert torch.count_nonzero(embedding[0]) == 0
    positions = tiny.model.encoder.embed_positions.weight
    assert not positions.requires_grad and positions.shape == (1024, 128)
    # Marian keeps sines in the first half of the columns and cosines in the second.
    assert positions[3, [0, 64]].tolist() == pytest.approx([math.sin(3.0), math.cos(3.0)])
    # The same seed builds the same model.
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(build("transformer-tiny", 64, max_positions=16).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_the_generation_config_survives_saving(tiny: MarianMTModel, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    for config in (reloaded.generation_config, reloaded.config):
        assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 1)
        # Marian's defaults would force a token of another vocabulary.
        assert config.bos_token_id is None
    assert reloaded.generation_config.forced_eos_token_id is None
    saved, loaded = tiny.state_dict(), reloaded.state_dict()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


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
    chosen, skipped = select(model, None, None, output_heads=True)
    assert len(chosen) == layers - depthwise
    assert [skip.reason for skip in skipped] == ["depthwise convolution"] * depthwise
    assert len(select(model, ["*"], None)[0]) == layers


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
    with pytest.raises(ValueError, match=r"among transformer-tiny.*got 'transformer-huge'; choose one"):
        build("transformer-huge", 64)
    # MobileNet trains without its dropout and with torch's momentum.
    model = build_model("mobilenet_v1", CLASSES[:10], 3, 224)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.0]
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
