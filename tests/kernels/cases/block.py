"""Cases of the products over kept blocks, their operands and answers in float64, which every ring runs.

What is pruned holds NaN, in a matrix and behind packed blocks: one read of it and a result shows it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels.block._gemm_tiles import BlockTiles
from tritonsparse.kernels.block._grad_tiles import BlockGradTiles
from tritonsparse.kernels.block.gemm import BlockLayout, block_forward, block_grad_input
from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.linear import block_linear
from tritonsparse.kernels.block.packed import packed_block_linear
from tritonsparse.kernels.block.topology import (
    IndexTable,
    Topology,
    build_index_reference,
    build_indices,
    index_size,
)
from tritonsparse.kernels.weight.view import View

from .matrices import laid_out

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
NAN = float("nan")
FORMS = ("stored", "transposed", "packed")
# By the dtype of the result: sums of some hundred products in float32 or float64, then one rounding.
BOUND = {F64: 1e-14, F32: 2e-6, F16: 1e-3, BF16: 8e-3}


@dataclass(frozen=True)
class Case:
    """m rows of x, and a weight `[n, k]` in blocks; where "strided", every operand has odd strides.

    `lines`: the first block row and column are whole, the second row and the third column are empty.
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
        size = f"{self.m} by {self.n}x{self.k} in {self.block[0]}x{self.block[1]}"
        dtypes = f"{self.weight}/{self.x}".replace("torch.", "")
        return f"{size} {self.form} {dtypes} {self.kept:.0%}{', lines' if self.lines else ''}"

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
    Case(0, 33, 64, (16, 32)), Case(2, 0, 16, (16, 16)), Case(2, 16, 0, (16, 16)), Case(4, 0, 64, (16, 32), "packed"),
    Case(1, 1, 1, (16, 16), x=F16, kept=1.0), Case(7, 100, 64, (48, 16), "transposed", x=F16, lines=True),
    Case(7, 33, 100, (16, 48), "packed"), Case(33, 64, 100, (32, 32), weight=F16, x=F16, lines=True),
    Case(17, 96, 64, (32, 16), "transposed", F16), Case(7, 64, 96, (16, 48), "strided"),
    Case(7, 96, 64, (48, 16), "strided", F16, F16), Case(17, 100, 33, (48, 48), "packed", F16, F16, lines=True),
    Case(17, 96, 64, (32, 32), "packed", x=F16), Case(7, 64, 64, (16, 16), kept=0.0),
    Case(7, 64, 64, (16, 32), "packed", kept=0.0), Case(17, 64, 96, (32, 48), "transposed", kept=1.0),
    Case(9, 32, 48, (16, 16), weight=BF16, x=BF16),
)  # fmt: skip
# What a GPU alone is fast enough for: decoding, wide tiles, split reductions, a heavy line, and every pair of dtypes.
LARGE = (
    *(Case(128, 1024, 4096, (64, 64), form, BF16, BF16, 0.02, True) for form in FORMS),
    *(
        Case(*shape, form, *dtypes, kept=0.3, lines=True)
        for shape in (
            (1, 256, 512, (64, 64)), (7, 100, 130, (16, 32)), (16, 1024, 2048, (16, 16)), (129, 1000, 712, (32, 32)),
            (513, 1000, 520, (64, 32)), (1024, 768, 512, (128, 16)), (1024, 512, 768, (16, 128)),
            (300, 512, 768, (256, 32)), (300, 480, 960, (48, 48)), (128, 256, 16384, (128, 128)),
            (4096, 1024, 2048, (128, 128)), (2048, 4096, 1024, (64, 64)), (2048, 4096, 8192, (128, 128)),
        )
        for dtypes in ((BF16, BF16), (F16, F16), (F32, BF16), (F32, F32))
        for form in FORMS
    ),
)  # fmt: skip


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


