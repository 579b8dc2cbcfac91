"""What this machine has, and what each layer of a model would get on it: `tritonsparse doctor`.

    tritonsparse doctor
    tritonsparse doctor --model_name_or_path DIR --tokens 8192 --device_name "NVIDIA H200"

The model is read as a configuration alone and built without memory, so that any size is answered at once. The cost of a
layer's step is predicted from bytes and operations (kernels/plan.py names the rates), beside the dense layer's: in the
element regime, unstructured masks on any back end, it is never below it. Whether blocks would be skipped is a matter of
measurement alone (kernels/measured.py); what was not measured gets no prediction.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from tritonsparse.eval.command_line import naming
from tritonsparse.kernels import _triton
from tritonsparse.kernels.measured import block_choice
from tritonsparse.kernels.plan import CARDS, choose, device_key
from tritonsparse.pattern import Block, Channel, Pattern, parse
from tritonsparse.selection import Skip, select

__all__ = ["LayerOutlook", "environment", "outlook", "show"]

PACKAGES = ("tritonsparse", "torch", "triton", "transformers", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class LayerOutlook:
    """What one layer would run on.

    Attributes:
        name: dotted module name.
        shape: of the weight.
        regime: "element" (unstructured: the products stay dense) or "block" (whole blocks are masked).
        backend: "torch", "triton", "fused" or "block".
        why: the reason for it.
        dense_ms, sparse_ms: predicted forward, dX and dW of one step; None on a device whose rates are not known, and
            for products that skip blocks.
    """

    name: str
    shape: tuple[int, ...]
    regime: str
    backend: str
    why: str
    dense_ms: float | None
    sparse_ms: float | None


def environment() -> list[tuple[str, str]]:
    """Versions, and what torch and Triton can use here."""
    rows = [("python", platform.python_version())]
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        rows.append(("GPU", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
        card = CARDS.get(device_key(properties.name))
        known = "unknown card" if card is None else "measured" if card.measured else "derived from the data sheet"
        rows.append(("rates of predictions", known))
    else:
        rows.append(("GPU", "none that torch sees"))
    if _triton.INTERPRETED:
        usable = "interpreted on the CPU (TRITON_INTERPRET)"
    elif not _triton.AVAILABLE:
        usable = "no: it does not import"
    else:
        usable = "yes" if torch.cuda.is_available() else "no: it needs a GPU"
    rows.append(("Triton kernels", usable))
    return rows


def outlook(
    model: nn.Module,
    tokens: int,
    device_name: str | None = None,
    *,
    pattern: str = "unstructured",
    density: float = 0.2,
) -> tuple[list[LayerOutlook], list[Skip]]:
    """Back end, regime and predicted cost of every layer that `sparsify` would take, for a step of `tokens` tokens.

    Args:
        model: on any device, the meta device too; not changed.
        tokens: rows of each layer's input.
        device_name: the GPU to predict for; the one here if None.
        pattern: shape of the masks, as `sparsify` takes it.
        density: share of the blocks that a layer keeps; read for patterns of blocks.

    Returns:
        The layers, and what would stay dense and why.

    Raises:
        ValueError: less than one token, no such pattern or density, or nothing to sparsify.
    """
    shape = parse(pattern)
    if not 0 < density <= 1:
        raise ValueError(f"outlook: expected a density in (0, 1], got {density:g}; pass the share of blocks kept")
    if tokens < 1:
        raise ValueError(f"outlook: expected at least 1 token, got {tokens}; pass the tokens of a step")
    if device_name is None and torch.cuda.is_available():
        device_name = torch.cuda.get_device_name()
    modules, skipped = select(model, None, None)
    return [_of(name, module, shape, density, tokens, device_name) for name, module in modules.items()], skipped


def _of(
    name: str, module: nn.Module, pattern: Pattern, density: float, tokens: int, device_name: str | None
) -> LayerOutlook:
    regime = "block" if isinstance(pattern, Block | Channel) else "element"
    weight = module.weight
    assert isinstance(weight, Tensor)  # select
    shape = tuple(weight.shape)
    if device_name is None:
        return LayerOutlook(name, shape, regime, "torch", "no GPU", None, None)
    if weight.dim() != 2:
        why = "a convolution is not fused"
        return LayerOutlook(name, shape, regime, "triton", why, None, None)
    n, k = shape
    choice = choose("forward", tokens, n, k, torch.bfloat16, "soft", device_name)
    dense = sparse = None
    if (card := CARDS.get(device_key(device_name))) is not None:
        bandwidth = card.bandwidth
        size = weight.numel()
        product = max(2.0 * tokens * size / card.rate, 2.0 * (size + tokens * (n + k)) / bandwidth)
        # Both read the fp32 master and write it in 16 bits; the view's backward then reads g and W and writes dW.
        dense = 1e3 * (3.0 * product + 6.0 * size / bandwidth)
        sparse = dense + 1e3 * 10.0 * size / bandwidth
    if isinstance(pattern, Block):
        outputs, inputs = (k, n) if type(module) is Conv1D else (n, k)
        block = (pattern.rows, pattern.columns)
        skips, why = block_choice(outputs, inputs, block, density, torch.bfloat16, device_name)
        return LayerOutlook(name, shape, regime, "block" if skips else "triton", why, dense, None if skips else sparse)
    return LayerOutlook(name, shape, regime, "fused" if choice.fused else "triton", choice.reason, dense, sparse)


def configured(model_name_or_path: str) -> nn.Module:
    """The model of a configuration, on the meta device: its weights take no memory."""
    with naming("doctor", "a folder or a hub name with a config.json", model_name_or_path, "pass another"):
        config = AutoConfig.from_pretrained(model_name_or_path)
    factory: Any = AutoModel
    for kind, candidate in (("ForConditionalGeneration", AutoModelForSeq2SeqLM), ("ForCausalLM", AutoModelForCausalLM)):
        if any(kind in name for name in config.architectures or ()):
            factory = candidate
    with torch.device("meta"):
        return factory.from_config(config)


def show(rows: Sequence[LayerOutlook], skipped: Sequence[Skip] = (), file: Any = None) -> None:
    """Print the layers, what stays dense, and what all layers together are predicted to cost."""
    file = sys.stdout if file is None else file
    width = max((len(row.name) for row in rows), default=5)
    print(f"{'layer':<{width}}  {'shape':>13}  regime   back end  dense ms  sparse ms  why", file=file)
    for row in rows:
        shape = "x".join(map(str, row.shape))
        times = [("-" if value is None else f"{value:.3f}") for value in (row.dense_ms, row.sparse_ms)]
        head = f"{row.name:<{width}}  {shape:>13}  {row.regime:<7}  {row.backend:<8}"
        print(f"{head}  {times[0]:>8}  {times[1]:>9}  {row.why}", file=file)
    for skip in skipped:
        print(f"{skip.name:<{width}}  dense: {skip.reason}", file=file)
    known = [(row.dense_ms, row.sparse_ms) for row in rows if row.dense_ms is not None and row.sparse_ms is not None]
    if known:
        dense, sparse = sum(each for each, _ in known), sum(each for _, each in known)
        print(f"all: dense {dense:.2f} ms, sparse {sparse:.2f} ms, predicted by bytes and operations", file=file)
    if rows and all(row.regime == "element" for row in rows):
        print("element regime: no product gets shorter by unstructured zeros; what is saved is not time", file=file)
