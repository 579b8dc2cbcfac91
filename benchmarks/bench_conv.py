"""The products of sparse convolutions, forward, dX and dW: every distinct layer of ResNet-50 and MobileNetV1.

    python benchmarks/bench_conv.py [--model NAME] [--batch N] [--op NAME] [--quick] [--out DIR]      on a GPU
    python benchmarks/bench_conv.py --smoke                                           tiny layers, on any machine

    provider       forward                               grad_input                grad_weight
    dense random   the vendor on a random weight         the same                  the vendor
    dense masked   the vendor on Ŵ as it is              the same                  (the same: no row)
    beside         threshold_cast, then the vendor       the same                  the vendor, then threshold_backward
    inside         masked_conv2d's "fused" back end      the same                  the same
    block 50 %     the same on the half of the blocks, of 64 x 64, that an index lists; likewise 80 % and 90 % pruned

All images and the vendor's weights are channels-last, and the vendor picks its kernels by timing them. Depthwise layers
have no row of ours: their view is beside the product by rule. The first layer's input has no gradient. `of_dense` is a
provider's rate, as if it did all the work, over the vendor's on a random weight. Times are of CUDA graph replays over
inputs larger than the L2. Errors: relative RMS against float64, bounded by 1.1 times what "beside" makes. `--quick`
takes ResNet-50's 3x3 layers of 128 channels and more at 256 images. `make_plan_table.py` turns the rows of "beside" and
"inside" into what `auto` reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonsparse.kernels import _triton
from tritonsparse.kernels.block.topology import build_index_reference
from tritonsparse.kernels.conv._operands import as_image, input_flags, on_blocks
from tritonsparse.kernels.conv._tiles import Geometry
from tritonsparse.kernels.conv.conv2d import conv_op_name, masked_conv2d
from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.forward import threshold_cast

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import (
    QUICK_SAMPLES,
    SAMPLES,
    Row,
    announce,
    gated,
    input_sets,
    measure,
    parser_of,
    refuse_without_gpu,
    relative_error,
)
from reports import Report, chosen

BF16, FP32 = torch.bfloat16, torch.float32
# sigmoid(-4) = 0.018 prunes 63 % of N(0, 0.02²).
LOGIT, DEVIATION, ALPHA = -4.0, 0.02, 0.4
OPS = ("conv_forward", "conv_grad_input", "conv_grad_weight")
BLOCK, PRUNED = 64, (0.5, 0.8, 0.9)
BATCHES = (32, 256)


@dataclass(frozen=True)
class Layer:
    """A convolution of `inputs` to `outputs` channels on images of `image` pixels."""

    model: str
    inputs: int
    outputs: int
    image: tuple[int, int]
    geometry: Geometry

    @property
    def columns(self) -> int:
        """Of the weight's matrix."""
        return self.geometry.taps * self.inputs // self.geometry.groups

    @property
    def is_depthwise(self) -> bool:
        return self.geometry.groups == self.inputs > 1

    @property
    def label(self) -> str:
        """Distinct among the layers of a model."""
        height, width = self.geometry.kernel
        steps, (rows, columns) = self.geometry.stride, self.image
        return f"{self.model} {self.inputs}>{self.outputs} {height}x{width}/{steps[0]} on {rows}x{columns}"


SMOKE_LAYERS = (
    Layer("smoke", 20, 24, (5, 4), Geometry((3, 2), (2, 1), (1, 0, 1, 0))),
    Layer("smoke", 32, 16, (4, 3), Geometry((1, 1))),
)


def layers_of(name: str) -> list[Layer]:
    """The distinct convolutions of a model on images of 224 x 224, in the order in which it calls them."""
    from transformers import MobileNetV1Config, MobileNetV1Model, ResNetConfig, ResNetModel

    models: dict[str, Callable[[], nn.Module]] = {
        "resnet-50": lambda: ResNetModel(ResNetConfig()),
        "mobilenet-v1": lambda: MobileNetV1Model(MobileNetV1Config()),
    }
    found: dict[Layer, None] = {}

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
        geometry = Geometry.of(module.kernel_size, module.stride, module.padding * 2, module.dilation, module.groups)
        _, _, height, width = given[0].shape
        found[Layer(name, module.in_channels, module.out_channels, (height, width), geometry)] = None

    with torch.device("meta"):
        model = models[name]().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(note)
        model(torch.empty(1, 3, 224, 224))
    return list(found)


