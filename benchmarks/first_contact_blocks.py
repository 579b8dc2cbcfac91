"""The step of `first_contact.py` on blocks: forward, dX and dW of a 4096 x 4096 weight, 16,384 tokens, and dense ones.

    dense           cuBLAS's product on a random weight, bf16
    ours            the weight is the bf16 copy that a training layer caches
    ours, fp32      blocks of 128: the float32 master weight, converted inside the product, as before there was a copy
    ours, one program   dW in tiles that leave a multiprocessor room for one program, as before; ours has two

Pruned blocks of the weight hold NaN while ours runs: reading one shows. dW is bf16 for ours and dense alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels._tiles import limits_of
from tritonsparse.kernels.block._grad_tiles import BlockGradTiles, block_grad_tiles
from tritonsparse.kernels.block.gemm import BlockLayout, block_forward, block_grad_input
from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.topology import IndexTable, index_size

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from first_contact_child import Context
from first_contact_timing import Bound, Case, Provider, Settings, backend, device, draw, run_cases, sets_of

BF16, FP32 = torch.bfloat16, torch.float32
OPS = ("forward", "grad_input", "grad_weight")
N, K, TOKENS = 4096, 4096, 16_384
DENSITIES, BLOCKS = (1.0, 0.5, 0.2, 0.1), (128, 64, 32)
DEVIATION = 0.02
# What each figure is to reach: of ideal by block, and at a density against dense.
OF_IDEAL, SPEEDUP = {128: "T4", 64: "T5", 32: "T6"}, {128: "T7", 64: "T8"}
AS_DENSE = {"forward": "T1", "grad_input": "T2"}


@dataclass(frozen=True)
class Operands:
    """One set of inputs; `cached` and `master` hold NaN where `weight` is pruned."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor
    mask: Tensor
    cached: Tensor
    master: Tensor
    layout: BlockLayout

    @classmethod
    def of(cls, sizes: tuple[int, int, int], block: int, density: float, dtype: torch.dtype, seed: int) -> Operands:
        n, k, m = sizes
        random = torch.Generator(device()).manual_seed(seed)
        rows, columns = n // block, k // block
        flags = torch.zeros(rows * columns, dtype=torch.bool, device=device())
        order = torch.randperm(rows * columns, generator=random, device=device())
        flags[order[: max(1, round(density * rows * columns))]] = True
        flags = flags.view(rows, columns)
        index = torch.empty(index_size(rows, columns), dtype=torch.int32, device=device())
        layout = BlockLayout(index, (block, block), (n, k))
        IndexTable([flags], [index], backend()).build()
        x, grad_y = draw(random, m, k, dtype=dtype), draw(random, m, n, dtype=dtype)
        master = draw(random, n, k, scale=DEVIATION)
        weight = master.to(dtype)
        mask = flags.repeat_interleave(block, 0).repeat_interleave(block, 1)
        if Settings.empty:
            return cls(x, grad_y, weight, mask, weight, master, layout)
        nan = float("nan")
        cached, master = weight.masked_fill(~mask, nan), master.masked_fill(~mask, nan)
        return cls(x, grad_y, weight, mask, cached, master, layout)


def _dense(o: Operands, op: str) -> Tensor:
    if op == "forward":
        return F.linear(o.x, o.weight)
    return o.grad_y @ o.weight if op == "grad_input" else o.grad_y.t() @ o.x


def _ours(o: Operands, op: str, weight: Tensor, tiles: BlockGradTiles | None = None) -> Tensor:
    if op == "forward":
        return block_forward(o.x, weight, o.layout, backend=backend())
    if op == "grad_input":
        return block_grad_input(o.grad_y, weight, o.layout, backend=backend())
    return block_grad_weight(o.grad_y, o.x, o.layout, out_dtype=o.weight.dtype, backend=backend(), tiles=tiles)


