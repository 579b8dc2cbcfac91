"""The operands of every layer's view, in device memory: what one launch over a whole model reads.

A table row holds a layer's addresses, sizes and strides. It is made once; the tensors must stay where they are, which
also lets the launches be captured in a CUDA graph.

Read by `forward_many.py` and `backward_many.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._operands import check_triton_dtype, expect
from .._triton import require
from .backward import SUM_COLUMNS
from .forward import TILE, threshold_strides
from .view import View, check_view

__all__ = ["GRAD", "WIDTH", "Launch", "ViewTable", "Viewed"]

# Columns of a layer's row: addresses, then sizes and strides. `grad` is filled in by `backward_many`.
COLUMNS = (
    *("w_hat", "weight", "threshold", "mask", "grad", "grad_mask", "alpha"),
    *("n", "k", "stride_tn", "stride_tk", "block_n", "block_k", "first_sum"),
)
WIDTH = len(COLUMNS)
GRAD = COLUMNS.index("grad")


@dataclass(frozen=True)
class Viewed:
    """One layer's weight and its view, as `threshold_cast` and `threshold_backward` take them; all contiguous.

    Attributes:
        weight: `[N, K]`, as stored.
        view: of this weight.
        w_hat: `[N, K]`, where S(W) is written, in the dtype of the product; None for `backward_many` alone.
    """

    weight: torch.Tensor
    view: View
    w_hat: torch.Tensor | None = None


@dataclass(frozen=True)
class Launch:
    """The layers that one specialisation of the kernels serves.

    Attributes:
        layers: their indices.
        table: `[layers, WIDTH]`, int64.
        layer_of: `[tiles]`, int32, the row of each 64 x 64 tile.
        first: `[layers + 1]`, int64, the first tile of each row.
        threshold_of: `[elements]`, int32, the row of each threshold element.
        first_threshold: `[layers + 1]`, int64, the first element of each row.
        grad_addresses: what the table's column of gradients holds.
        sums: terms of threshold gradients that the first stage of the sum writes.
        options: compile-time arguments of the kernels.
    """

    layers: list[int]
    table: torch.Tensor
    layer_of: torch.Tensor
    first: torch.Tensor
    threshold_of: torch.Tensor
    first_threshold: torch.Tensor
    grad_addresses: list[int]
    sums: int
    options: dict[str, bool]


class ViewTable:
    """The views of a model's layers, checked, and what a launch over them needs.

    Args:
        layers: one for each layer; on one device.
        backend: "torch" (the references, layer by layer) or "triton".

    Raises:
        ValueError: an operand does not fit, is not contiguous, or the layers are on several devices.
        RuntimeError: backend "triton" without triton, or off the GPU.
    """

    def __init__(self, layers: Sequence[Viewed], backend: str) -> None:
        self.layers = list(layers)
        self.backend = backend
        for layer in self.layers:
            _check(layer, self.layers[0].weight.device, backend)
        self.launches: list[Launch] = []
        if backend == "triton" and self.layers:
            require("ViewTable", self.layers[0].weight)
            self._plan()

    def _plan(self) -> None:
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, layer in enumerate(self.layers):
            if not layer.weight.numel():
                continue
            # Rows that start on 16 bytes are read by wide loads: the kernels are compiled once for those, once for
            # others.
            aligned = layer.weight.shape[1] % 16 == 0
            out = None if layer.w_hat is None else layer.w_hat.dtype
            view = layer.view
            optional = (view.grad_mask is None, view.alpha is None)
            groups.setdefault((view.kind, view.per_block, aligned, layer.weight.dtype, out, *optional), []).append(
                index
            )
        self.launches = [self._launch(indices) for indices in groups.values()]

    def _launch(self, indices: list[int]) -> Launch:
        rows, layer_of, first, threshold_of, first_threshold, sums = [], [], [0], [], [0], 0
        layers = [self.layers[index] for index in indices]
        for position, layer in enumerate(layers):
            weight, view = layer.weight, layer.view
            n, k = weight.shape
            operands = (layer.w_hat, weight, view.threshold, view.mask, None, view.grad_mask, view.alpha)
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in operands]
            rows.append([*addresses, n, k, *threshold_strides(view.threshold, weight), sums])
            layer_of += [position] * (-(-n // TILE) * -(-k // TILE))
            first.append(len(layer_of))
            if view.threshold is not None and view.kind in ("soft", "step"):
                threshold_of += [position] * view.threshold.numel()
                sums += n * (k // SUM_COLUMNS if view.per_block else -(-k // TILE))
            first_threshold.append(len(threshold_of))
        device, view = layers[0].weight.device, layers[0].view
        return Launch(
            indices,
            torch.tensor(rows, dtype=torch.int64, device=device),
            torch.tensor(layer_of, dtype=torch.int32, device=device),
            torch.tensor(first, dtype=torch.int64, device=device),
            torch.tensor(threshold_of, dtype=torch.int32, device=device),
            torch.tensor(first_threshold, dtype=torch.int64, device=device),
            [0] * len(indices),
            sums,
            {
                "SOFT": view.kind == "soft",
                "MASKED": view.kind == "mask",
                "PER_BLOCK": view.per_block,
                "ALIGNED": layers[0].weight.shape[1] % 16 == 0,
            },
        )


def _check(layer: Viewed, device: torch.device, backend: str) -> None:
    weight, view, w_hat = layer.weight, layer.view, layer.w_hat
    check_view("ViewTable", weight, view, backend)
    expect(weight.device == device, "ViewTable", f"all weights on {device}", weight, "make one table for each device")
    operands = {"w_hat": w_hat, "weight": weight, **view._asdict()}
    for name in ("w_hat", "weight", "threshold", "mask", "grad_mask"):
        if (tensor := operands[name]) is not None:
            expect(tensor.is_contiguous(), "ViewTable", f"a contiguous {name}", tensor, "copy it first")
    if view.threshold is not None and view.per_block and view.kind != "hard" and backend == "triton":
        expect(
            weight.shape[1] // view.threshold.shape[1] % SUM_COLUMNS == 0,
            "ViewTable",
            f'blocks of a multiple of {SUM_COLUMNS} columns for backend="triton"',
            view.threshold,
            'pass backend="torch", which takes any',
        )
    if w_hat is not None:
        expect(
            w_hat.shape == weight.shape and w_hat.device == weight.device,
            "ViewTable",
            f"w_hat of {list(weight.shape)} on {weight.device}",
            w_hat,
            "allocate it like the weight",
        )
        check_triton_dtype("ViewTable", "w_hat", w_hat.dtype, backend)
    if view.alpha is not None:
        # The table holds its address and no dtype.
        expect(
            view.alpha.dtype == torch.float32,
            "ViewTable",
            "alpha to be one float32 value",
            view.alpha,
            "keep the schedule's value in a float32 tensor",
        )
