"""The products of sparse convolutions, forward, dX and dW: every distinct layer of ResNet-50 and MobileNetV1.

    python benchmarks/bench_conv.py [--model NAME] [--batch N] [--op NAME] [--quick] [--out DIR]      on a GPU
    python benchmarks/bench_conv.py --smoke                                           tiny layers, on any machine

    provider       forward                               grad_input                grad_weight
    dense random   cuDNN on a random weight              the same                  cuDNN
    dense masked   cuDNN on Ŵ as it is                   the same                  (the same: no row)
    unfused        threshold_cast, then cuDNN            the same                  cuDNN, then threshold_backward
    fused          fused_conv2d                          the same                  the same
    block 50 %     the same on the half of the blocks, of 64 x 64, that a topology keeps; likewise 80 % and 90 % pruned

All images and cuDNN's weights are channels-last, and cuDNN picks its kernels by timing them. Depthwise layers have no
fused row: they are unfused by rule. The first layer's input has no gradient. `of_dense` is a provider's rate, as if it
did all the work, over cuDNN's on a random weight. Times are of CUDA graph replays over inputs larger than the L2.
Errors: relative RMS against float64, bounded by 1.1 times what the unfused products make. `--quick` takes ResNet-50's
3x3 layers of 128 channels and more at 256 images. `make_plan_table.py` names the unfused and the fused rows, and
turns them into what `auto` reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MobileNetV1Config, MobileNetV1Model, ResNetConfig, ResNetModel

from tritonsparse.kernels import _triton
from tritonsparse.kernels.block.topology import Topology
from tritonsparse.kernels.conv._operands import as_image
from tritonsparse.kernels.conv.conv2d import conv_op_name, fused_conv2d
from tritonsparse.kernels.conv.geometry import Geometry
from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.view import View

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
import harness
from harness import Row, announce, input_sets, measure, refuse_without_gpu, relative_error
from make_plan_table import PROVIDERS
from reports import Report, chosen

BF16, FP32 = torch.bfloat16, torch.float32
# sigmoid(-4) = 0.018 prunes 63 % of N(0, 0.02²).
LOGIT, DEVIATION, ALPHA = -4.0, 0.02, 0.4
OPS = ("conv_forward", "conv_grad_input", "conv_grad_weight")
BLOCK, PRUNED = 64, (0.5, 0.8, 0.9)
BATCHES = (32, 256)
UNFUSED, FUSED = PROVIDERS
BACKEND = "triton" if torch.cuda.is_available() or _triton.INTERPRETED else "torch"


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
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet-50": lambda: ResNetModel(ResNetConfig()),
    "mobilenet-v1": lambda: MobileNetV1Model(MobileNetV1Config()),
}


def layers_of(name: str) -> list[Layer]:
    """The distinct convolutions of a model on images of 224 x 224, in the order in which it calls them."""
    found: dict[Layer, None] = {}

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
        geometry = Geometry.of(module.kernel_size, module.stride, module.padding * 2, module.dilation, module.groups)
        _, _, height, width = given[0].shape
        found[Layer(name, module.in_channels, module.out_channels, (height, width), geometry)] = None

    with torch.device("meta"):
        model = MODELS[name]().eval()
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
    views: dict[str, View]

    @classmethod
    def draw(cls, layer: Layer, batch: int, dtype: torch.dtype, seed: int) -> Operands:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        random = torch.Generator(device).manual_seed(seed)

        def image(channels: int, size: tuple[int, int]) -> Tensor:
            drawn = torch.randn((batch, *size, channels), generator=random, device=device)
            return drawn.to(dtype).permute(0, 3, 1, 2)

        weight = torch.randn((layer.outputs, layer.columns), generator=random, device=device) * DEVIATION
        threshold, alpha = torch.full((1,), LOGIT, device=device), torch.full((), ALPHA, device=device)
        cutoff = threshold.sigmoid()
        weight = torch.where((weight.abs() / cutoff - 1).abs() < 1e-6, 1.01 * weight, weight)
        soft, mask = View("soft", threshold, alpha=alpha), View("mask", mask=weight.abs() > cutoff, alpha=alpha)
        x, grad_y = image(layer.inputs, layer.image), image(layer.outputs, layer.geometry.output(layer.image))
        return cls(x, grad_y, weight, as_image(weight.to(dtype), layer.geometry), {"soft": soft, "mask": mask})


@dataclass(frozen=True)
class Product:
    """One op of one layer. dW is a matrix."""

    layer: Layer
    op: str

    def library(self, o: Operands, weight: Tensor) -> Tensor:
        """cuDNN's (on a CPU torch's own), with an image-shaped weight in whose dtype all is."""
        geometry = self.layer.geometry
        how = (geometry.stride, geometry.padding[:2], geometry.dilation)
        if self.op == "conv_forward":
            return F.conv2d(o.x.to(weight.dtype), weight, None, *how, geometry.groups)
        wanted = [self.op == "conv_grad_input", self.op == "conv_grad_weight", False]
        grads = torch.ops.aten.convolution_backward(
            o.grad_y.to(weight.dtype), o.x.to(weight.dtype), weight, None, *how, False, [0, 0], geometry.groups, wanted
        )
        return grads[0] if wanted[0] else grads[1].permute(0, 2, 3, 1).flatten(1)

    def w_hat(self, o: Operands, view: View, backend: str) -> Tensor:
        cast = threshold_cast(o.weight, view, out_dtype=o.x.dtype, backend=backend)
        return as_image(cast, self.layer.geometry)

    def unfused(self, o: Operands, view: View) -> Tensor:
        if self.op != "conv_grad_weight":
            return self.library(o, self.w_hat(o, view, BACKEND))
        # Ŵ is only looked at for its shape, and the forward has made it.
        return threshold_backward(self.library(o, o.dense), o.weight, view, backend=BACKEND)[0]

    def fused(self, o: Operands, view: View, topology: Topology | None = None) -> Tensor:
        """The op's own forward, or one half of its backward, so that routes and tiles are what a layer gets."""
        geometry, need_x = self.layer.geometry, self.op == "conv_grad_input"
        if self.op == "conv_forward":
            return fused_conv2d(o.x, o.weight, view, None, geometry, topology, dtype=o.x.dtype, backend=BACKEND)
        kind, *tensors = view
        indices = (None, None, None) if topology is None else (topology.index, topology.input_index, None)
        grad_x, grad_weight, _ = torch.ops.tritonsparse.fused_conv2d_backward(
            o.grad_y, o.x, o.weight, *tensors, *indices, geometry.numbers, list(topology.block) if topology else [],
            kind, BACKEND, need_x, not need_x,
        )  # fmt: skip
        return grad_x if need_x else grad_weight

    def exact(self, o: Operands, view: View | None) -> Tensor:
        """In float64: the product of a view, or of the weight as it is, from the operands as they are given."""
        if view is None:
            return self.library(o, o.dense.double())
        if self.op != "conv_grad_weight":
            return self.library(o, self.w_hat(o, view, "torch").double())
        return threshold_backward(self.library(o, o.dense.double()), o.weight.double(), view)[0]


