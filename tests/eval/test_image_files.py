"""One way to pixels, what Pillow or the standard makes of every kind of file: from a folder as from `datasets`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tritonsparse.eval import labelled_images
from tritonsparse.eval.image_files import UnfitImage
from tritonsparse.eval.image_sets import decode, load_images

RAMP = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 12, 4)).astype(np.uint8)
RGB = Image.fromarray(COLOURS[..., :3])


def packed(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def turned(orientation: int, form: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return packed(RGB, form, exif=exif)


def as_pixels(image: Image.Image, channels: int) -> Tensor:
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1)


PALETTE = RGB.quantize(16)
FILES = {
    "CMYK": packed(RGB.convert("CMYK"), "TIFF"), "RGBA": packed(Image.fromarray(COLOURS), "PNG"),
    "LA": packed(Image.fromarray(COLOURS[..., :2], "LA"), "PNG"), "one bit": packed(RGB.convert("1"), "PNG"),
    "palette": packed(PALETTE, "PNG"), "transparent palette": packed(PALETTE, "PNG", transparency=bytes(range(16))),
    "webp": packed(RGB, "WEBP", lossless=True), "bmp": packed(RGB, "BMP"),
    "animation": packed(RGB, "GIF", save_all=True, append_images=[ImageOps.invert(RGB)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_files_become_what_pillow_converts_their_first_frame_to(kind: str, channels: int) -> None:
    with Image.open(io.BytesIO(FILES[kind])) as image:
        assert torch.equal(decode(FILES[kind], channels), as_pixels(image, channels))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_the_tag(orientation: int) -> None:
    array = COLOURS[..., :3]
    # The EXIF standard: what the 0th row and column of the file are.
    upright = {
        1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.swapaxes(0, 1),
        6: array[::-1].swapaxes(0, 1), 7: array[::-1, ::-1].swapaxes(0, 1), 8: array[:, ::-1].swapaxes(0, 1),
    }[orientation]  # fmt: skip
    assert torch.equal(decode(turned(orientation), 3), torch.from_numpy(upright.copy()).permute(2, 0, 1))
    assert decode(turned(orientation, "JPEG"), 1).shape[1:] == upright.shape[:2]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_rounded_to_eight(channels: int, form: str) -> None:
    expected = torch.from_numpy(np.rint(RAMP / 257).astype(np.uint8)).expand(channels, -1, -1)
    assert torch.equal(decode(packed(Image.fromarray(RAMP), form), channels), expected)


def test_what_has_no_white_or_is_damaged_is_refused_by_name(monkeypatch: Any) -> None:
    jpeg, png = packed(RGB, "JPEG"), packed(RGB, "PNG")
    for data, words in (
        (packed(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "TIFF of mode 'F'.*white is not known; convert it"),
        (packed(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "TIFF of mode 'I'.*white is not known; convert it"),
        (b"", "0 bytes of no format"), (b"<html>", "6 bytes of no format"), (png[:40], "replace or remove it"),
        (jpeg[: len(jpeg) // 2], "truncated"), (png[: len(png) // 2], "truncated"), (png[:60] + b"x" * 40, "remove it"),
    ):  # fmt: skip
        with pytest.raises(UnfitImage, match=f"(?i)^load_images: expected .* got a.png.*{words}"):
            decode(data, 3, "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnfitImage, match=r"a.png \(Image size \(96 pixels\) exceeds limit"):
        decode(png, 3, "a.png")


@pytest.mark.parametrize("small", [True, False])
def test_folders_and_datasets_give_the_same_pixels(tmp_path: Path, monkeypatch: Any, small: bool) -> None:
    """Whether they are decoded at once or when asked; of different sizes too."""
    monkeypatch.setattr(labelled_images, "IN_MEMORY", 1 << 29 if small else 0)
    files = [*FILES.values(), turned(6), packed(Image.fromarray(RAMP), "PNG"), turned(3, "JPEG")]
    for number, data in enumerate(files):
        folder = tmp_path / "data" / "train" / f"c{number:02}"
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(data)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"c{n:02}" for n in range(len(files))])}
    )
    rows = {"image": [{"bytes": data, "path": None} for data in files], "label": list(range(len(files)))}
    hub = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: datasets.DatasetDict(train=hub))
    ours, theirs = load_images(None, folder=tmp_path / "data")["train"], load_images("someone/images")["train"]
    assert ours.classes == theirs.classes and ours.labels.tolist() == theirs.labels.tolist()
    for number, data in enumerate(files):
        assert torch.equal(ours.image(number), decode(data, 3)) and torch.equal(theirs.image(number), decode(data, 3))
    # By file here, by row there.
    path = tmp_path / "data" / "train" / "c01" / "a.png"
    path.write_bytes(b"")
    rows["image"][1] = {"bytes": b"", "path": None}
    bad = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: datasets.DatasetDict(train=bad))
    for load, name in (
        (lambda: load_images(None, folder=tmp_path / "data"), str(path)),
        (lambda: load_images("someone/images"), "row 2 of"),
    ):
        with pytest.raises(UnfitImage) as caught:
            load()["train"].image(1)
        assert name in str(caught.value)
