"""Cases of the products over kept blocks, their operands and answers in float64, which every ring runs.

What is pruned holds NaN, in a matrix and behind packed blocks: one read of it and a result shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels.block._gemm_tiles import BlockTiles
from tritonsparse.kernels.block._grad_tiles import BlockGradTiles
from tritonsparse.kernels.block.gemm import BlockLayout, block_forward, block_grad_input
from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.linear import block_linear
from tritonsparse.kernels.block.packed import packed_block_linear
from tritonsparse.kernels.block.topology import Topology, build_index_reference
from tritonsparse.kernels.weight.view import View

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """m rows of x, and a weight `[n, k]` in blocks.

    Attributes:
        form: "stored" [n, k], "transposed", "strided", where every operand has odd strides, or "packed".
        weight, x: dtypes.
        kept: share of the blocks.
        lines: the first block row and column are whole, the second row and the third column are empty.
    """

    m: int
    n: int
    k: int
    block: tuple[int, int]
    form: str = "stored"
    weight: torch.dtype = F32
    x: torch.dtype = F32
    kept: float = 0.5
    lines: bool = False

    def __str__(self) -> str:
        dtypes = "/".join(str(dtype).removeprefix("torch.") for dtype in (self.weight, self.x))
        kept = f"{self.kept:.0%}{', lines' if self.lines else ''}"
        return f"{self.m} by {self.n}x{self.k} in {self.block[0]}x{self.block[1]} {self.form} {dtypes} {kept}"

    @property
    def divides(self) -> bool:
        return self.n % self.block[0] == 0 and self.k % self.block[1] == 0


# Blocks of any side: for the references.
ODD = (
    *(Case(3, 7, 11, (2, 3), form, F64, F64) for form in ("stored", "transposed", "strided", "packed")),
    Case(2, 4, 4, (5, 7), weight=BF16, kept=1.0),
    Case(4, 5, 6, (1, 1), "packed", x=BF16, kept=0.3),
)
# Ragged edges, narrow and oblong blocks, and axes of 0, in few elements.
CASES = (
    Case(0, 33, 64, (16, 32)),
    Case(2, 0, 16, (16, 16)),
    Case(2, 16, 0, (16, 16)),
    Case(4, 0, 64, (16, 32), "packed"),
    Case(1, 1, 1, (16, 16), x=F16, kept=1.0),
    Case(7, 100, 64, (48, 16), "transposed", x=F16, lines=True),
    Case(7, 33, 100, (16, 48), "packed"),
    Case(33, 64, 100, (32, 32), weight=F16, x=F16, lines=True),
    Case(17, 96, 64, (32, 16), "transposed", F16),
    Case(7, 64, 96, (16, 48), "strided"),
    Case(7, 96, 64, (48, 16), "strided", F16, F16),
    Case(17, 100, 33, (48, 48), "packed", F16, F16, lines=True),
    Case(17, 96, 64, (32, 32), "packed", x=F16),
    Case(7, 64, 64, (16, 16), kept=0.0),
    Case(7, 64, 64, (16, 32), "packed", kept=0.0),
    Case(17, 64, 96, (32, 48), "transposed", kept=1.0),
)
# What a GPU alone is fast enough for: decoding, wide tiles, a split reduction, and every pair of dtypes.
LARGE = tuple(
    Case(*shape, form, *dtypes, kept=0.3, lines=True)
    for shape in (
        (1, 256, 512, (64, 64)),
        (7, 100, 130, (16, 32)),
        (513, 1000, 520, (64, 32)),
        (1024, 512, 768, (16, 128)),
        (300, 512, 768, (256, 32)),
        (300, 480, 960, (48, 48)),
        (128, 256, 16384, (128, 128)),
        (4096, 1024, 2048, (128, 128)),
        (2048, 4096, 1024, (64, 64)),
        (2048, 4096, 8192, (128, 128)),
    )
    for dtypes in ((BF16, BF16), (F16, F16), (F32, BF16), (F32, F32))
    for form in ("stored", "transposed", "packed")
)


@dataclass(frozen=True)
class Operands:
    """Of one case: `dense` is W `[n, k]` in float64 as products read it, `wanted` the blocks that get a gradient."""

    case: Case
    x: Tensor
    grad_y: Tensor
    bias: Tensor
    weight: Tensor
    dense: Tensor
    kept: Tensor
    wanted: Tensor
    alpha: Tensor
    layout: BlockLayout
    grad_layout: BlockLayout


def on_elements(flags: Tensor, case: Case) -> Tensor:
    """A value a block -> a value an element, `[n, k]`."""
    return flags.repeat_interleave(case.block[0], 0).repeat_interleave(case.block[1], 1)[: case.n, : case.k]


def as_blocks(matrix: Tensor, flags: Tensor, case: Case, fill: float) -> Tensor:
    """The blocks that flags name, in row-major order; `fill` beyond the matrix."""
    (r, c), (n, k) = case.block, matrix.shape
    padded = F.pad(matrix, (0, -k % c, 0, -n % r), value=fill)
    return padded.reshape(flags.shape[0], r, flags.shape[1], c).transpose(1, 2)[flags]


def strided(matrix: Tensor) -> Tensor:
    """The same values, every second of a row, a row below the start."""
    wide = matrix.new_full((matrix.shape[0] + 1, 2 * matrix.shape[1]), NAN)
    wide[1:, ::2] = matrix
    return wide[1:, ::2]


def operands(case: Case, device: str = "cpu", seed: int = 0) -> Operands:
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = case.x) -> Tensor:
        return torch.randn(size, generator=random, device=device).to(dtype)

    grid = -(-case.n // case.block[0]), -(-case.k // case.block[1])
    kept = torch.rand(grid, generator=random, device=device) < case.kept
    wanted = kept | (torch.rand(grid, generator=random, device=device) < 0.6 * case.kept)
    if case.lines:
        for flags in (kept, wanted):
            flags[:1], flags[:, :1] = True, True
            flags[1:2], flags[:, 2:3] = False, False
    matrix, count = normal(case.n, case.k, dtype=case.weight), None
    mask = on_elements(kept, case)
    if case.form == "packed":
        # Two places more than blocks.
        count = int(kept.sum()) + 2
        weight = torch.cat([as_blocks(matrix, kept, case, NAN), matrix.new_full((2, *case.block), NAN)])
    else:
        weight = matrix.masked_fill(~mask, NAN)
        weight = weight.t().contiguous() if case.form == "transposed" else weight
    x, grad_y = normal(case.m, case.k), normal(case.m, case.n)
    if case.form == "strided":
        weight, x, grad_y = strided(weight), strided(x), grad_y.t().contiguous().t()
    layout = BlockLayout(build_index_reference(kept), case.block, (case.n, case.k), case.form == "transposed", count)
    return Operands(
        case, x, grad_y, normal(case.n), weight, torch.where(mask, matrix.to(case.x).double(), 0.0),
        kept.t().contiguous().t() if case.form == "strided" else kept, wanted, torch.tensor(0.25, device=device),
        layout, layout._replace(index=build_index_reference(wanted), count=count and int(wanted.sum()) + 1),
    )  # fmt: skip


def as_stored(grad: Tensor, o: Operands, flags: Tensor, count: int | None) -> Tensor:
    """A gradient `[n, k]` as the weight of a case is stored, of the blocks that flags name."""
    if count is not None:
        blocks = as_blocks(grad, flags, o.case, 0.0)
        return torch.cat([blocks, blocks.new_zeros(count - len(blocks), *o.case.block)])
    return grad.t() if o.layout.transposed else grad


def gradient(o: Operands, multiplier: Tensor) -> Tensor:
    """dW `[n, k]` in float64, exact zeros where the multiplier is."""
    product = multiplier * (o.grad_y.double().t() @ o.x.double())
    return torch.where(multiplier == 0, 0.0, product)


def answer(o: Operands) -> dict[str, Tensor]:
    """Y, dX and dW of the three products in float64."""
    x, grad_y = o.x.double(), o.grad_y.double()
    multiplier = on_elements(torch.where(o.kept, 1.0, 0.25 * o.wanted).double(), o.case)
    return {
        "y": x @ o.dense.t() + o.bias.double(),
        "grad_x": grad_y @ o.dense,
        "grad_weight": as_stored(gradient(o, multiplier), o, o.wanted, o.grad_layout.count),
    }


Tiles = tuple[BlockTiles | None, BlockTiles | None, BlockGradTiles | None]


def products(o: Operands, backend: str, tiles: Tiles = (None, None, None)) -> dict[str, Tensor]:
    """The three products; dW in the weight's dtype."""
    common: dict[str, Any] = {"backend": backend}
    return {
        "y": block_forward(o.x, o.weight, o.layout, o.bias, tiles=tiles[0], **common),
        "grad_x": block_grad_input(o.grad_y, o.weight, o.layout, tiles=tiles[1], **common),
        "grad_weight": block_grad_weight(
            o.grad_y, o.x, o.grad_layout, kept=o.kept, alpha=o.alpha, out_dtype=o.weight.dtype, tiles=tiles[2], **common
        ),
    }  # fmt: skip