def blocks_of(layer: Layer, block: int, pruned: float) -> Tensor:
    """A mask of random blocks, `pruned` of them False, as large as the weight's matrix."""
    shape = (layer.outputs // block, layer.columns // block)
    order = torch.rand(shape, generator=torch.Generator().manual_seed(0)).flatten().argsort()
    flags = torch.zeros(shape, dtype=torch.bool)
    flags.view(-1)[order[: max(1, round((1 - pruned) * flags.numel()))]] = True
    return flags.repeat_interleave(block, 0).repeat_interleave(block, 1)


def bench(
    layer: Layer, batch: int, op: str, dtype: torch.dtype, block: int, samples: int = harness.SAMPLES
) -> Iterator[Row]:
    """One row a provider; cuDNN on a random weight first."""
    product = Product(layer, op)
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

    def timed(kind: str, provider: str, calls: Sequence[partial[Tensor]], view: View | None, bound: float) -> Row:
        error = relative_error(calls[0](), product.exact(operands[0], view))
        row = harness.gated(
            {**facts, "kind": kind, "provider": provider}, error, bound,
            partial(measure, calls, graph=True, samples=samples),
        )  # fmt: skip
        dense_ms.append(row["median_ms"])
        if row["median_ms"]:
            row["tflop_per_s"] = work / row["median_ms"] / 1e9
            row["of_dense"] = dense_ms[0] and dense_ms[0] / row["median_ms"]
        return row

    bounds = {}
    for kind, view in operands[0].views.items():
        allowed = relative_error(product.unfused(operands[0], view), product.exact(operands[0], view))
        bounds[kind] = max(1.1 * allowed, 1e-6)
        if kind == "soft":
            # cuDNN rounds dW to the dtype of its operands.
            dense = [partial(product.library, o, o.dense) for o in operands]
            yield timed(kind, "dense random", dense, None, max(bounds[kind], 5e-3))
            if op != "conv_grad_weight":
                masked = [partial(product.library, o, product.w_hat(o, o.views[kind], "torch")) for o in operands]
                yield timed(kind, "dense masked", masked, view, bounds[kind])
        for provider, call in ((UNFUSED, product.unfused), (FUSED, product.fused)):
            if provider == UNFUSED or not layer.is_depthwise:
                calls = [partial(call, o, o.views[kind]) for o in operands]
                yield timed(kind, provider, calls, view, bounds[kind])
    inputs = layer.inputs // layer.geometry.groups
    if layer.is_depthwise or inputs % block or layer.outputs // layer.geometry.groups % block:
        return
    for pruned in PRUNED:
        view = View("mask", mask=blocks_of(layer, block, pruned).to(operands[0].x.device))
        topology = Topology.of(view.mask, None, (block, block), turn=layer.geometry.input_flags)
        calls = [partial(product.fused, o, view, topology) for o in operands]
        yield timed("mask", f"block {pruned:.0%}", calls, view, bounds["mask"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.parser_of(__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), help="one of them; both by default")
    parser.add_argument("--batch", type=int, help=f"images at a time; {BATCHES} by default")
    parser.add_argument("--op", choices=OPS, help="one product; all three by default")
    args = parser.parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_conv")
    announce()
    torch.backends.cudnn.benchmark = True
    names = [args.model] if args.model else ["resnet-50"] if args.quick else list(MODELS)
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
        report.extend(bench(layer, batch, op, dtype, block, harness.QUICK_SAMPLES if args.quick else harness.SAMPLES))
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
