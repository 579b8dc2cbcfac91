"""Inference on a CPU with weights in compressed rows: linear layers and convolutions, where that is faster.

    Y^T = W X^T + b      W [N, K] as torch.sparse_csr, X^T [K, M] dense; MKL's product

Of a 1x1 convolution X^T is the input itself, of others its unfolded copy, kh kw times as large.

Zeros are worth leaving out only where they are many and the batch fits: `use_csr` measures every layer on the input
that it gets, dense and compressed in turn, and replaces those that win. The weights are copies; there is no backward.
"""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CsrConv2d", "CsrLinear", "LayerTiming", "use_csr"]


class _Csr(nn.Module):
    """Weight [N, K] in compressed rows, and a bias [N] or None."""

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # torch says once a process that this layout is in beta.
            warnings.simplefilter("ignore", UserWarning)
            self.matrix = matrix.detach().to_sparse_csr()
        self.column = None if bias is None else bias.detach().clone()[:, None]

    def product(self, columns: Tensor) -> Tensor:
        """[K, M] -> [N, M]."""
        y = self.matrix @ columns
        return y if self.column is None else y + self.column


class CsrLinear(_Csr):
    """An `nn.Linear` for inference: [..., K] -> [..., N]."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self.product(rows.t().contiguous()).t()
        return y.reshape(*x.shape[:-1], y.shape[1])


class CsrConv2d(_Csr):
    """An `nn.Conv2d` without groups, padded with zeros, for inference: [B, C, H, W] -> [B, N, H', W']."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer.weight.flatten(1), layer.bias)
        self.kernel, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding = (0, 0) if isinstance(layer.padding, str) else layer.padding

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        height, width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                x.shape[2:], self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        if self.kernel == (1, 1) and self.padding == (0, 0):
            x = x[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        else:
            x = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        # For one image this is a view.
        columns = x.transpose(0, 1).reshape(x.shape[1], batch * height * width)
        return self.product(columns).reshape(-1, batch, height, width).transpose(0, 1)


@dataclass(frozen=True)
class LayerTiming:
    """One layer on the input that it got: sparsity, medians in seconds, and whether compressed rows were taken."""

    name: str
    sparsity: float
    dense: float
    csr: float
    used: bool


@torch.no_grad()
def use_csr(
    model: nn.Module, inputs: dict[str, Any], *, least_sparsity: float = 0.5, repeats: int = 10
) -> tuple[nn.Module, list[LayerTiming]]:
    """A copy of `model` for inference on the CPU, with compressed rows where they are measured faster.

    Args:
        model: stock modules with zeros in their weights, float32 or float64, on the CPU.
        inputs: keyword arguments of a typical forward; its batch is the one that layers are measured on.
        least_sparsity: layers with fewer zeros are not tried.
        repeats: timings of each layer and layout, in turn; their medians decide.

    Returns:
        The copy in evaluation mode, and the layers that were tried.

    Raises:
        ValueError: the model is elsewhere or of another dtype.
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"use_csr: expected a float32 or float64 model on the CPU, got {parameter.dtype} on {parameter.device}; "
            f"move it with .float().cpu()"
        )
    model = copy.deepcopy(model).eval()
    seen = _inputs_by_layer(model, inputs, least_sparsity)
    timings = []
    for name, (layer, x) in seen.items():
        compressed = CsrLinear(layer) if isinstance(layer, nn.Linear) else CsrConv2d(layer)
        dense, csr = _medians(layer, compressed, x, repeats)
        timings.append(LayerTiming(name, _sparsity(layer.weight), dense, csr, csr < dense))
        if csr < dense:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, compressed)
    return model, timings


def _sparsity(weight: Tensor) -> float:
    return 1.0 - int(torch.count_nonzero(weight)) / weight.numel()


def _is_convolution(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros" and module.padding != "same"
    )


def _inputs_by_layer(
    model: nn.Module, inputs: dict[str, Any], least_sparsity: float
) -> dict[str, tuple[nn.Linear | nn.Conv2d, Tensor]]:
    """Each layer that could be replaced, once under each of its names, with the first input that it gets."""
    found: dict[str, tuple[nn.Linear | nn.Conv2d, Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if (type(module) is not nn.Linear and not _is_convolution(module)) or _sparsity(module.weight) < least_sparsity:
            continue

        def note(module: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            found.setdefault(name, (module, arguments[0].detach().clone()))  # type: ignore[arg-type]

        handles.append(module.register_forward_pre_hook(note))
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _medians(first: nn.Module, second: nn.Module, x: Tensor, repeats: int) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 2):
        # In turn, so that both meet the same neighbours on the machine.
        for module, record in zip((first, second), times, strict=True):
            start = time.perf_counter()
            module(x)
            record.append(time.perf_counter() - start)
    # The first two of each warm caches up.
    left, right = (sorted(record[2:])[len(record[2:]) // 2] for record in times)
    return left, right
