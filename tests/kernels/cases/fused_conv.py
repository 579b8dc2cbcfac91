"""The cases of `fused_conv2d`, their operands and their answer in float64: every ring runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels.block.topology import Topology
from tritonsparse.kernels.conv.conv2d import fused_conv2d
from tritonsparse.kernels.conv.geometry import Geometry
from tritonsparse.kernels.weight.view import View

SAME = (1, 1, 1, 1)


@dataclass(frozen=True)
class Case:
    """A convolution of `inputs` to `outputs` channels through a view.

    Attributes:
        kind: of the view; "soft" and "hard" have one threshold, "soft per row" and "hard per row" one a row.
        due: the pruned weights that get a gradient: "kept" none of them, "all" all, "B" those in a set B.
        block: sides of the blocks that masks consist of, with a topology; None = masks of elements.
        density: of the masks. Of blocks between none and all one row is empty.
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
        g, (height, width) = self.geometry, self.image
        size = f"{self.batch} of {self.inputs}>{self.outputs} on {height}x{width}, groups {g.groups}"
        kernel = f"{g.kernel[0]}x{g.kernel[1]} stride {g.stride} padding {g.padding} dilation {g.dilation}"
        return f"{kernel}, {size}, {self.kind}, {self.due}" + (f", blocks {self.block}" if self.block else "")


UNEVEN = Geometry((3, 2), (2, 3), (0, 1, 2, 0), (2, 1), 2)
GROUPED = Geometry((2, 3), (2, 1), (1, 0, 1, 1), (2, 1), 2)
STRIDED = Geometry((2, 2), (2, 3), (1, 1, 0, 1), (1, 2), 2)
CASES = [
    *(Case(Geometry((3, 3), padding=SAME), kind) for kind in ("soft", "soft per row", "hard", "hard per row", "mask")),
    Case(Geometry((3, 3), padding=SAME), "mask", "kept", channels_last=False),
    # A product of pixels, which the linear kernels take.
    Case(Geometry((1, 1)), "soft", inputs=20, outputs=24),
    Case(Geometry((1, 1)), "mask", inputs=33, outputs=17, channels_last=False),
    Case(Geometry((1, 1), (2, 2)), "soft per row", "all"),
    # Pixels that nobody reads, and results that read zeros alone.
    Case(Geometry((1, 1), (3, 3), SAME), "mask", image=(5, 5)),
    Case(UNEVEN, "mask", "all"),
    Case(UNEVEN, "soft per row", inputs=38, outputs=34),
    Case(Geometry((4, 4), (1, 1), (1, 1, 2, 2), (1, 1), 4), "soft"),
    # More positions along an axis than a register has bits.
    Case(Geometry((17, 1), (2, 1), (9, 0, 8, 0)), "soft", inputs=16, outputs=16, image=(6, 2)),
    Case(Geometry((17, 1), (2, 1), (9, 0, 8, 0)), "mask", "kept", 1, 16, 16, (6, 2), block=(16, 16)),
    Case(Geometry((3, 2), (1, 1), (1, 0, 1, 1)), "mask", "kept", 1, 32, 48, (4, 5), block=(16, 32)),
    *(Case(GROUPED, "mask", due, 1, 64, 64, (5, 4), (16, 32)) for due in ("kept", "all", "B")),
    Case(STRIDED, "mask", "B", 1, 64, 96, (4, 5), block=(48, 16)),
]
# What a GPU alone is fast enough for: a first layer, wide tiles, strides, a split reduction.
LARGE = [
    Case(Geometry((7, 7), (2, 2), (3, 3, 3, 3)), "soft per row", "B", 4, 3, 64, (64, 64)),
    Case(Geometry((3, 3), padding=SAME), "mask", "B", 16, 64, 64, (56, 56)),
    Case(Geometry((3, 3), (2, 2), SAME), "soft per row", "B", 8, 128, 128, (28, 28)),
    Case(Geometry((3, 3), padding=SAME), "mask", "B", 4, 512, 512, (7, 7)),
    Case(Geometry((1, 1), (2, 2)), "soft per row", "B", 4, 256, 512, (28, 28)),
    Case(Geometry((3, 3), (2, 1), SAME, (1, 2), 2), "soft per row", "B", 2, 128, 96, (20, 19)),
    Case(Geometry((3, 3), padding=SAME), "mask", "kept", 16, 64, 64, (56, 56), (64, 64)),
    Case(Geometry((3, 3), (2, 2), SAME), "mask", "B", 8, 128, 128, (28, 28), (128, 32)),
    Case(Geometry((1, 1), (2, 2)), "mask", "kept", 4, 256, 512, (28, 28), (32, 128)),
    Case(Geometry((3, 3), padding=SAME), "mask", "all", 4, 512, 512, (7, 7), (64, 256)),
    Case(Geometry((3, 3), (2, 1), SAME, (1, 2), 2), "mask", "B", 2, 128, 96, (20, 19), (48, 64)),
    Case(Geometry((4, 4), (1, 1), (3, 3, 6, 6), (3, 3)), "mask", "kept", 2, 64, 64, (30, 30), (16, 16)),
]


@dataclass(frozen=True)
class Operands:
    """Of one case; a weight that a mask prunes is NaN."""

    case: Case
    x: Tensor
    weight: Tensor
    view: View
    bias: Tensor
    grad_y: Tensor

    @property
    def topology(self) -> Topology | None:
        if self.case.block is None:
            return None
        assert self.view.mask is not None
        turn = self.case.geometry.input_flags
        return Topology.of(self.view.mask, self.view.grad_mask, self.case.block, turn=turn)


