"""What a saved classifier is trained on with: its own labels and its own pixels, or a new head."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tritonsparse.eval import labelled_images
from tritonsparse.eval.image_files import UnfitImage
from tritonsparse.eval.preprocessing import Preprocessing
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from tritonsparse.train.images.arguments import parser
from tritonsparse.train.images.training_set import load_sets, training_batches

NAMES = ["ant", "bee", "cow"]
OWN = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), resize=(7, 6), resample=3)


@pytest.fixture
def given(tmp_path: Path) -> Any:
    """`given(*options)`: arguments for a folder of six images a split, in a new folder each call."""
    for number, (split, name) in enumerate((split, name) for split in ("train", "test") for name in NAMES * 2):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8, 3), 20 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")

    def parse(*options: str) -> argparse.Namespace:
        return parser("images", None).parse_args(
            [f"--data_dir={tmp_path / 'data'}", "--batch_size=3", "--output_dir=o", "--max_train_steps=1", *options]
        )

    return parse


def save(folder: Path, names: list[str], dtype: torch.dtype = torch.float32) -> str:
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, widths=[4, 4, 8], image_size=8, **labels))
    model.to(dtype).save_pretrained(folder)
    OWN.save(folder)
    return f"--model_name_or_path={folder}"


@pytest.mark.parametrize(
    ("names", "option", "classes", "labels"),
    [
        (["cow", "ant", "bee"], "name", ["cow", "ant", "bee"], [1, 1, 2, 2, 0, 0]),
        (["dog", "bee", "cow", "ant"], "name", ["dog", "bee", "cow", "ant"], [3, 3, 1, 1, 2, 2]),
        (["x", "y", "z"], "name", NAMES, [0, 0, 1, 1, 2, 2]),
        (["x", "y", "z"], "position", ["x", "y", "z"], [0, 0, 1, 1, 2, 2]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], "name", NAMES, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_labels_are_the_saved_models_own(
    given: Any, tmp_path: Path, names: list[str], option: str, classes: list[str], labels: list[int]
) -> None:
    sets = load_sets(given(save(tmp_path / "saved", names), f"--match_classes={option}"))
    for images in sets.values():
        assert images.classes == classes and images.labels.tolist() == labels
    with pytest.raises(ValueError, match=r"expected classes of .*, 2 such as"):
        load_sets(given(save(tmp_path / "other", ["x", "y"]), "--match_classes=position"))


def test_pixels_are_prepared_as_the_saved_model_saw_them(given: Any, tmp_path: Path) -> None:
    saved = save(tmp_path / "saved", NAMES)
    for options, expected in (
        ((), OWN), (("--image_size=5",), Preprocessing(OWN.mean, OWN.std, 5, 5, resample=3)),
    ):  # fmt: skip
        args = given(saved, *options)
        batches, preprocessing = training_batches(args, load_sets(args)["train"], 1, 0)
        assert preprocessing == expected
        assert next(batches.first(1)).pixels.shape[2:] == expected.shape
    # From scratch, the set says.
    args = given()
    images = load_sets(args)["train"]
    assert training_batches(args, images, 1, 0)[1].mean == pytest.approx(
        [float(images.pixels.double().mean()) / 255.0] * 3
    )


def test_a_half_precision_classifier_in_another_order_trains_on_in_float32(
    given: Any, tmp_path: Path, images: Any
) -> None:
    """No weight but the norms' changes at a rate of 0, so labels, head and dtype are those that were saved."""
    saved, data = save(tmp_path / "saved", ["cow", "ant", "bee"], torch.bfloat16), given().data_dir
    options = (f"--data_dir={data}", "--batch_size=3", "--method=dense", "--max_train_steps=1", "--learning_rate=0")
    document = images.train(tmp_path / "out", saved, *options)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", tmp_path / "out"))
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.float32}
    assert all(
        torch.equal(before[key].float(), after[key]) for key in before if "running" not in key and "num" not in key
    )
    assert document["preprocessing"]["resize"] == [7, 6] and Preprocessing.load(tmp_path / "out") == OWN
    line = images.refusal(tmp_path / "no", saved, *options, "--match_classes=position", f"--model_name_or_path={data}")
    assert "configuration beside the model" in line


def test_images_of_several_sizes_and_damaged_ones_are_named(given: Any, tmp_path: Path, monkeypatch: Any) -> None:
    args, odd = given(), Path(given().data_dir) / "train" / "ant" / "0.png"
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(odd)
    for limit in (1 << 29, 0):
        monkeypatch.setattr(labelled_images, "IN_MEMORY", limit)
        batches, _ = training_batches(args, load_sets(args)["train"], 1, 0)
        with pytest.raises(UnfitImage, match=r"one size, got \(3, 8, 8\) and \(3, 9, 8\).*--image_size"):
            list(batches.first(2))
        args.image_size = 8
        batches, _ = training_batches(args, load_sets(args)["train"], 1, 0)
        assert all(batch.pixels.shape[1:] == (3, 8, 8) for batch in batches.first(2))
        args.image_size = None
    whole = odd.read_bytes()
    # A large set finds out when it gets there, by threads too.
    for workers in ("0", "1"):
        args = given(f"--workers={workers}", "--image_size=8")
        odd.write_bytes(whole)
        batches, _ = training_batches(args, load_sets(args)["train"], 1, 0)
        odd.write_bytes(b"x")
        with pytest.raises(UnfitImage, match=f"got {odd}, 1 bytes"):
            [batches.step_batches(0, step) for step in range(batches.steps_per_epoch)]
