"""Labels are matched by the names of their classes, between splits and with a saved model, or refused by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tritonsparse.eval import accuracy as program
from tritonsparse.eval.image_sets import ImageSet, load_images
from tritonsparse.eval.labelled_images import class_names, match, matched, numbered
from tritonsparse.eval.preprocessing import Preprocessing
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from tritonsparse.train.images.models import load_model, saved_classes

NAMES = ["ant", "bee", "cow"]
SHADE = {"ant": 0, "bee": 100, "cow": 200}


def fill(folder: Path, split: str, *classes: str) -> None:
    """Two images a class, of its shade."""
    for name in classes:
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            pixels = np.full((8, 8, 3), SHADE.get(name, 50), np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def named(images: ImageSet) -> list[tuple[str, int]]:
    """(class, shade) of every image: what a label means, and what it is on."""
    return [(images.classes[label], int(images.image(i)[0, 0, 0])) for i, label in enumerate(images.labels.tolist())]


RIGHT = [(name, SHADE[name]) for name in NAMES for _ in range(2)]


def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path: Path, caplog: Any) -> None:
    for split in ("train", "test"):
        fill(tmp_path, split, *NAMES)
        for litter in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git"):
            (tmp_path / split / litter).mkdir()
            (tmp_path / split / litter / "x.png").write_bytes(b"no image")
        for name in (
            ".DS_Store",
            "Thumbs.db",
            "desktop.ini",
            "README.md",
            "ant/._0.png",
            "ant/.hidden.png",
            "ant/Thumbs.db",
        ):
            (tmp_path / split / name).write_bytes(b"x")
    # Links are followed; folders below a class are of it.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "train" / "cow").rename(tmp_path / "elsewhere" / "cow")
    (tmp_path / "train" / "cow").symlink_to(tmp_path / "elsewhere" / "cow")
    (tmp_path / "train" / "bee" / "more").mkdir()
    (tmp_path / "train" / "bee" / "1.png").rename(tmp_path / "train" / "bee" / "more" / "1.PNG")
    (tmp_path / "train" / "bee" / "notes.txt").touch()
    sets = load_images(None, folder=tmp_path)
    assert sets["train"].classes == sets["test"].classes == NAMES
    assert named(sets["train"]) == named(sets["test"]) == RIGHT
    assert "1 files in" in caplog.text and "such as notes.txt; they are left out" in caplog.text


@pytest.mark.parametrize("held_out", [("bee", "cow"), ("cow",), ("ant", "cow"), ("cow", "bee", "ant")])
def test_a_split_that_lacks_classes_has_the_labels_of_train(tmp_path: Path, held_out: Sequence[str]) -> None:
    fill(tmp_path, "train", *NAMES)
    fill(tmp_path, "val", *held_out)
    (tmp_path / "val" / "ant").mkdir(exist_ok=True)  # empty: a class without an image there
    sets = load_images(None, folder=tmp_path)
    assert sets["validation"].classes == NAMES
    assert named(sets["validation"]) == [pair for pair in RIGHT if pair[0] in held_out]


def test_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(ValueError, match=words):
            load_images(None, folder=tmp_path)

    fill(tmp_path, "train", *NAMES)
    fill(tmp_path, "val", *NAMES, "dog")
    refused(r"load_images \(validation\): expected classes of train, 3 such as .*, got 4 .* \['dog'\]; rename")
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "Bee")
    refused("'Bee' is written 'bee' there")
    # As macOS composes an accent, and as others do.
    with pytest.raises(ValueError, match=r"'me\\u0301re' is written 'm\\xe9re' there"):
        matched("x", labelled("me\u0301re"), ["m\xe9re", "b"], "y")
    with pytest.raises(ValueError, match=r"names for the labels 0, 1, ... in id2label of z, got \[1, 2\]"):
        class_names(type("Config", (), {"id2label": {1: "a", 2: "b"}}), "z")
    (tmp_path / "train" / "zebra").mkdir()
    refused(f"expected images in every folder of {tmp_path}/train, got none in zebra; remove the folder")
    (tmp_path / "train" / "loose.JPG").touch()
    refused(f"got loose.JPG beside them in {tmp_path}/train; put it into the folder of its class")
    # Only the split that is asked for is looked at.
    assert load_images(None, folder=tmp_path, splits=("validation",))["validation"].classes == ["Bee", *NAMES]


def labelled(*classes: str) -> ImageSet:
    return ImageSet(torch.arange(len(classes)), list(classes), torch.zeros(len(classes), 1, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("ours", "theirs", "labels"),
    [
        ("abc", "abc", [0, 1, 2]), ("abc", "cab", [1, 2, 0]), ("ca", "abc", [2, 0]), ("abc", "ab", None),
        ("Abc", "abc", None), ("012", "abc", [0, 1, 2]), ("abc", "012", [0, 1, 2]), ("01", "abc", None),
        # Of numbers too, the name is the label, in whatever order folders are listed.
        (["0", "1", "10", "2"], ["0", "1", "2", *"3456789", "10"], [0, 1, 10, 2]), ("ab", "012", None),
        (["crane", "crane"], ["crane", "ox", "crane"], None), (["crane", "ox", "crane"],) * 2 + ([0, 1, 2],),
        ("abc", ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2]), ("ab", ["LABEL_0", "LABEL_1", "LABEL_2"], None),
    ],
)  # fmt: skip
def test_labels_follow_names_and_numbers_follow_positions(ours: Any, theirs: Any, labels: Any, caplog: Any) -> None:
    found = match(labelled(*ours), list(theirs))
    assert (None if found is None else found.labels.tolist()) == labels
    assert found is None or found.classes == list(theirs)
    # Where positions are taken for names, it is said.
    by_position = found is not None and not set(ours) <= set(theirs)
    assert ("by their position" in caplog.text) == by_position
    if labels is None:
        with pytest.raises(ValueError, match=r"^x: expected classes of y, .*, got .*; rename them"):
            matched("x", labelled(*ours), list(theirs), "y")


def test_positions_count_where_they_are_asked_for() -> None:
    assert match(labelled("n1", "n2"), ["tench", "goldfish"]) is None
    found = match(labelled("n1", "n2"), ["tench", "goldfish"], by_position=True)
    assert found is not None and (found.labels.tolist(), found.classes) == ([0, 1], ["tench", "goldfish"])
    assert match(labelled("n1"), ["tench", "goldfish"], by_position=True) is None
    assert numbered(["0", "1"]) and numbered(["LABEL_0"]) and not numbered(["1", "0"]) and not numbered(["a"])


def save(folder: Path, names: Sequence[str]) -> CifarResNetForImageClassification:
    """A classifier that is certain of the shades of NAMES, whatever the order of its labels."""
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, widths=[4, 4, 8], image_size=8, **labels))
    model.save_pretrained(folder)
    Preprocessing((0.5,) * 3, (0.5,) * 3).save(folder)
    return model


class Shades(nn.Module):
    """Logits by the shade of an image: the label of its name in `names`."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.config, self.names, self.one = model.config, names, nn.Parameter(torch.ones(1))

    def forward(self, pixel_values: Tensor) -> Any:
        shades = ((pixel_values[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().tolist()
        rows = [[5.0 * (SHADE.get(name) == shade) for name in self.names] for shade in shades]
        return type("Output", (), {"logits": torch.tensor(rows)})


def test_accuracy_is_that_of_the_names(tmp_path: Path, document: Any, refusal: Any, monkeypatch: Any) -> None:
    fill(tmp_path, "test", "bee", "cow")
    given = ["--model", str(tmp_path / "model"), "--data_dir", str(tmp_path), "--device", "cpu"]
    for names in (NAMES, NAMES[::-1], ["cow", "bird", "bee", "ant"]):
        model = save(tmp_path / "model", names)
        with monkeypatch.context() as patch:
            patch.setattr(program, "load_classifier", lambda _, model=model, names=names: Shades(model, names))
            assert program.main(given) == 0
        assert document()["top1"] == 1.0
    for names, options, words in (
        (["Bee", "Cow"], [], "'bee' is written 'Bee' there"),
        (["ox", "cow"], [], "got 2 classes, among them ['bee']; rename them, or match them by position"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], [], "expected classes of"),
        (["a"], ["--match_classes=position"], "1 such as"),
    ):  # fmt: skip
        save(tmp_path / "model", names)
        assert program.main([*given, *options]) == 2
        assert words in refusal()
    save(tmp_path / "model", ["wasp", "ox"])
    assert program.main([*given, "--match_classes=position"]) == 0
    assert document()["images"] == 4
    Preprocessing((0.5,), (0.5,)).save(tmp_path / "model")
    assert program.main(given) == 2
    assert "a mean for each of the 3 channels" in refusal()


@pytest.mark.parametrize(
    ("names", "classes", "kept"),
    [
        (NAMES, NAMES, True), (NAMES, ["cow", "dog", "eel"], False), (NAMES, [*NAMES, "dog"], False),
        (["LABEL_0", "LABEL_1", "LABEL_2"], NAMES, True), (NAMES, ["0", "1", "2"], True),
        (NAMES, ["ant", "bee"], False),
    ],
)  # fmt: skip
def test_a_saved_head_is_kept_for_its_own_classes_alone(
    tmp_path: Path, names: list[str], classes: list[str], kept: bool, caplog: Any
) -> None:
    saved = save(tmp_path, names).state_dict()
    assert saved_classes(str(tmp_path)) == names
    with caplog.at_level(logging.WARNING):
        model: Any = load_model(str(tmp_path), classes)
    found = model.state_dict()
    heads = {key for key, value in found.items() if not torch.equal(value, saved[key])}
    assert ("is replaced by a new one" in caplog.text) == (not kept)
    # A bias begins with zeros.
    assert heads - {"classifier.bias"} == (set() if kept else {"classifier.weight"})
    assert [model.config.id2label[number] for number in range(len(classes))] == classes
