"""Whether a product of a sparse layer should be fused (`fused/gemm.py`, `fused/grad.py`).

    unfused     the effective weight by a kernel of its own, then the dense library product
    fused       the effective weight inside the product

The answer has one of three sources, which the caller sees:

    measured    both ways were timed on this device at this shape (`plan_table.json`, from
                `benchmarks/make_plan_table.py`): the faster one
    analytic    the model below, on a card whose rates are known (`CARDS`); it compares our two ways and says nothing
                about a dense layer. It never chooses a fused dW, whose product would have to match cuBLAS's, nor a
                fused convolution
    unknown     the rates of this card are not known: unfused

The model's times, for L = M·N·K multiply-adds, memory bandwidth B and cuBLAS's rate P:

    unfused     (w + mask + x) N·K / B  +  max(2 L / P,  x (N·K + M·K + M·N) / B)
    fused       max(2 L / (r P),  (w + mask) N·K / B  +  x (M·K + M·N) / B)

with w, x and mask the bytes of a weight, of an operand and of a mask element, and r = 0.68 the rate of a product that
takes its left operand through registers, relative to cuBLAS's (triton#6812). The two are equal near 1,000 rows,
whatever N and K.
"""
# M rows of x (tokens)   N, K rows and columns of the weight

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

__all__ = ["CARDS", "CONV_OPS", "Card", "Choice", "choose", "device_key", "read_table"]

OPS = ("forward", "grad_input", "grad_weight")
# Of a convolution; what follows a space says which ("conv_forward 3x3/1x1"): times of one say nothing of another.
CONV_OPS = ("conv_forward", "conv_grad_input", "conv_grad_weight")
# Bytes of a mask element.
MASK_BYTES = {"soft": 0, "hard": 0, "step": 0, "mask": 1}
# Rate of a product whose left operand goes through registers, relative to cuBLAS's: triton#6812, 8192^3 on H100.
REGISTER_RATE = 0.68
FIELDS = ("device", "op", "m", "n", "k", "dtype", "kind", "unfused_ms", "fused_ms")


def device_key(name: str) -> str:
    """A GPU's name as the table writes it: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Card:
    """A GPU whose rates are known.

    Attributes:
        name: as `torch.cuda.get_device_name()` gives it.
        bandwidth: of a copy in device memory, bytes read and written a second.
        rate: of cuBLAS's products in 16 bits, operations a second.
        bandwidth_source, rate_source: where the figures are from.
    """

    name: str
    bandwidth: float
    rate: float
    bandwidth_source: str
    rate_source: str

    @property
    def measured(self) -> bool:
        return self.bandwidth_source.startswith("measured") and self.rate_source.startswith("measured")


# By `device_key`, and for these names only. The H100 PCIe (2.0 TB/s, 114 multiprocessors, 350 W), the H100 NVL (3.9
# TB/s, 400 W), the H200 NVL (600 W), the GH200 and slices of any of them have other rates, which are not known here.
CARDS = {
    device_key(card.name): card
    for card in (
        Card(
            "NVIDIA H200", 4.3e12, 790e12,
            "measured: a copy by PyTorch; the data sheet has 4.8",
            "measured: 8192^3 in bf16 by PyTorch; the data sheet has 989",
        ),
        Card(
            "NVIDIA H100 80GB HBM3", 3.0e12, 790e12,
            "derived: 3.35 of the data sheet, times the 0.9 that a copy reaches on the H200",
            "derived: 989 of the data sheet, times the 0.8 of the H200, which has the same die and 700 W",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Which way to compute a product.

    Attributes:
        fused: whether the effective weight is computed inside the product.
        source: "measured", "analytic" or "unknown".
        predicted_ms: of the chosen way: the median measured at this very m, or the model's; else None.
        reason: one sentence for a report.
    """

    fused: bool
    source: str
    predicted_ms: float | None
    reason: str


@functools.cache
def read_table() -> tuple[dict[str, Any], ...]:
    """The measurements this package came with, checked.

    Raises:
        ValueError: an entry lacks a field; the file was not made by `benchmarks/make_plan_table.py`.
    """
    text = resources.files(__package__).joinpath("plan_table.json").read_text(encoding="utf-8")
    entries = tuple(json.loads(text)["entries"])
    for entry in entries:
        if set(entry) != set(FIELDS):
            raise ValueError(
                f"read_table: expected entries of plan_table.json to have the fields {', '.join(FIELDS)}, got "
                f"{', '.join(entry)}; make the file with benchmarks/make_plan_table.py"
            )
    return entries


