"""Linear layers of packed blocks through the interpreter: many rows, and the shares that a few rows are made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels.block.gemm import block_linear
from tritonsparse.kernels.block.packed import few_rows_tiles, packed_block_linear
from tritonsparse.kernels.block.topology import build_index_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Close = Callable[[str, torch.Tensor, torch.Tensor, float], None]

# Against the reference in float64 on the same operands: float16 rounds the result once, and dV nothing.
BOUND = {torch.float32: 2e-6, torch.float16: 5e-4}
shapes = st.tuples(st.sampled_from([(16, 16), (16, 32), (32, 16), (48, 32)]), st.integers(1, 3), st.integers(1, 3))


def operands(
    block: tuple[int, int], rows: int, columns: int, room: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """An index and values, with NaN in the room behind them."""
    flags = torch.rand(rows, columns, generator=random) < 0.5
    values = torch.full((max(1, int(flags.sum()) + room), *block), torch.nan)
    values[: int(flags.sum())] = torch.randn(int(flags.sum()), *block, generator=random)
    return build_index_reference(flags), values


@settings(max_examples=12)
@given(shapes, st.sampled_from([1, 16, 17]), st.integers(0, 1), st.sampled_from(list(BOUND)), st.booleans(), st.data())
def test_output_and_gradients_are_those_of_the_reference(
    assert_close: Close,
    shape: tuple[tuple[int, int], int, int],
    m: int,
    room: int,
    dtype: torch.dtype,
    with_bias: bool,
    data: st.DataObject,
) -> None:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    block, rows, columns = shape
    n, k = rows * block[0], columns * block[1]
    index, values = operands(block, rows, columns, room, random)
    bias = torch.randn(n, generator=random).to(dtype) if with_bias else None
    x, grad_y = torch.randn(m, k, generator=random).to(dtype), torch.randn(m, n, generator=random).to(dtype)
    results = []
    for backend in ("triton", "torch"):
        exact = torch.float64 if backend == "torch" else None
        x_in, values_in = x.detach().to(exact).requires_grad_(), values.to(dtype).to(exact).detach().requires_grad_()
        bias_in = None if bias is None else bias.to(exact)
        y = packed_block_linear(x_in, values_in, bias_in, index, shape=(n, k), backend=backend)
        y.backward(grad_y.to(exact))
        results.append((y.detach(), x_in.grad, values_in.grad))
    for name, ours, theirs in zip(("y", "dx", "dvalues"), *results, strict=True):
        assert_close(name, ours, theirs.to(dtype), BOUND[dtype])


@settings(max_examples=4)
@given(st.sampled_from([1, 5, 16]), st.integers(0, 2**31))
def test_a_few_rows_shared_out_over_a_large_device(assert_close: Close, m: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    block, rows, columns = (32, 16), 2, 20
    index, values = operands(block, rows, columns, 0, random)
    shape = (64, 320)
    tiles = few_rows_tiles(shape, block, Limits(65_536, 132))
    assert tiles.splits == 4
    x, bias = torch.randn(m, 320, generator=random), torch.randn(64, generator=random)
    common = {"block": block, "shape": shape, "packed": True}
    y = block_linear(x, values, bias, index, **common, backend="triton", tiles=tiles)
    expected = block_linear(x.double(), values.double(), bias.double(), index, **common)
    assert_close("y", y, expected.float(), BOUND[torch.float32])
