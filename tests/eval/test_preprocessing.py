"""Preprocessors of others: the pixels that transformers' own processor makes of them, or a refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from tritonsparse.eval.preprocessing import Preprocessing
from tritonsparse.eval.speed import make_inputs

BASE: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.3, 0.35], "do_resize": True, "resample": 2}
BIT = BASE | {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 20}, "crop_size": 16}
VIT = BASE | {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
CONVNEXT = BASE | {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875, "size": {"shortest_edge": 28}}
SERVED = {
    "defaults": {"image_processor_type": "BitImageProcessor"},
    "vit defaults": {"image_processor_type": "ViTImageProcessor"},
    "shortest edge": BIT, "no crop": BIT | {"do_center_crop": False},
    "oblong": BIT | {"crop_size": {"height": 16, "width": 11}},
    "larger crop": BIT | {"crop_size": 27}, "crop alone": BIT | {"do_resize": False},
    "square": VIT, "int of a square": VIT | {"size": 16}, "oblong size": VIT | {"size": {"height": 9, "width": 16}},
    "crop_pct": CONVNEXT, "crop_pct of a large size": CONVNEXT | {"size": {"shortest_edge": 384}},
    "crop_pct beside a crop": CONVNEXT | {"do_center_crop": True, "crop_size": 28},
    "no rescaling": BIT | {"do_rescale": False}, "no normalisation": BIT | {"do_normalize": False},
    "neither": BIT | {"do_rescale": False, "do_normalize": False}, "other factor": BIT | {"rescale_factor": 1 / 127.5},
    "one mean": BIT | {"image_mean": 0.5, "image_std": 0.25},
    **{f"filter {number}": BIT | {"resample": number} for number in range(6)},
}  # fmt: skip
REFUSED = {
    "pad": (VIT | {"do_pad": True, "pad_size": {"height": 32, "width": 32}}, "do_pad"),
    "longest edge": (BIT | {"size": {"shortest_edge": 20, "longest_edge": 21}}, "BitImageProcessor"),
    "levit": (BIT | {"image_processor_type": "LevitImageProcessor"}, "LevitImageProcessor.*does more"),
    "efficientnet": (VIT | {"image_processor_type": "EfficientNetImageProcessor", "include_top": True}, "EfficientNet"),
    "two means": (BIT | {"image_mean": [0.5, 0.5], "image_std": [0.25, 0.25]}, "resize, centre crop"),
    "unknown class": (BIT | {"image_processor_type": "NoSuchProcessor"}, "Unrecognized image processor"),
    "negative size": (BIT | {"size": {"shortest_edge": -3}}, "resize, centre crop"),
}


@pytest.fixture
def configured(tmp_path: Path) -> Any:
    """Writes a preprocessor_config.json and returns its folder."""

    def write(config: dict[str, Any]) -> Path:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize("kind", SERVED)
def test_pixels_are_transformers_own(kind: str, configured: Any) -> None:
    folder = configured(SERVED[kind])
    processor, ours = AutoImageProcessor.from_pretrained(folder), Preprocessing.load(folder)
    for height, width in ((23, 31), (31, 22), (40, 40), (9, 64)):
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)
        theirs = torch.as_tensor(np.asarray(processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]))
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        found = ours.normalise(ours.cut(image)[None])
        assert found.shape == theirs.shape and found.dtype == torch.float32
        assert ours.shape is None or found.shape[2:] == ours.shape
        # Exactly, with Pillow behind both; to the rounding of a filter, with torchvision behind theirs.
        assert (found - theirs).abs().max() <= (
            1e-4 if processor.backend == "pil" else 2.1 * ours.scale / min(ours.std)
        )
    # What is saved says the same.
    ours.save(folder)
    assert Preprocessing.load(folder) == ours


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_done_here_is_refused(kind: str, configured: Any) -> None:
    config, words = REFUSED[kind]
    folder = configured(config)
    with pytest.raises(
        ValueError, match=f"^Preprocessing.load: expected preprocessor_config.json of .*{words}"
    ) as caught:
        Preprocessing.load(folder)
    assert str(folder) in str(caught.value)


def test_damaged_files_grey_images_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="not a valid JSON"):
        Preprocessing.load(tmp_path)
    assert Preprocessing.find(tmp_path / "..") is None
    grey, colour = torch.full((1, 1, 2, 2), 51, dtype=torch.uint8), torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    three = Preprocessing((0.1, 0.2, 0.3), (0.5,) * 3)
    # 51 / 255 = 0.2 in every channel.
    assert three.normalise(grey)[0, :, 0, 0].tolist() == pytest.approx([0.2, 0.0, -0.2], abs=1e-6)
    with pytest.raises(ValueError, match="expected images of 1 channels"):
        Preprocessing((0.5,), (0.5,)).normalise(colour)
    # Speed is measured on images of the size that the model gets.
    model = type("Model", (), {"main_input_name": "pixel_values", "config": type("C", (), {"num_channels": 3})})
    for crop, shape in ((None, (224, 224)), (12, (12, 12)), ((12, 8), (12, 8))):
        replace(three, crop=crop).save(tmp_path)
        assert make_inputs(model, str(tmp_path), 2, 0, "cpu")["pixel_values"].shape == (2, 3, *shape)