def _exact(o: Operands, op: str, masked: bool) -> Tensor:
    if op == "grad_weight":
        made = o.grad_y.double().t() @ o.x.double()
        return made * o.mask if masked else made
    weight = (o.weight * o.mask if masked else o.weight).double()
    return o.x.double() @ weight.t() if op == "forward" else o.grad_y.double() @ weight


def _ratios(name: str, op: str, block: int, density: float) -> tuple[tuple[str, str, float], ...]:
    """The figures of a provider: against dense, and of the speed-up that the skipped work would allow."""
    at = f"{op} {name}, block {block}, {density:.0%} kept"
    if density == 1:
        return ((f"{at} / dense", AS_DENSE.get(op, "") if (name, block) == ("ours", 128) else "", 1.0),)
    told = name == "ours" and op == "forward"
    sparsity = round(100 * (1 - density))
    speedup = f"{SPEEDUP[block]}@{sparsity}" if told and block in SPEEDUP else ""
    # T4 to T6 are of 50 to 80 %.
    ideal = OF_IDEAL[block] if told and density >= 0.2 and block in OF_IDEAL else ""
    return (f"{at} / dense", speedup, 1.0), (f"{at} of ideal", ideal, density)


def _providers(sizes: tuple[int, int, int], block: int, density: float, op: str, dtype: torch.dtype) -> list[Provider]:
    n, k, m = sizes
    sets = [
        Operands.of(sizes, block, density, dtype, seed)
        for seed in range(sets_of((n * k + m * (n + k)) * dtype.itemsize))
    ]
    one = sets[0]
    reduced = {"forward": k, "grad_input": n, "grad_weight": m}[op]
    bound = Bound.of_product(reduced, dtype)
    kept = one.mask.float().mean().item()
    known: list[Tensor] = []

    def exact() -> tuple[Tensor, ...]:
        if not known:
            known.append(_exact(one, op, True))
        return (known[0],)

    def ours(name: str, call: Callable[[Operands], Tensor], tiles: BlockGradTiles | None = None) -> Provider:
        facts = {"density": kept} | ({} if tiles is None else {"tiles": repr(tiles)})
        calls = [partial(call, each) for each in sets]
        return Provider(name, calls, exact, bound, facts, _ratios(name, op, block, density))

    made = [
        Provider("dense", [partial(_dense, each, op) for each in sets], lambda: (_exact(one, op, False),), bound),
        ours("ours", lambda o: _ours(o, op, o.cached)),
    ]
    if block == 128 and op != "grad_weight":
        made.append(ours("ours, fp32", lambda o: _ours(o, op, o.master)))
    if op == "grad_weight" and (block == 128 or density == 0.2):
        tiles = _one_program(n, k, m, block, dtype)
        made.append(ours("ours, one program", lambda o: _ours(o, op, o.cached, tiles), tiles))
    return made


def _one_program(n: int, k: int, m: int, block: int, dtype: torch.dtype) -> BlockGradTiles:
    """dW's tiles as until 2026-11: one program a multiprocessor, with all of its shared memory."""
    return block_grad_tiles(
        m, (-(-n // block), block), -(-k // block) * block, operand_bytes=dtype.itemsize, precision="ieee",
        aligned=True, limits=limits_of(torch.device(device())), resident=1,
    )  # fmt: skip


def cases(smoke: bool) -> Iterator[Case]:
    sizes, dtype = ((64, 96, 33), torch.float16) if smoke else ((N, K, TOKENS), BF16)
    n, k, m = sizes
    for block in (16,) if smoke else BLOCKS:
        for density in (1.0, 0.5) if smoke else DENSITIES:
            for op in OPS:
                name = f"block {block}, {density:.0%} kept, {op}"
                facts = {"op": op, "n": n, "k": k, "m": m, "block": block, "flops": 2 * m * n * k}
                # Kernels do not depend on the density: the first one compiles.
                seconds = 4.0 if density == 1 else 1.5
                yield Case(name, seconds, facts, partial(_providers, sizes, block, density, op, dtype))


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {"blocks": cases}


def run(context: Context) -> None:
    run_cases(context, list(cases(context.smoke)))
