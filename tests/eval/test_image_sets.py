"""Images from every kind of source, and how they are cut and normalised."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
from torch import Tensor
from transformers import AutoImageProcessor

from tritonsparse.eval import labelled_images
from tritonsparse.eval.image_sets import ImageSet, load_folder, load_images
from tritonsparse.eval.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, channel_statistics, resize_crop


def pixels(count: int, height: int = 5, width: int = 4, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_idx(folder: Path, name: str, images: np.ndarray, labels: list[int], ending: str) -> None:
    opener = gzip.compress if ending else bytes
    head = struct.pack(">HBBIII", 0, 8, 3, *images.shape)
    (folder / f"{name}-images-idx3-ubyte{ending}").write_bytes(opener(head + images.tobytes()))
    head = struct.pack(">HBBI", 0, 8, 1, len(labels))
    (folder / f"{name}-labels-idx1-ubyte{ending}").write_bytes(opener(head + bytes(labels)))


def test_the_digits_come_without_a_file_and_every_fifth_tests() -> None:
    sets = load_images("embedded")
    assert {split: len(part) for split, part in sets.items()} == {"train": 1438, "test": 359}
    train = sets["train"]
    assert isinstance(train.pixels, Tensor)
    assert train.pixels.shape == (1438, 1, 8, 8) and train.pixels.dtype == torch.uint8
    # 16 of 16 is white.
    assert int(train.pixels.max()) == 255 and train.classes == list("0123456789")
    # The set begins with the digits in their order; the fifth one, a 4, tests.
    assert train.labels[:5].tolist() == [0, 1, 2, 3, 5] and sets["test"].labels[0] == 4


def test_idx_files_are_read_as_they_lie_or_refused(tmp_path: Path) -> None:
    images = pixels(3)[..., 0]
    for ending in (".gz", ""):
        folder = tmp_path / f"idx{ending}"
        folder.mkdir()
        write_idx(folder, "train", images, [7, 0, 2], ending)
        write_idx(folder, "t10k", images[:1], [1], ending)
        sets = load_folder(folder)
        assert sorted(sets) == ["test", "train"]
        assert torch.equal(sets["train"].image(1)[0], torch.from_numpy(images[1]))
        assert sets["train"].labels.tolist() == [7, 0, 2] and len(sets["train"].classes) == 8
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="IDX file of uint8 with 3 dimensions"):
        load_folder(folder)
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="expected train-labels-idx1-ubyte beside"):
        load_folder(folder)


def test_npz_files_hold_pixels_or_files(tmp_path: Path) -> None:
    images, labels = pixels(4), np.array([0, 1, 2, 1], np.uint8)
    files = [png(image) for image in images]
    np.savez(tmp_path / "train.npz", images=images, labels=labels)
    packed, offsets = np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "val.npz", jpeg=packed, labels=labels.astype(int), offsets=offsets)
    sets = load_folder(tmp_path)
    assert sorted(sets) == ["train", "validation"]
    for index in range(4):
        assert torch.equal(sets["train"].image(index), sets["validation"].image(index))
        assert torch.equal(sets["train"].image(index), chw(images[index]))
    np.savez(tmp_path / "train.npz", x=images, y=labels)
    with pytest.raises(ValueError, match=r"arrays labels and images, .* got \['x', 'y'\]"):
        load_folder(tmp_path)


def test_folders_of_classes_are_held_where_small_and_opened_when_asked_for_elsewhere(
    tmp_path: Path, monkeypatch: Any
) -> None:
    images = pixels(3)
    for index, name in enumerate(("cat", "dog", "dog")):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name / f"{index}.png").write_bytes(png(images[index]))
    small = load_folder(tmp_path)["train"]
    assert isinstance(small.pixels, Tensor)
    monkeypatch.setattr(labelled_images, "IN_MEMORY", 0)
    train = load_folder(tmp_path)["train"]
    assert train.classes == ["cat", "dog"] and train.labels.tolist() == [0, 1, 1]
    assert not isinstance(train.pixels, Tensor)
    assert all(torch.equal(train.image(number), small.image(number)) for number in range(3))
    assert torch.equal(train.image(2), chw(images[2]))
    assert torch.equal(train.subset(torch.tensor([2, 0])).image(0), train.image(2))
    assert load_folder(tmp_path, channels=1)["train"].image(0).shape == (1, 5, 4)


def test_hub_sets_find_their_columns(monkeypatch: Any) -> None:
    images = pixels(3)
    features = Features({"img": Image(), "coarse": ClassLabel(names=["a", "b"]), "note": Value("string")})
    rows = {"img": [Pillow.fromarray(image) for image in images], "coarse": [1, 0, 1], "note": ["x"] * 3}
    part = Dataset.from_dict(rows, features=features)
    unlabelled = Dataset.from_dict({**rows, "coarse": [-1, -1, -1]}, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: DatasetDict(train=part, test=unlabelled))
    sets = load_images("someone/images")
    assert list(sets) == ["train"]  # the test split has no labels
    train = sets["train"]
    assert train.classes == ["a", "b"] and train.labels.tolist() == [1, 0, 1]
    assert isinstance(train.pixels, Tensor) and torch.equal(train.image(1), chw(images[1]))
    monkeypatch.setattr(labelled_images, "IN_MEMORY", 0)
    lazy = load_images("someone/images")["train"]
    assert not isinstance(lazy.pixels, Tensor) and torch.equal(lazy.image(1), train.image(1))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for load, words in (
        (lambda: load_folder(tmp_path), "IDX files, <split>.npz or folders of classes"),
        (lambda: load_images(None, None, None), "a dataset's name or a folder"),
        (lambda: load_images("embedded", None, tmp_path), "a dataset's name or a folder"),
        (lambda: Preprocessing.load(tmp_path), r"expected preprocessor_config\.json"),
    ):
        with pytest.raises(ValueError, match=words):
            load()


def test_the_middle_is_cut_from_the_resized_image_and_normalised() -> None:
    # Stripes that survive resizing by 1/2: columns 0..7 of value 10 k in pairs.
    image = (torch.arange(8) // 2 * 10).expand(1, 4, 8).to(torch.uint8)
    cut = Preprocessing((0.5,), (0.5,), resize=2, crop=2).cut(image)
    # Half the size is [2, 4] with columns about 0, 10, 20, 30; the middle are the columns 1 and 2.
    assert cut.shape == (1, 2, 2)
    assert (cut[0].float() - torch.tensor([[10.0, 20.0], [10.0, 20.0]])).abs().max() <= 2
    # Cutting alone takes the middle.
    image = torch.arange(36, dtype=torch.uint8).reshape(1, 6, 6)
    assert Preprocessing((0.0,), (1.0,), crop=2).cut(image).flatten().tolist() == [14, 15, 20, 21]
    assert torch.equal(Preprocessing((0.0,), (1.0,)).cut(image), image)
    # Resizing a constant keeps it, and the full rectangle is the image.
    image, varied = torch.full((3, 7, 9), 200, dtype=torch.uint8), chw(pixels(1)[0])
    assert (resize_crop(image, 1, 2, 5, 6, (4, 4)) == 200).all()
    assert torch.equal(resize_crop(varied, 0, 0, 5, 4, (5, 4)), varied)
    # Normalising gives mean zero and deviation one.
    images = ImageSet(torch.zeros(6, dtype=torch.int64), ["0"], torch.from_numpy(pixels(6)).permute(0, 3, 1, 2))
    assert isinstance(images.pixels, Tensor)
    normal = Preprocessing(*channel_statistics(images)).normalise(images.pixels).double()
    assert normal.mean(dim=(0, 2, 3)).abs().max() < 1e-6
    assert (normal.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-6
    assert channel_statistics(ImageSet(images.labels, ["0"], images.image)) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(("resize", "crop"), [(None, None), (16, 12), (None, 6)])
def test_the_saved_preprocessor_is_transformers(tmp_path: Path, resize: int | None, crop: int | None) -> None:
    ours = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), resize, crop)
    ours.save(tmp_path)
    assert Preprocessing.load(tmp_path) == ours
    processor, image = AutoImageProcessor.from_pretrained(tmp_path), pixels(1, 20, 20)[0]
    theirs = processor(images=Pillow.fromarray(image), return_tensors="pt")["pixel_values"]
    mine = ours.normalise(ours.cut(chw(image))[None])
    assert theirs.shape == mine.shape
    # Both resize bilinearly with antialiasing and round to a pixel value: at most one, 1/255 over the deviation, apart.
    assert (theirs - mine).abs().max() <= (1.01 / 255 / 0.2 if resize else 1e-5)