# Which pruned blocks get a gradient.
DUE = ("kept", "B", "everywhere")


def op(o: Operands, due: str, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `block_linear`, or `packed_block_linear` of a packed case, and its backward give; and the answer."""
    leaves = [each.detach().requires_grad_() for each in (o.x, o.weight, o.bias)]
    x, weight, bias = leaves
    multiplier = on_elements(o.kept, o.case).double()
    if o.case.form == "packed":
        y = packed_block_linear(x, weight, bias, o.layout.index, shape=o.layout.shape, backend=backend)
    else:
        mask, grad_mask, alpha = on_elements(o.kept, o.case), None, None if due == "kept" else o.alpha
        if due != "kept":
            more = on_elements(o.wanted, o.case) if due == "B" else torch.ones_like(mask)
            multiplier = torch.where(mask, 1.0, 0.25 * more).double()
            grad_mask = more if due == "B" else None
        topology = Topology.of(mask, grad_mask, o.case.block)
        if o.layout.transposed:
            mask, grad_mask = mask.t(), None if grad_mask is None else grad_mask.t()
        view = View("mask", None, mask, grad_mask, alpha)
        y = block_linear(
            x, weight, topology, view, bias, transposed=o.layout.transposed, dtype=o.x.dtype, backend=backend
        )
    y.backward(o.grad_y)
    expected = answer(o) | {
        "grad_weight": as_stored(gradient(o, multiplier), o, o.kept, o.layout.count),
        "grad_bias": o.grad_y.double().sum(0),
    }
    grads = dict(zip(("grad_x", "grad_weight", "grad_bias"), (each.grad for each in leaves), strict=True))
    return {"y": y.detach(), **grads}, expected