def operands(case: Case, device: str = "cpu", seed: int = 0) -> Operands:
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = case.x) -> Tensor:
        return torch.randn(size, generator=random, device=device).to(dtype)

    grid = -(-case.n // case.block[0]), -(-case.k // case.block[1])
    kept = torch.rand(grid, generator=random, device=device) < case.kept
    wanted = kept | (torch.rand(grid, generator=random, device=device) < 0.6 * case.kept)
    if case.lines:
        for flags in (kept, wanted):
            flags[:1] = flags[:, :1] = True
            flags[1:2] = flags[:, 2:3] = False
    matrix, count, mask = normal(case.n, case.k, dtype=case.weight), None, on_elements(kept, case)
    weight, x, grad_y = matrix.masked_fill(~mask, NAN), normal(case.m, case.k), normal(case.m, case.n)
    if case.form == "packed":
        weight = torch.cat([as_blocks(matrix, kept, case, NAN), matrix.new_full((2, *case.block), NAN)])
        count = len(weight)
    elif case.form == "transposed":
        weight = weight.t().contiguous()
    elif case.form == "strided":
        weight, x = laid_out(weight, "strided"), laid_out(x, "strided")
        grad_y, kept = laid_out(grad_y, "transposed"), laid_out(kept, "transposed")
    layout = BlockLayout(build_index_reference(kept), case.block, (case.n, case.k), case.form == "transposed", count)
    of_grad = replace(layout, index=build_index_reference(wanted), count=count and int(wanted.sum()) + 1)
    dense, alpha = torch.where(mask, matrix.to(case.x).double(), 0.0), torch.tensor(0.25, device=device)
    return Operands(case, x, grad_y, normal(case.n), weight, dense, kept, wanted, alpha, layout, of_grad)


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
    found = {
        "y": block_forward(o.x, o.weight, o.layout, o.bias, backend=backend, tiles=tiles[0]),
        "grad_x": block_grad_input(o.grad_y, o.weight, o.layout, backend=backend, tiles=tiles[1]),
        "grad_weight": block_grad_weight(
            o.grad_y, o.x, o.grad_layout, kept=o.kept, alpha=o.alpha, out_dtype=o.weight.dtype, backend=backend,
            tiles=tiles[2],
        ),
    }  # fmt: skip
    assert [each.dtype for each in found.values()] == [o.x.dtype, o.x.dtype, o.weight.dtype]
    return found


DUE = ("kept", "B", "everywhere")
LEAVES = ("x", "weight", "bias")
Results = dict[str, Tensor]


def op(o: Operands, due: str, backend: str, asked: Sequence[str] = LEAVES) -> tuple[Results, Results]:
    """What `block_linear`, or `packed_block_linear` of a packed case, and its backward give; and the answer."""
    case, layout, mask = o.case, o.layout, on_elements(o.kept, o.case)
    # One row is a vector, more have two leading axes.
    leading = (case.m,) if case.m == 0 else () if case.m == 1 else (1, case.m)
    given = dict(zip(LEAVES, (o.x.reshape(*leading, case.k), o.weight, o.bias), strict=True))
    given = {name: each.detach().requires_grad_(name in asked) for name, each in given.items()}
    x, weight, bias = given.values()
    grad_mask = {"kept": torch.zeros_like(mask), "B": on_elements(o.wanted, case), "everywhere": None}[due]
    multiplier = torch.where(mask, 1.0, 0.25 * (1.0 if grad_mask is None else grad_mask)).double()
    if case.form == "packed":
        y = packed_block_linear(x, weight, bias, layout.index, shape=layout.shape, backend=backend)
    else:
        masks = (mask, grad_mask if due == "B" else None)
        topology = Topology.of(*masks, case.block)
        masks = tuple(each.t() if layout.transposed and each is not None else each for each in masks)
        view, turned = View("mask", None, *masks, None if due == "kept" else o.alpha), layout.transposed
        y = block_linear(x, weight, topology, view, bias, transposed=turned, dtype=o.x.dtype, backend=backend)
    y.backward(o.grad_y.reshape(y.shape))
    exact = answer(o) | {"grad_bias": o.grad_y.double().sum(0)}
    exact["grad_weight"] = as_stored(gradient(o, multiplier), o, o.kept, layout.count)
    assert all((each.grad is None) == (name not in asked) for name, each in given.items())
    found = {f"grad_{name}": each.grad for name, each in given.items() if each.grad is not None}
    return {name: each.reshape(exact[name].shape) for name, each in {"y": y.detach(), **found}.items()}, exact


def compare(found: Results, exact: Results, bound: Callable[[str, Tensor], float]) -> None:
    """By relative RMS; where no gradient is due, none is."""
    for name, value in found.items():
        expected = exact[name]
        assert value.shape == expected.shape and value.is_contiguous(), name
        wrong, allowed = (value - expected).norm(), bound(name, value)
        assert wrong <= allowed * expected.norm(), f"{name}: {wrong:.2e} of {expected.norm():.2e}, bound {allowed:.0e}"
        assert name != "grad_weight" or not value[expected == 0].any(), name


def check_indices(shapes: Sequence[tuple[int, int]], backend: str, device: str = "cpu") -> None:
    """The indices of layers are rewritten in place as their flags move, and nothing waits for the device."""
    random = torch.Generator(device).manual_seed(0)
    # Layers of nothing, of a few blocks, of many, of all.
    shares = [(0.0, 0.3, 0.9, 1.0)[i % 4] for i in range(len(shapes))]
    flags = [torch.rand(s, generator=random, device=device) < p for s, p in zip(shapes, shares, strict=True)]
    indices = [torch.empty(index_size(*shape), dtype=torch.int32, device=device) for shape in shapes]
    build_indices(flags, indices, backend)
    table = IndexTable(flags, indices, backend)
    for rebuild in (table.build, lambda: build_indices(flags, indices, backend)):
        for one in flags:
            one.logical_not_()
        with no_synchronization(device):
            rebuild()
        for one, index in zip(flags, indices, strict=True):
            assert torch.equal(index, build_index_reference(one)), tuple(one.shape)


@contextmanager
def no_synchronization(device: str = "cuda") -> Iterator[None]:
    """On a GPU, waiting for it is an error."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
