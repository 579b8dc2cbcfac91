"""What bench_block.py compares: the operands of a layer's products, the providers of them, and the exact results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import relative_error
from torch import Tensor

from tritonsparse.kernels import _triton
from tritonsparse.kernels._tiles import input_precision, is_aligned, limits_of
from tritonsparse.kernels.block._gemm_tiles import block_tiles
from tritonsparse.kernels.block.gemm import BlockLayout, block_forward, block_grad_input
from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.topology import IndexTable, index_size

DEVIATION = 0.02


@dataclass(frozen=True)
class Case:
    """A layer's weight `[n, k]` and the tokens of a step."""

    layer: str
    n: int
    k: int
    tokens: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Operands:
    """One set of inputs; `masked` is the weight with its pruned blocks zeroed."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor
    masked: Tensor
    flags: Tensor
    layout: BlockLayout
    table: IndexTable

    @classmethod
    def draw(cls, case: Case, m: int, block: int, density: float, seed: int) -> Operands:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        random = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device).to(case.dtype)

        weight = normal(case.n, case.k).mul_(DEVIATION)
        rows, columns = case.n // block, case.k // block
        flags = torch.zeros(rows * columns, dtype=torch.bool, device=device)
        kept = max(1, round(density * rows * columns))
        flags[torch.randperm(rows * columns, generator=random, device=device)[:kept]] = True
        flags = flags.view(rows, columns)
        index = torch.empty(index_size(rows, columns), dtype=torch.int32, device=device)
        table = IndexTable([flags], [index], backend_here())
        table.build()
        mask = flags.repeat_interleave(block, 0).repeat_interleave(block, 1)
        x, grad_y = normal(m, case.k), normal(m, case.n)
        layout = BlockLayout(index, (block, block), (case.n, case.k))
        return cls(x, grad_y, weight, weight * mask, flags, layout, table)

    @property
    def block(self) -> tuple[int, int]:
        return self.layout.block

    @property
    def mask(self) -> Tensor:
        return self.flags.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)


def backend_here() -> str:
    return "triton" if torch.cuda.is_available() or _triton.INTERPRETED else "torch"


# The results of forward, dX and dW, or one of them.
Provider = Callable[[], tuple[Any, ...]]


def _step(parts: dict[str, Callable[[], Any]], op: str, before: Callable[[], None] | None = None) -> Provider:
    """The op of a provider; its step is all three, after what goes `before` them."""
    if op != "step":
        return lambda: (parts[op](),)

    def run() -> tuple[Any, ...]:
        if before is not None:
            before()
        return tuple(part() for part in parts.values())

    return run


def dense(o: Operands, weight: Tensor, op: str) -> Provider:
    parts = {
        "forward": lambda: F.linear(o.x, weight),
        "grad_input": lambda: o.grad_y @ weight,
        "grad_weight": lambda: o.grad_y.t() @ o.x,
    }
    return _step(parts, op)


def _ours(o: Operands, op: str) -> Provider:
    backend, dtype = backend_here(), o.weight.dtype
    parts = {
        "forward": lambda: block_forward(o.x, o.weight, o.layout, backend=backend),
        "grad_input": lambda: block_grad_input(o.grad_y, o.weight, o.layout, backend=backend),
        "grad_weight": lambda: block_grad_weight(o.grad_y, o.x, o.layout, out_dtype=dtype, backend=backend),
    }
    return _step(parts, op, o.table.build)


def other_tiles(block: int) -> dict[str, dict[str, Any]]:
    """Other configurations of the products, by name: what they change in the computed one."""
    variants: dict[str, dict[str, Any]] = {
        "pointers": {"descriptors": False},
        "a program an item": {"persistent": 0},
        "two programs": {"m": 128, "num_warps": 8 if block == 128 else 4, "num_stages": 3, "persistent": 2},
        "group 1": {"group": 1},
    }
    if block == 64:
        # A descriptor's box has at most 256 rows.
        variants["512 rows"] = {"m": 512, "num_stages": 3, "descriptors": False}
    return variants


def _varied(o: Operands, op: str, changes: dict[str, Any]) -> Provider:
    (n, k), m = o.weight.shape, o.x.shape[0]
    sizes, rows = ((n, k), o.x) if op == "forward" else ((k, n), o.grad_y)
    tiles = block_tiles(
        (m, *sizes), block=o.block, weight_bytes=o.weight.element_size(), x_bytes=rows.element_size(),
        precision=input_precision(rows.dtype), aligned=is_aligned(rows, o.weight), limits=limits_of(rows.device),
    )  # fmt: skip
    given: dict[str, Any] = {"backend": backend_here(), "tiles": replace(tiles, **changes)}
    parts = {
        "forward": lambda: block_forward(o.x, o.weight, o.layout, **given),
        "grad_input": lambda: block_grad_input(o.grad_y, o.weight, o.layout, **given),
    }
    return _step(parts, op)


def _torch_bsr(o: Operands, op: str, tune: bool) -> Provider:
    from torch.sparse._triton_ops import bsr_dense_addmm, sampled_addmm
    from torch.sparse._triton_ops_meta import tune_bsr_dense_addmm

    forward, backward = o.masked.to_sparse_bsr(o.block), o.masked.t().contiguous().to_sparse_bsr(o.block)
    # Neither is read: beta is 0.
    y, grad_x = o.grad_y.t().contiguous(), o.x.t().contiguous()
    if tune and op != "grad_weight":
        for bsr, dense, out in ((forward, o.x, y), (backward, o.grad_y, grad_x)):
            tune_bsr_dense_addmm(out, bsr, dense.t(), beta=0, store=True)
    parts = {
        "forward": lambda: bsr_dense_addmm(y, forward, o.x.t(), beta=0).t(),
        "grad_input": lambda: bsr_dense_addmm(grad_x, backward, o.grad_y.t(), beta=0).t(),
        "grad_weight": lambda: sampled_addmm(forward, o.grad_y.t(), o.x, beta=0.0, skip_checks=True),
    }
    return _step(parts, op)


def _stk(o: Operands, op: str) -> Provider:
    import stk

    weight = stk.ops.to_sparse(o.masked, o.block[0])
    parts = {
        "forward": lambda: stk.ops.dds(o.x, weight.t()),
        "grad_input": lambda: stk.ops.dds(o.grad_y, weight),
        "grad_weight": lambda: stk.ops.sdd(o.grad_y.t(), o.x, weight),
    }
    return _step(parts, op)


def providers_of(
    block: int, density: float, op: str, *, others: bool, tune: bool, tiles: bool
) -> dict[str, Callable[[Operands, str], Provider]]:
    """Of one op, by name; those of other libraries where `others` and the machine allow."""
    made: dict[str, Callable[[Operands, str], Provider]] = {
        "dense random": lambda o, op: dense(o, o.weight, op),
        "dense masked": lambda o, op: dense(o, o.masked, op),
        "ours": _ours,
    }
    if tiles and op in ("forward", "grad_input"):
        for name, changes in other_tiles(block).items():
            made[f"ours, {name}"] = partial(_varied, changes=changes)
    if others and torch.cuda.is_available() and density < 1:
        made["torch bsr"] = partial(_torch_bsr, tune=False)
        if tune:
            made["torch bsr tuned"] = partial(_torch_bsr, tune=True)
        if block == 128 and importlib.util.find_spec("stk") is not None:
            made["stk"] = _stk
    return made


def _as_dense(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result if result.layout == torch.strided else result.to_dense()
    import stk

    dense: Tensor = stk.ops.to_dense(result)
    return dense


def exact(o: Operands, op: str, provider: str) -> tuple[Tensor, ...]:
    """In float64: what the provider computes, from the operands as it is given them."""
    weight = (o.weight if provider == "dense random" else o.masked).double()
    made = {
        "forward": lambda: o.x.double() @ weight.t(),
        "grad_input": lambda: o.grad_y.double() @ weight,
        "grad_weight": lambda: o.grad_y.double().t() @ o.x.double() * (1 if provider.startswith("dense") else o.mask),
    }
    return tuple(part() for part in made.values()) if op == "step" else (made[op](),)


def error_of(provider: Provider, o: Operands, op: str, name: str) -> float:
    expected = exact(o, op, name)
    return max(relative_error(_as_dense(a), e) for a, e in zip(provider(), expected, strict=True))