def decides(layer: Layer) -> bool:
    """Whether --quick measures it: an ordinary 3x3 layer with the channels of a later stage."""
    return layer.geometry.kernel == (3, 3) and layer.inputs == layer.outputs >= 128 and not layer.is_depthwise


COLUMNS = {
    "model": "", "op": "", "m": "", "n": "", "k": "", "dtype": "", "kind": "", "provider": "",
    "median_ms": ".4f", "p20_ms": ".4f", "p80_ms": ".4f", "tflop_per_s": ".1f", "of_dense": ".3f", "error": ".1e",
}  # fmt: skip


@dataclass(frozen=True)
class Operands:
    """One set of inputs; images and `dense` are channels-last, `weight` is the master's matrix, float32."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor
    dense: Tensor
    threshold: Tensor
    mask: Tensor
    alpha: Tensor

    @classmethod
    def draw(cls, layer: Layer, batch: int, dtype: torch.dtype, seed: int) -> Operands:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        random = torch.Generator(device).manual_seed(seed)

        def image(channels: int, size: tuple[int, int]) -> Tensor:
            drawn = torch.randn((batch, *size, channels), generator=random, device=device)
            return drawn.to(dtype).permute(0, 3, 1, 2)

        weight = torch.randn((layer.outputs, layer.columns), generator=random, device=device) * DEVIATION
        threshold = torch.full((1,), LOGIT, device=device)
        cutoff = threshold.sigmoid()
        weight = torch.where((weight.abs() / cutoff - 1).abs() < 1e-6, 1.01 * weight, weight)
        return cls(
            image(layer.inputs, layer.image),
            image(layer.outputs, layer.geometry.output(layer.image)),
            weight,
            as_image(weight.to(dtype), layer.geometry),
            threshold,
            weight.abs() > cutoff,
            torch.full((), ALPHA, device=device),
        )

    def view(self, kind: str) -> dict[str, Any]:
        soft = kind == "soft"
        return {"kind": kind, "threshold": self.threshold if soft else None, "mask": None if soft else self.mask}


Provider = Callable[[Operands], Tensor]


def _vendor(layer: Layer, op: str, o: Operands, weight: Tensor) -> Tensor:
    """The vendor's product, with an image-shaped weight; dW image-shaped too."""
    geometry = layer.geometry
    how = (geometry.stride, geometry.padding[:2], geometry.dilation)
    if op == "conv_forward":
        return F.conv2d(o.x.to(weight.dtype), weight, None, *how, geometry.groups)
    wanted = [op == "conv_grad_input", op == "conv_grad_weight", False]
    grads = torch.ops.aten.convolution_backward(
        o.grad_y.to(weight.dtype), o.x.to(weight.dtype), weight, None, *how, False, [0, 0], geometry.groups, wanted
    )
    grad: Tensor = grads[wanted.index(True)]
    return grad


def _matrix(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).flatten(1)


def _ours(layer: Layer, op: str, o: Operands, dtype: torch.dtype, backend: str, **view: Any) -> Tensor:
    """The op's own forward, or one half of its backward, so that routes and configurations are what a layer gets."""
    geometry = layer.geometry
    if op == "conv_forward":
        return masked_conv2d(
            o.x, o.weight, kernel=geometry.kernel, stride=geometry.stride, padding=geometry.padding,
            dilation=geometry.dilation, groups=geometry.groups, **view, backend=backend, out_dtype=dtype,
        )  # fmt: skip
    need_x = op == "conv_grad_input"
    grads = torch.ops.tritonsparse.masked_conv2d_backward(
        o.grad_y, o.x, o.weight, view.get("threshold"), view.get("mask"), None, view.get("alpha"), view.get("index"),
        view.get("input_index"), None, list(geometry.kernel), list(geometry.stride), list(geometry.padding),
        list(geometry.dilation), geometry.groups, list(view.get("block") or ()), view["kind"], backend, need_x,
        not need_x,
    )  # fmt: skip
    grad: Tensor = grads[0 if need_x else 1]
    return grad


