"""Residual networks for small images as a transformers model (arXiv:1512.03385, section 4.2).

3x3 convolution, widths[0]
3 stages of n = (depth - 2) / 6 blocks; the first block of stages 2 and 3 halves the resolution
block: y = relu(shortcut(x) + bn(conv3x3(relu(bn(conv3x3(x))))))
mean over positions, linear layer
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from .configuration import CifarResNetConfig

__all__ = ["CifarResNetForImageClassification"]


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.new_channels = stride, outputs - inputs
        changes = stride != 1 or outputs != inputs
        self.projection = None
        if changes and shortcut == "projection":
            self.projection = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.projection is not None:
            return F.relu(y + self.projection(x))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before)))


class CifarResNetForImageClassification(PreTrainedModel):
    """The network with its classifier; convolutions start as He et al. have it (arXiv:1502.01852)."""

    config_class = CifarResNetConfig
    config: CifarResNetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.conv = _conv3x3(config.num_channels, config.widths[0])
        self.bn = nn.BatchNorm2d(config.widths[0])
        blocks, inputs = [], config.widths[0]
        for stage, width in enumerate(config.widths):
            for number in range((config.depth - 2) // 6):
                blocks.append(Block(inputs, width, 2 if stage and number == 0 else 1, config.shortcut))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, cast(int, config.num_labels))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Any, ...]:
        """One batch.

        Args:
            pixel_values: [B, num_channels, H, W], normalised.
            labels: [B], int64 class numbers; with them the mean cross-entropy is returned.

        Returns:
            `logits` [B, num_labels], and `loss` where labels are given.
        """
        x = self.blocks(F.relu(self.bn(self.conv(pixel_values))))
        logits = cast(Tensor, self.classifier(x.mean(dim=(2, 3))))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