def operands(
    case: Case, dtype: torch.dtype, master: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Operands:
    """Random ones; W holds an exact 0, and no weight that rounding could move over its threshold."""
    geometry, random = case.geometry, torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    weight = normal(case.outputs, geometry.taps * case.inputs // geometry.groups)
    kind, per_row = case.kind.removesuffix(" per row"), case.kind.endswith("per row")
    threshold = mask = None
    float64 = dtype == torch.float64
    if kind == "mask":
        mask = _mask(case, case.density, random)
        weight = torch.where(mask, weight, torch.nan)
    else:
        threshold = normal(case.outputs if per_row else 1) - 0.5
        cutoff = (threshold.sigmoid() if kind == "soft" else threshold.abs_())[:, None]
        weight[0, 0] = 0.0
        weight = torch.where((weight.to(master).float().abs() / cutoff - 1).abs() < 1e-2, 1.1 * weight, weight)
    alpha = None if case.due == "kept" else torch.tensor(0.25, device=device)
    grad_mask = _mask(case, 0.3, random) if case.due == "B" else None
    threshold = threshold.double() if float64 and threshold is not None else threshold
    x = normal(case.batch, case.inputs, *case.image).to(dtype)
    grad_y = normal(case.batch, case.outputs, *geometry.output(case.image)).to(dtype)
    if case.channels_last:
        x, grad_y = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad_y))
    view = View(kind, threshold, mask, grad_mask, alpha)
    return Operands(case, x, weight.to(dtype if float64 else master), view, normal(case.outputs).to(dtype), grad_y)


def _mask(case: Case, density: float, random: torch.Generator) -> Tensor:
    rows, columns = case.block or (1, 1)
    shape = (case.outputs // rows, case.geometry.taps * case.inputs // case.geometry.groups // columns)
    flags = torch.rand(shape, generator=random, device=random.device) < density
    if case.block and density < 1:
        flags[1 % shape[0]] = False
    return flags.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def answer(o: Operands) -> dict[str, Tensor]:
    """Y and all gradients in float64, by autograd of the plain formulation on S(W) rounded as the product reads it.

    u - u.detach() is worth 0 and has gradient 1: `on_pruned` of it is the annealed gradient of pruned weights.
    """
    kind, threshold, mask, grad_mask, alpha = o.view
    given = o.weight if mask is None else torch.where(mask, o.weight, 0.0)
    names = {"x": o.x, "weight": given, "bias": o.bias} | ({} if threshold is None else {"threshold": threshold})
    leaves = {name: each.detach().double().requires_grad_() for name, each in names.items()}
    x, weight, bias = leaves["x"], leaves["weight"], leaves["bias"]
    u, size = weight, weight
    if threshold is not None:
        s = leaves["threshold"][:, None]
        size = weight.abs() - (s.sigmoid() if kind == "soft" else s)
        mask = size > 0
        u = size if kind == "soft" else weight
    on_pruned = torch.zeros_like(weight) if alpha is None else alpha.double().expand_as(weight)
    on_pruned = on_pruned * ~mask * (1 if grad_mask is None else grad_mask)
    w_hat = torch.where(mask, u, 0.0) + on_pruned * (u - u.detach())
    if kind == "soft":
        w_hat = weight.sign() * w_hat
    w_hat = w_hat + (w_hat.detach().to(o.x.dtype).double() - w_hat.detach())
    g = o.case.geometry
    image = w_hat.unflatten(1, (*g.kernel, -1)).permute(0, 3, 1, 2)
    top, left, bottom, right = g.padding
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), image, bias, g.stride, 0, g.dilation, g.groups)
    grads = torch.autograd.grad(y, list(leaves.values()), o.grad_y.double(), allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def run(o: Operands, backend: str, op: Callable[..., Tensor] = fused_conv2d) -> dict[str, Tensor]:
    """What the op and its backward give."""
    names = {"x": o.x, "weight": o.weight, "bias": o.bias, "threshold": o.view.threshold}
    leaves = {name: each.detach().requires_grad_() for name, each in names.items() if each is not None}
    view = o.view._replace(threshold=leaves.get("threshold"))
    x, weight, bias = (leaves[name] for name in ("x", "weight", "bias"))
    y = op(x, weight, view, bias, o.case.geometry, o.topology, dtype=x.dtype, backend=backend)
    assert y.permute(0, 2, 3, 1).is_contiguous()
    grads = torch.autograd.grad(y, list(leaves.values()), o.grad_y)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def errors(o: Operands, found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMS by name; a threshold's gradient, a sum that cancels, is measured against its terms.

    These are sigmoid', which is at most 1/4, of dW. Where an exact 0 is expected anything else is infinitely wrong.
    """
    dtypes = {"weight": o.weight.dtype, "threshold": torch.float32 if o.x.dtype != torch.float64 else torch.float64}
    assert expected.keys() - {"bias"} <= found.keys() <= expected.keys()
    assert not (found["weight"][expected["weight"] == 0] != 0).any()
    wrong = {}
    for name, value in found.items():
        assert (value.shape, value.dtype) == (expected[name].shape, dtypes.get(name, o.x.dtype)), name
        scale = expected["weight"].norm() / 4 if name == "threshold" else expected[name].norm()
        error = (value.double() - expected[name]).norm()
        wrong[name] = float(torch.where(error == 0, 0.0, error / scale))
    return wrong