def _providers(layer: Layer, op: str, kind: str, dtype: torch.dtype) -> dict[str, Provider]:
    on_gpu = torch.cuda.is_available() or _triton.INTERPRETED
    elementwise, ours = ("triton", "fused") if on_gpu else ("torch", "torch")

    def cast(o: Operands) -> Tensor:
        view = o.view(kind)
        w_hat, *_ = threshold_cast(
            o.weight, view["threshold"], view["mask"], kind=kind, out_dtype=dtype, backend=elementwise
        )
        return as_image(w_hat, layer.geometry)

    def beside(o: Operands) -> Tensor:
        if op != "conv_grad_weight":
            return _vendor(layer, op, o, cast(o))
        # Ŵ is only looked at for its shape, and the forward has made it.
        view, dense = o.view(kind), _matrix(_vendor(layer, op, o, o.dense))
        return threshold_backward(
            dense, o.weight, view["threshold"], view["mask"], alpha=o.alpha, kind=kind, backend=elementwise
        )[0]

    providers: dict[str, Provider] = {"beside": beside}
    if not layer.is_depthwise:
        providers["inside"] = lambda o: _ours(layer, op, o, dtype, ours, **o.view(kind), alpha=o.alpha)
    return providers


def _dense_providers(layer: Layer, op: str, masked: Sequence[tuple[Operands, Tensor]]) -> dict[str, Provider]:
    providers: dict[str, Provider] = {"dense random": lambda o: _vendor(layer, op, o, o.dense)}
    if op != "conv_grad_weight":
        views = {id(o): view for o, view in masked}
        providers["dense masked"] = lambda o: _vendor(layer, op, o, views[id(o)])
    return providers


def _exact(layer: Layer, op: str, kind: str, provider: str, o: Operands, listed: Tensor | None) -> Tensor:
    """In float64: what the provider computes, from the operands as it is given them."""
    dtype = o.x.dtype
    if op != "conv_grad_weight":
        if provider == "dense random":
            return _vendor(layer, op, o, o.dense.double())
        if listed is not None:
            return _vendor(layer, op, o, as_image((o.weight * listed).to(dtype).double(), layer.geometry))
        view = o.view(kind)
        w_hat = threshold_cast(o.weight, view["threshold"], view["mask"], kind=kind, out_dtype=dtype)[0]
        return _vendor(layer, op, o, as_image(w_hat.double(), layer.geometry))
    dense = _vendor(layer, op, o, o.dense.double())
    if provider == "dense random":
        return dense
    if listed is not None:
        return torch.where(listed, _matrix(dense), 0.0)
    view = o.view(kind)
    threshold = None if view["threshold"] is None else o.threshold.double()
    return threshold_backward(
        _matrix(dense), o.weight.double(), threshold, view["mask"], alpha=o.alpha.double(), kind=kind
    )[0]


