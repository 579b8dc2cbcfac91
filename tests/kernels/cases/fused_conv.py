"""The cases of `fused_conv2d`, their operands and their answer in float64: every ring runs them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels.block.topology import Topology
from tritonsparse.kernels.conv.conv2d import fused_conv2d
from tritonsparse.kernels.conv.geometry import Geometry
from tritonsparse.kernels.weight.view import View

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """A convolution; `kind` of its view may end in "per row", `block` is of its masks, of which one row is empty.

    Pruned weights that get a gradient are all ("all"), those in a set B ("B") or none ("kept").
    """

    geometry: Geometry
    kind: str
    due: str = "B"
    batch: int = 2
    inputs: int = 8
    outputs: int = 12
    image: tuple[int, int] = (7, 6)
    block: tuple[int, int] | None = None
    density: float = 0.5
    channels_last: bool = True

    def __str__(self) -> str:
        shape = f"{self.batch} of {self.inputs}>{self.outputs} on {self.image} by {self.geometry.numbers}"
        return f"{shape} {self.kind} {self.due} {self.block or ''}"


SAME = Geometry((3, 3), padding=(1, 1, 1, 1))
PIXELS = Geometry((1, 1))
UNEVEN = Geometry((3, 2), (2, 3), (0, 1, 2, 0), (2, 1), 2)
GROUPED = Geometry((2, 3), (2, 1), (1, 0, 1, 1), (2, 1), 2)
# More positions along an axis than a register has bits.
LONG = Geometry((17, 1), (2, 1), (9, 0, 8, 0))
CASES = [
    *(Case(SAME, kind) for kind in ("soft", "soft per row", "hard", "hard per row", "mask")),
    Case(SAME, "mask", "kept", channels_last=False),
    # Products of pixels, which the linear kernels take.
    Case(PIXELS, "soft", inputs=20, outputs=24),
    Case(PIXELS, "mask", inputs=33, outputs=17, channels_last=False),
    Case(Geometry((1, 1), (2, 2)), "soft per row", "all"),
    # Pixels that nobody reads, and results that read zeros alone.
    Case(Geometry((1, 1), (3, 3), (1, 1, 1, 1)), "mask", image=(5, 5)),
    Case(UNEVEN, "mask", "all"),
    Case(UNEVEN, "soft per row", inputs=38, outputs=34),
    Case(Geometry((4, 4), (1, 1), (1, 1, 2, 2), (1, 1), 4), "soft"),
    Case(LONG, "soft", inputs=16, outputs=16, image=(6, 2)),
    Case(LONG, "mask", "kept", 1, 32, 16, (6, 2), (16, 16)),
    Case(Geometry((3, 2), (1, 1), (1, 0, 1, 1)), "mask", "kept", 1, 32, 48, (4, 5), (16, 32)),
    *(Case(GROUPED, "mask", due, 1, 64, 64, (5, 4), (16, 32)) for due in ("kept", "all", "B")),
    Case(Geometry((2, 2), (2, 3), (1, 1, 0, 1), (1, 2), 2), "mask", "B", 1, 64, 96, (4, 5), (48, 16)),
]
# What a GPU alone is fast enough for: a first layer, wide tiles, strides, a split reduction.
LARGE = [
    Case(Geometry((7, 7), (2, 2), (3, 3, 3, 3)), "soft per row", "B", 4, 3, 64, (64, 64)),
    Case(SAME, "mask", "B", 16, 64, 64, (56, 56)),
    Case(Geometry((3, 3), (2, 2), (1, 1, 1, 1)), "soft per row", "B", 8, 128, 128, (28, 28)),
    Case(SAME, "mask", "B", 4, 512, 512, (7, 7)),
    Case(SAME, "mask", "kept", 16, 64, 64, (56, 56), (64, 64)),
    Case(Geometry((3, 3), (2, 2), (1, 1, 1, 1)), "mask", "B", 8, 128, 128, (28, 28), (128, 32)),
    Case(SAME, "mask", "all", 4, 512, 512, (7, 7), (64, 256)),
    Case(Geometry((3, 3), (2, 1), (1, 1, 1, 1), (1, 2), 2), "mask", "B", 2, 128, 96, (20, 19), (48, 64)),
    Case(Geometry((4, 4), (1, 1), (3, 3, 6, 6), (3, 3)), "mask", "kept", 2, 64, 64, (30, 30), (16, 16)),
]


class Operands(NamedTuple):
    case: Case
    x: Tensor
    weight: Tensor
    view: View
    bias: Tensor
    grad_y: Tensor
    topology: Topology | None


def operands(case: Case, dtype: torch.dtype, master: torch.dtype = F32, device: str = "cpu", seed: int = 0) -> Operands:
    """Random ones; W holds an exact 0, and no weight that rounding could move over its threshold."""
    geometry, random = case.geometry, torch.Generator(device).manual_seed(seed)
    master, exact = (F64, F64) if dtype == F64 else (master, F32)
    kind, rows = case.kind.removesuffix(" per row"), case.outputs if case.kind.endswith("per row") else 1
    shape, (r, c) = (case.outputs, geometry.taps * case.inputs // geometry.groups), case.block or (1, 1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    def drawn(density: float) -> Tensor:
        flags = torch.rand(shape[0] // r, shape[1] // c, generator=random, device=device) < density
        if case.block and density < 1:
            flags[1 % len(flags)] = False
        return flags.repeat_interleave(r, 0).repeat_interleave(c, 1)

    weight, threshold, mask = normal(*shape), None, None
    if kind == "mask":
        mask = drawn(case.density)
        weight = torch.where(mask, weight, torch.nan)
    else:
        threshold = normal(rows) - 0.5
        cutoff = (threshold.sigmoid() if kind == "soft" else threshold.abs_())[:, None]
        weight[0, 0] = 0.0
        weight = torch.where((weight.to(master).to(F32).abs() / cutoff - 1).abs() < 1e-2, 1.1 * weight, weight)
        threshold = threshold.to(exact)
    grad_mask = drawn(0.3) if case.due == "B" else None
    view = View(kind, threshold, mask, grad_mask, None if case.due == "kept" else torch.tensor(0.25, device=device))
    topology = Topology.of(mask, grad_mask, case.block, turn=geometry.input_flags) if case.block else None
    images = ((case.inputs, *case.image), (case.outputs, *geometry.output(case.image)))
    memory = torch.channels_last if case.channels_last else torch.contiguous_format
    x, grad_y = (normal(case.batch, *size).to(dtype).contiguous(memory_format=memory) for size in images)
    return Operands(case, x, weight.to(master), view, normal(case.outputs).to(dtype), grad_y, topology)


def answer(o: Operands) -> dict[str, Tensor]:
    """Y and all gradients in float64, by autograd of the plain formulation on S(W) rounded as the product reads it.

    u - u.detach() is worth 0 and has gradient 1: `leak` of it is the annealed gradient of pruned weights.
    """
    kind, threshold, kept, grad_mask, alpha = o.view
    clean = o.weight if kept is None else torch.where(kept, o.weight, 0.0)
    given = {"x": o.x, "weight": clean, "bias": o.bias} | ({} if threshold is None else {"threshold": threshold})
    leaves = {name: each.detach().double().requires_grad_() for name, each in given.items()}
    x, weight, bias, *s = leaves.values()
    u = weight
    if s:
        u = weight.abs() - (s[0].sigmoid() if kind == "soft" else s[0])[:, None]
        kept = u > 0
    # Of kind "soft" |S(W)| = u where kept.
    size, sign = (u, weight.sign()) if kind == "soft" else (weight, 1)
    leak = (0 if alpha is None else alpha.double()) * ~kept * (1 if grad_mask is None else grad_mask)
    w_hat = sign * (torch.where(kept, size, 0.0) + leak * (size - size.detach()))
    w_hat = w_hat + (w_hat.detach().to(o.x.dtype).double() - w_hat.detach())
    g = o.case.geometry
    image = w_hat.unflatten(1, (*g.kernel, -1)).permute(0, 3, 1, 2)
    top, left, bottom, right = g.padding
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), image, bias, g.stride, 0, g.dilation, g.groups)
    grads = torch.autograd.grad(y, list(leaves.values()), o.grad_y.double(), allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def run(o: Operands, backend: str, op: Callable[..., Tensor] = fused_conv2d) -> dict[str, Tensor]:
    given = {"x": o.x, "weight": o.weight, "bias": o.bias, "threshold": o.view.threshold}
    leaves = {name: each.detach().requires_grad_() for name, each in given.items() if each is not None}
    view = o.view._replace(threshold=leaves.get("threshold"))
    x, weight, bias, *_ = leaves.values()
    y = op(x, weight, view, bias, o.case.geometry, o.topology, dtype=x.dtype, backend=backend)
    assert y.permute(0, 2, 3, 1).is_contiguous()
    grads = torch.autograd.grad(y, list(leaves.values()), o.grad_y)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def errors(o: Operands, found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMS by name; a threshold's gradient, a sum that cancels, is measured against its terms.

    These are sigmoid', which is at most 1/4, of dW. Where an exact 0 is expected anything else is infinitely wrong.
    """
    like = {"weight": o.weight, "threshold": o.view.threshold}
    assert expected.keys() - {"bias"} <= found.keys() <= expected.keys()
    assert not (found["weight"][expected["weight"] == 0] != 0).any()
    wrong = {}
    for name, value in found.items():
        assert (value.shape, value.dtype) == (expected[name].shape, like.get(name, o.x).dtype), name
        scale = expected["weight"].norm() / 4 if name == "threshold" else expected[name].norm()
        error = (value.double() - expected[name]).norm()
        wrong[name] = float(torch.where(error == 0, 0.0, error / scale))
    return wrong
