"""Checkpoints in 16 bits are loaded, by every program, as the float32 numbers that they hold."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tritonsparse.eval.accuracy import load_classifier
from tritonsparse.eval.bleu import load_seq2seq
from tritonsparse.eval.checkpoints import load_pretrained
from tritonsparse.eval.language_models import load_language_model
from tritonsparse.eval.speed import load_any
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from tritonsparse.models.transfo_xl import Vocabulary
from tritonsparse.train.images import models
from tritonsparse.train.text import language_presets, translation_presets
from tritonsparse.train.text.subwords import train_tokenizer

LOADERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "accuracy": ("classifier", load_classifier),
    "speed, onnx_export": ("classifier", load_any),
    "image_classification": ("classifier", lambda name: models.load_model(name, ["a", "b", "c"])),
    "bleu, agreement": ("marian", lambda name: load_seq2seq(name, "cpu")[0]),
    "translation": ("marian", lambda name: translation_presets.load_model(name)[1]),
    "perplexity, agreement": ("gpt", lambda name: load_language_model("x", name, "cpu")[0]),
    "language_modeling": ("gpt", lambda name: language_presets.load_model(name)[1]),
    "perplexity of Transformer-XL": ("transfo_xl", lambda name: load_language_model("x", name, "cpu")[0]),
}


@pytest.fixture
def saved(tmp_path: Path, marian: Any, gpt: Any, transfo_xl: Any) -> Callable[[str, torch.dtype], dict[str, Tensor]]:
    """Saves a model of a kind with what belongs to it, and returns what is in the file."""

    def save(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
        labels = {"id2label": dict(enumerate("abc")), "label2id": {"a": 0, "b": 1, "c": 2}}
        build = {
            "classifier": lambda: CifarResNetForImageClassification(
                CifarResNetConfig(depth=8, widths=[4, 4, 8], image_size=8, **labels)
            ),
            "marian": marian, "gpt": gpt, "transfo_xl": transfo_xl,
        }  # fmt: skip
        model = build[kind]()
        model.to(dtype).save_pretrained(tmp_path)
        if kind == "transfo_xl":
            words = [f"w{number}" for number in range(1, model.config.vocab_size)]
            Vocabulary(["<eos>", *words]).save(tmp_path / "vocabulary.txt")
        elif kind != "classifier":
            train_tokenizer([("a b c", "c b a")] * 3, 10).save_pretrained(tmp_path)
        return load_file(tmp_path / "model.safetensors")

    return save


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_program_gets_float32(loader: str, dtype: torch.dtype, saved: Any, tmp_path: Path, caplog: Any) -> None:
    kind, load = LOADERS[loader]
    given = saved(kind, dtype)
    assert str(dtype)[6:] in (tmp_path / "config.json").read_text()
    with caplog.at_level(logging.INFO):
        model = load(str(tmp_path))
    assert f"{str(dtype)[6:]}, are loaded as float32" in caplog.text
    found = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    # Batch norms' statistics too.
    assert len(found) > 10 and {value.dtype for value in found.values()} == {torch.float32}
    assert all(torch.equal(value, given[key].float()) for key, value in found.items() if key in given)
    # What is saved of it is float32 by its configuration too.
    assert model.config.dtype == torch.float32


def test_a_damaged_or_partial_checkpoint_is_one_sentence(saved: Any, tmp_path: Path) -> None:
    saved("classifier", torch.float32)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes(), config.read_text()
    for damage, words in (
        (lambda: weights.write_bytes(b"not weights"), "an image classifier .*; pass another"),
        (lambda: weights.write_bytes(whole[0][:-50]), "an image classifier .*; pass another"),
        (lambda: config.write_text("{"), ".*not a valid JSON file"),
        (lambda: config.write_text(whole[1].replace('"depth": 8', '"depth": 14')), "a complete checkpoint, .* without"),
        (lambda: config.write_text(whole[1].replace("4,\n    4,", "4,\n    6,")), "a complete checkpoint, .* without"),
        (weights.unlink, "an image classifier"),
    ):
        damage()
        for load in (load_classifier, lambda name: models.load_model(name, ["a", "b", "c"])):
            with pytest.raises(ValueError, match=f"expected {words}") as caught:
                load(str(tmp_path))
            assert str(tmp_path) in str(caught.value)
        weights.write_bytes(whole[0])
        config.write_text(whole[1])
    with pytest.raises(ValueError, match=r"x: expected a model .* got '/no/such'"):
        load_pretrained("x", None, "/no/such", "a model")
