"""Configuration of a residual network for small images."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

__all__ = ["CifarResNetConfig"]


class CifarResNetConfig(PretrainedConfig):
    """Sizes of a residual network of three stages; the defaults are ResNet-20 (arXiv:1512.03385, section 4.2).

    depth: layers with weights, 6n + 2: 20, 32, 44, 56, 110, or 8 and 14 for something smaller.
    widths: channels of the three stages, at full, half and quarter resolution.
    shortcut: where the width changes, "identity" (the paper's option A: strided, the new channels 0, no parameters)
        or "projection" (its option B: a 1x1 convolution and a norm).
    num_channels, image_size: of the images; any size of at least 8 runs, this one is what the data is made for.

    Raises:
        ValueError: depth is not 6n + 2, there are not three rising widths, or the shortcut is neither.
    """

    model_type = "cifar_resnet"

    def __init__(
        self,
        depth: int = 20,
        widths: list[int] | tuple[int, ...] = (16, 32, 64),
        shortcut: str = "identity",
        num_channels: int = 3,
        image_size: int = 32,
        num_labels: int = 10,
        **kwargs: Any,
    ) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f"CifarResNetConfig: expected a depth of 6n + 2, got {depth}; take 8, 14, 20, 32, 44 or 56"
            )
        if len(widths) != 3 or not 0 < widths[0] <= widths[1] <= widths[2]:
            raise ValueError(
                f"CifarResNetConfig: expected three widths, none below the one before, got {list(widths)}; correct them"
            )
        if shortcut not in ("identity", "projection"):
            raise ValueError(
                f"CifarResNetConfig: expected shortcut 'identity' or 'projection', got {shortcut!r}; choose one"
            )
        self.depth = depth
        self.widths = list(widths)
        self.shortcut = shortcut
        self.num_channels = num_channels
        self.image_size = image_size
        # A saved configuration says it by its labels' names.
        if "id2label" not in kwargs:
            kwargs["num_labels"] = num_labels
        super().__init__(**kwargs)