def _measured(
    op: str, m: int, n: int, k: int, dtype: str, kind: str, device: str, table: tuple[dict[str, Any], ...]
) -> Choice | None:
    """The measurement of this layer at the number of rows nearest to m, if one lies within a factor of two."""
    key = {"device": device, "op": op, "n": n, "k": k, "dtype": dtype, "kind": kind}
    rows = [entry for entry in table if all(entry[name] == value for name, value in key.items())]
    near = [entry for entry in rows if m <= 2 * entry["m"] and entry["m"] <= 2 * m]
    if not near:
        return None
    entry = min(near, key=lambda entry: (max(m, entry["m"]) / min(m, entry["m"]), entry["m"]))
    fused_ms, unfused_ms = entry["fused_ms"], entry["unfused_ms"]
    fused = fused_ms < unfused_ms
    reason = (
        f"{op} [{entry['m']}, {n}, {k}] on {device}: fused {fused_ms:.4g} ms, unfused {unfused_ms:.4g} ms, "
        f"{'fused' if fused else 'unfused'} is faster"
    )
    return Choice(fused, "measured", min(fused_ms, unfused_ms) if entry["m"] == m else None, reason)


def _analytic(op: str, m: int, n: int, k: int, dtype: torch.dtype, kind: str, device: str) -> Choice:
    card = CARDS.get(device)
    if card is None:
        return Choice(False, "unknown", None, f"{op} [{m}, {n}, {k}]: unknown card {device}, fused only where measured")
    if op.startswith(CONV_OPS):
        return Choice(False, "analytic", None, f"{op} [{m}, {n}, {k}]: fused only where it was measured faster")
    if op == "grad_weight":
        return Choice(False, "analytic", None, "grad_weight: fused only where it was measured faster")
    x = dtype.itemsize
    # float32 masters; float32 products run at half the rate of 16 bits as tf32, and slower in full float32.
    rate = card.rate if x == 2 else card.rate / 2
    work, weights, rows = 2.0 * m * n * k / rate, n * k / card.bandwidth, x * (m * k + m * n) / card.bandwidth
    master = (4 + MASK_BYTES[kind]) * weights
    unfused = master + x * weights + max(work, x * weights + rows)
    fused = max(work / REGISTER_RATE, master + rows)
    reason = (
        f"{op} [{m}, {n}, {k}]: by bytes and operations {1e6 * fused:.3g} us fused, {1e6 * unfused:.3g} us unfused, "
        f"at {card.bandwidth / 1e12:.3g} TB/s and {rate / 1e12:.3g} TFLOP/s"
    )
    return Choice(fused < unfused, "analytic", 1e3 * min(fused, unfused), reason)


def choose(
    op: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    kind: str,
    device_name: str,
    *,
    table: tuple[dict[str, Any], ...] | None = None,
) -> Choice:
    """Whether to fuse a product with its effective weight, and on what grounds.

    A function of its arguments and the packaged table: two processes and two calls agree.

    Args:
        op: "forward", "grad_input" or "grad_weight"; of a convolution, what `conv/conv2d.py`'s `conv_op_name` calls it.
        m: rows of x; of a convolution, pixels of the result.
        n, k: rows and columns of the weight, as stored.
        dtype: of x and the product.
        kind: of the view.
        device_name: as `torch.cuda.get_device_name()` gives it.
        table: entries to use instead of the packaged ones.

    Returns:
        The choice. Source "analytic" compares our two ways and claims nothing against a dense layer; "unknown" says
        that nothing is known of this card, and never fuses.

    Raises:
        ValueError: `op` or `kind` is unknown, or a size is negative.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.plan import choose
        >>> choose("forward", 64, 4096, 4096, torch.bfloat16, "soft", "NVIDIA H200").fused
        True
        >>> choose("forward", 8192, 4096, 4096, torch.bfloat16, "soft", "NVIDIA H200").fused
        False
    """
    if op.partition(" ")[0] not in (*OPS, *CONV_OPS) or kind not in MASK_BYTES:
        raise ValueError(
            f"choose: expected op in {[*OPS, *CONV_OPS]} and kind in {list(MASK_BYTES)}, got {op!r} and {kind!r}; "
            f"pass the product's name and the view's kind"
        )
    if min(m, n, k) < 0:
        raise ValueError(f"choose: expected sizes of 0 or more, got {[m, n, k]}; pass the shape of the product")
    device = device_key(device_name)
    name = str(dtype).removeprefix("torch.")
    table = read_table() if table is None else table
    return _measured(op, m, n, k, name, kind, device, table) or _analytic(op, m, n, k, dtype, kind, device)