def bench(layer: Layer, batch: int, op: str, dtype: torch.dtype, block: int, samples: int = SAMPLES) -> Iterator[Row]:
    """One row a provider; the vendor on a random weight first."""
    height, width = layer.geometry.output(layer.image)
    m = batch * height * width
    work = 2 * m * layer.outputs * layer.columns
    nbytes = layer.outputs * layer.columns * 4 + dtype.itemsize * (
        batch * layer.inputs * layer.image[0] * layer.image[1] + m * layer.outputs
    )
    operands = [Operands.draw(layer, batch, dtype, seed) for seed in range(min(8, input_sets(nbytes)))]
    facts: Row = {
        "model": layer.model, "image": list(layer.image), "batch": batch, "op": conv_op_name(op, layer.geometry),
        "m": m, "n": layer.outputs, "k": layer.columns, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    dense_ms: list[float | None] = []

    def timed(kind: str, provider: str, call: Provider, bound: float, listed: Tensor | None = None) -> Row:
        error = relative_error(call(operands[0]), _exact(layer, op, kind, provider, operands[0], listed))
        calls = [partial(call, one) for one in operands]
        row = gated(
            {**facts, "kind": kind, "provider": provider}, error, bound,
            partial(measure, calls, graph=True, samples=samples),
        )  # fmt: skip
        dense_ms.append(row["median_ms"])
        if row["median_ms"]:
            row["tflop_per_s"] = work / row["median_ms"] / 1e9
            row["of_dense"] = dense_ms[0] and dense_ms[0] / row["median_ms"]
        return row

    bounds = {}
    for kind in ("soft", "mask"):
        providers = _providers(layer, op, kind, dtype)
        allowed = relative_error(providers["beside"](operands[0]), _exact(layer, op, kind, "beside", operands[0], None))
        bounds[kind] = max(1.1 * allowed, 1e-6)
        if kind == "soft":
            masked = [
                (o, as_image(threshold_cast(o.weight, o.threshold, kind="soft", out_dtype=dtype)[0], layer.geometry))
                for o in operands
            ]
            for name, provider in _dense_providers(layer, op, masked).items():
                # The vendor rounds dW to the dtype of its operands.
                yield timed(kind, name, provider, max(bounds[kind], 5e-3 if name == "dense random" else 0.0))
        for name, provider in providers.items():
            yield timed(kind, name, provider, bounds[kind])
    inputs = layer.inputs // layer.geometry.groups
    if layer.is_depthwise or inputs % block or layer.outputs // layer.geometry.groups % block:
        return
    for pruned in PRUNED:
        shape = (layer.outputs // block, layer.columns // block)
        random = torch.Generator().manual_seed(0)
        order = torch.rand(shape, generator=random).flatten().argsort()
        flags = torch.zeros(shape, dtype=torch.bool)
        flags.view(-1)[order[: max(1, round((1 - pruned) * flags.numel()))]] = True
        flags = flags.to(operands[0].x.device)
        view: dict[str, Any] = {
            "kind": "mask",
            "index": build_index_reference(flags),
            "input_index": build_index_reference(input_flags(flags, layer.geometry)),
            "block": (block, block),
        }
        backend = "fused" if flags.is_cuda or _triton.INTERPRETED else "torch"

        def call(o: Operands, view: dict[str, Any] = view, backend: str = backend) -> Tensor:
            return _ours(layer, op, o, dtype, backend, **view)

        yield timed("mask", f"block {pruned:.0%}", call, bounds["mask"], on_blocks(flags, (block, block)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--model", choices=("resnet-50", "mobilenet-v1"), help="one of them; both by default")
    parser.add_argument("--batch", type=int, help=f"images at a time; {BATCHES} by default")
    parser.add_argument("--op", choices=OPS, help="one product; all three by default")
    args = parser.parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_conv")
    announce()
    torch.backends.cudnn.benchmark = True
    names = [args.model] if args.model else ["resnet-50"] if args.quick else ["resnet-50", "mobilenet-v1"]
    layers = SMOKE_LAYERS if args.smoke else tuple(layer for name in names for layer in layers_of(name))
    if args.quick and not args.smoke:
        layers = tuple(layer for layer in layers if decides(layer))
    batches = (2,) if args.smoke else (args.batch,) if args.batch else (256,) if args.quick else BATCHES
    cases = {
        f"{layer.label} {batch} {op}": (layer, batch, op)
        for batch in batches
        for layer in layers
        for op in ([args.op] if args.op else OPS)
        if op != "conv_grad_input" or layer.inputs > 3
    }
    cases = chosen("bench_conv", cases, args.only)
    report = Report("conv", COLUMNS, args, threshold=LOGIT, alpha=ALPHA, block=BLOCK)
    dtype, block = (FP32, 16) if args.smoke else (BF16, BLOCK)
    for layer, batch, op in cases.values():
        report.extend(bench(layer, batch, op, dtype, block, QUICK_SAMPLES if args.quick else SAMPLES))
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
