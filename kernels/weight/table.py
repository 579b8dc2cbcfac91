"""The operands of every layer's view, in device memory: what one launch over a whole model reads.

A table row holds a layer's addresses, sizes and strides. It is made once; the tensors must stay where they are, which
also lets the launches be captured in a CUDA graph.

Called by `forward_many.py`, whose kernels read the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._operands import check_estimator, check_operands, check_triton_dtype, expect
from .._triton import require
from .backward import SUM_COLUMNS
from .forward import TILE, threshold_strides

__all__ = ["GRAD", "WIDTH", "Launch", "View", "ViewTable"]

# Columns of a layer's row: addresses, then sizes and strides. `grad` is filled in by `backward_many`.
COLUMNS = (
    *("w_hat", "weight", "threshold", "mask", "grad", "grad_mask", "alpha"),
    *("n", "k", "stride_tn", "stride_tk", "block_n", "block_k", "first_sum"),
)
WIDTH = len(COLUMNS)
GRAD = COLUMNS.index("grad")


@dataclass(frozen=True)
class View:
    """One layer's operands, as `threshold_cast` and `threshold_backward` take them; all contiguous.

    Attributes:
        kind, weight, threshold, mask, grad_mask, alpha: the view of the stored weight `[N, K]`.
        w_hat: `[N, K]`, where Ŵ is written, in the dtype of the product; None for `backward_many` alone.
    """

    kind: str
    weight: torch.Tensor
    threshold: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    grad_mask: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    w_hat: torch.Tensor | None = None


@dataclass(frozen=True)
class Launch:
    """The layers that one specialisation of the kernels serves.

    Attributes:
        layers, rows: their indices; on the device, int64.
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
    rows: torch.Tensor
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
        views: one for each layer; on one device.
        backend: "torch" (the references, layer by layer) or "triton".

    Raises:
        ValueError: an operand does not fit, is not contiguous, or the layers are on several devices.
        RuntimeError: backend "triton" without triton, or off the GPU.
    """

    def __init__(self, views: Sequence[View], backend: str) -> None:
        self.views = list(views)
        self.backend = backend
        for view in self.views:
            masks = {"mask": view.mask, "grad_mask": view.grad_mask}
            check_operands("ViewTable", view.weight, view.threshold, masks, view.kind, backend)
            check_estimator("ViewTable", view.kind, view.grad_mask, view.alpha)
            expect(
                view.weight.device == self.views[0].weight.device,
                "ViewTable",
                f"all weights on {self.views[0].weight.device}",
                view.weight,
                "make one table for each device",
            )
            for name in ("w_hat", "weight", "threshold", "mask", "grad_mask"):
                tensor = getattr(view, name)
                if tensor is not None:
                    expect(tensor.is_contiguous(), "ViewTable", f"a contiguous {name}", tensor, "copy it first")
            if view.threshold is not None and view.threshold.dim() == 2 and backend == "triton":
                expect(
                    view.kind == "hard" or view.weight.shape[1] // view.threshold.shape[1] % SUM_COLUMNS == 0,
                    "ViewTable",
                    f'blocks of a multiple of {SUM_COLUMNS} columns for backend="triton"',
                    view.threshold,
                    'pass backend="torch", which takes any',
                )
            if view.w_hat is not None:
                expect(
                    view.w_hat.shape == view.weight.shape and view.w_hat.device == view.weight.device,
                    "ViewTable",
                    f"w_hat of {list(view.weight.shape)} on {view.weight.device}",
                    view.w_hat,
                    "allocate it like the weight",
                )
                check_triton_dtype("ViewTable", "w_hat", view.w_hat.dtype, backend)
            if view.alpha is not None:
                expect(
                    view.alpha.shape in ((), (1,)) and view.alpha.dtype == torch.float32,
                    "ViewTable",
                    "alpha to be one float32 value",
                    view.alpha,
                    "keep the schedule's value in a float32 tensor",
                )
        self.launches: list[Launch] = []
        if backend == "triton" and self.views:
            require("ViewTable", self.views[0].weight)
            self._plan()

    def _plan(self) -> None:
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, view in enumerate(self.views):
            if not view.weight.numel():
                continue
            # Rows that start on 16 bytes are read by wide loads: the kernels are compiled once for those, once for
            # others.
            aligned = view.weight.shape[1] % 16 == 0
            out = None if view.w_hat is None else view.w_hat.dtype
            per_block = view.threshold is not None and view.threshold.dim() == 2
            key = (view.kind, per_block, aligned, view.weight.dtype, out, view.grad_mask is None, view.alpha is None)
            groups.setdefault(key, []).append(index)
        self.launches = [self._launch(layers) for layers in groups.values()]

    def _launch(self, layers: list[int]) -> Launch:
        rows, layer_of, first, threshold_of, first_threshold, sums = [], [], [0], [], [0], 0
        views = [self.views[index] for index in layers]
        per_block = views[0].threshold is not None and views[0].threshold.dim() == 2
        for position, view in enumerate(views):
            n, k = view.weight.shape
            operands = (view.w_hat, view.weight, view.threshold, view.mask, None, view.grad_mask, view.alpha)
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in operands]
            rows.append([*addresses, n, k, *threshold_strides(view.threshold, view.weight), sums])
            layer_of += [position] * (-(-n // TILE) * -(-k // TILE))
            first.append(len(layer_of))
            if view.threshold is not None and view.kind in ("soft", "step"):
                threshold_of += [position] * view.threshold.numel()
                sums += n * (k // SUM_COLUMNS if per_block else -(-k // TILE))
            first_threshold.append(len(threshold_of))
        device, kind = views[0].weight.device, views[0].kind
        return Launch(
            layers,
            torch.tensor(layers, dtype=torch.int64, device=device),
            torch.tensor(rows, dtype=torch.int64, device=device),
            torch.tensor(layer_of, dtype=torch.int32, device=device),
            torch.tensor(first, dtype=torch.int64, device=device),
            torch.tensor(threshold_of, dtype=torch.int32, device=device),
            torch.tensor(first_threshold, dtype=torch.int64, device=device),
            [0] * len(layers),
            sums,
            {
                "SOFT": kind == "soft",
                "MASKED": kind == "mask",
                "PER_BLOCK": per_block,
                "ALIGNED": views[0].weight.shape[1] % 16 == 0,
            },
        )
