"""The block-sparse products against their references, through the interpreter.

Whatever is pruned holds NaN, in the weight and behind the packed values: one read of it and the result shows it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels._triton import tl, triton
from tritonsparse.kernels.block._gemm_kernel import _parts
from tritonsparse.kernels.block._gemm_tiles import BlockTiles, tile_side
from tritonsparse.kernels.block._weight import dense_weight
from tritonsparse.kernels.block.gemm import block_grad_input, block_linear
from tritonsparse.kernels.block.topology import build_index_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Close = Callable[[str, torch.Tensor, torch.Tensor, float], None]

# Against the reference in float64 on the same operands, of which the weight is rounded to x's dtype by both.
BOUND = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 1e-2}

dtypes = st.sampled_from([torch.float32, torch.float16])
sides = st.sampled_from([16, 32, 48])
layouts = st.sampled_from(["stored", "transposed", "strided", "packed"])


def weight_of(
    n: int,
    k: int,
    block: tuple[int, int],
    kept: float,
    layout: str,
    dtype: torch.dtype,
    random: torch.Generator,
    heavy: bool = False,
) -> dict[str, Any]:
    """A random weight, its index and how it lies; NaN where nothing may be read. `heavy`: a row and a column whole."""
    r, c = block
    flags = torch.rand(-(-n // r), -(-k // c), generator=random) < kept
    if heavy:
        flags[0], flags[:, -1] = True, True
    index = build_index_reference(flags)
    dense = torch.randn(n, k, generator=random).to(dtype)
    if layout == "packed":
        # Edge blocks are stored whole; beyond the weight they hold NaN too.
        padded = F.pad(dense, (0, -k % c, 0, -n % r), value=float("nan"))
        blocks = padded.view(flags.shape[0], r, -1, c).transpose(1, 2)
        values = torch.cat([blocks[flags], torch.full((2, r, c), float("nan"), dtype=dtype)])
        return {"weight": values, "index": index, "block": block, "shape": (n, k), "packed": True}
    mask = flags.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
    weight = dense.masked_fill(~mask, float("nan"))
    if layout == "strided":
        wide = torch.full((n, 2 * k), float("nan"), dtype=dtype)
        wide[:, ::2] = weight
        weight = wide[:, ::2]
    elif layout == "transposed":
        weight = weight.t().contiguous()
    return {"weight": weight, "index": index, "block": block, "transposed": layout == "transposed"}


def exact(product: Callable[..., torch.Tensor], rows: torch.Tensor, given: dict[str, Any], **more: Any) -> torch.Tensor:
    """The reference in float64, the weight as rounded to the rows' dtype."""
    weight = given["weight"].to(rows.dtype).double()
    more = {name: t.double() if torch.is_tensor(t) else t for name, t in more.items()}
    first = {"x" if product is block_linear else "grad_y": rows.double()}
    return product(**first, **{**given, "weight": weight}, **more)


@settings(max_examples=20)
@given(
    m=st.sampled_from([0, 1, 7, 17, 40]),
    n=st.sampled_from([1, 33, 64, 100, 200]),
    k=st.sampled_from([1, 33, 64, 100, 200]),
    block=st.tuples(sides, sides),
    kept=st.sampled_from([0.0, 0.3, 1.0]),
    layout=layouts,
    weight_dtype=dtypes,
    dtype=dtypes,
    columns_of_x=st.booleans(),
    activation=st.sampled_from([None, "relu", "gelu", "silu"]),
    bias=st.booleans(),
    splits=st.sampled_from([1, 1, 2, 4]),
    persistent=st.booleans(),
    heavy=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_linear_and_grad_input_equal_the_reference_in_float64(
    assert_close: Close,
    m: int,
    n: int,
    k: int,
    block: tuple[int, int],
    kept: float,
    layout: str,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
    columns_of_x: bool,
    activation: str | None,
    bias: bool,
    splits: int,
    persistent: bool,
    heavy: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    given = weight_of(n, k, block, kept, layout, weight_dtype, random, heavy)
    x, grad_y, b = (torch.randn(shape, generator=random).to(dtype) for shape in ((m, k), (m, n), (n,)))
    if columns_of_x:
        x, grad_y = x.t().contiguous().t(), grad_y.t().contiguous().t()
    (r, c), options = block, {"splits": splits, "group": 2, "persistent": int(persistent)}
    tiles = BlockTiles(16, tile_side(r, 32), tile_side(c, 32), **options)
    more = {"bias": b if bias else None, "activation": activation}
    y = block_linear(x, **given, **more, backend="triton", tiles=tiles)
    assert_close("y", y, exact(block_linear, x, given, **more).to(dtype), BOUND[dtype])
    tiles = BlockTiles(16, tile_side(c, 32), tile_side(r, 32), **options)
    grad_x = block_grad_input(grad_y, **given, backend="triton", tiles=tiles)
    assert_close("grad_x", grad_x, exact(block_grad_input, grad_y, given).to(dtype), BOUND[dtype])
    assert y.is_contiguous() and grad_x.is_contiguous()


@settings(max_examples=10)
@given(
    m=st.sampled_from([1, 17, 40]),
    block=st.tuples(sides, sides),
    layout=st.sampled_from(["stored", "transposed", "packed"]),
    ragged=st.booleans(),
    dtype=dtypes,
    splits=st.sampled_from([1, 2]),
    subtiles=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_descriptors_read_what_pointers_read(
    assert_close: Close,
    m: int,
    block: tuple[int, int],
    layout: str,
    ragged: bool,
    dtype: torch.dtype,
    splits: int,
    subtiles: int,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    (r, c), edge = block, 0 if layout == "packed" or not ragged else 16
    n, k = 2 * r + edge % r, 3 * c + edge % c
    given = weight_of(n, k, block, 0.5, layout, dtype, random)
    x, grad_y = (torch.randn(shape, generator=random).to(dtype) for shape in ((m, k), (m, n)))
    options = {"splits": splits, "descriptors": True, "group": 1}
    tiles = BlockTiles(32, tile_side(r, 32), tile_side(c, 32), subtiles=subtiles, **options)
    y = block_linear(x, **given, bias=None, backend="triton", tiles=tiles)
    assert_close("y", y, exact(block_linear, x, given, bias=None).to(dtype), BOUND[dtype])
    tiles = BlockTiles(16, tile_side(c, 32), tile_side(r, 32), **options)
    grad_x = block_grad_input(grad_y, **given, backend="triton", tiles=tiles)
    assert_close("grad_x", grad_x, exact(block_grad_input, grad_y, given).to(dtype), BOUND[dtype])


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_values_of_no_block_at_all_leave_the_bias(with_bias: bool, activation: str | None) -> None:
    index = build_index_reference(torch.zeros(2, 3, dtype=torch.bool))
    x, values = torch.randn(5, 96).half(), torch.empty(0, 32, 32, dtype=torch.float16)
    bias = torch.randn(64).half() if with_bias else None
    common: dict[str, Any] = {"block": (32, 32), "shape": (64, 96), "packed": True}
    for descriptors in (False, True):
        tiles = BlockTiles(16, 32, 32, descriptors=descriptors)
        y = block_linear(x, values, bias, index, activation=activation, backend="triton", tiles=tiles, **common)
        expected = block_linear(x, values, bias, index, activation=activation, **common)
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        grad_x = block_grad_input(x.new_ones(5, 64), values, index, backend="triton", tiles=tiles, **common)
        assert grad_x.shape == (5, 96) and not grad_x.any()


def test_computed_configurations_give_the_reference_too(assert_close: Close) -> None:
    random = torch.Generator().manual_seed(0)
    given = weight_of(128, 192, (64, 64), 0.5, "stored", torch.float16, random)
    for m in (7, 65):
        x, grad_y = torch.randn(m, 192, generator=random).half(), torch.randn(m, 128, generator=random).half()
        y = block_linear(x, **given, bias=None, backend="triton")
        assert_close(f"y of {m} rows", y, exact(block_linear, x, given, bias=None).half(), BOUND[torch.float16])
        grad_x = block_grad_input(grad_y, **given, backend="triton")
        assert_close(f"grad_x of {m} rows", grad_x, exact(block_grad_input, grad_y, given).half(), 5e-4)


@triton.jit
def write_parts(parts, p_start, lines, tiles, programs, TILES_K: tl.constexpr, SPLITS: tl.constexpr):
    for line in range(lines):
        tl.store(parts + line, _parts(p_start, line, lines, tiles, programs, TILES_K, SPLITS))


# Blocks that lines keep, items of a line, programs, the most parts, and the parts: a line is cut into what the others
# do not outlast, unless it is longer by half at most.
@pytest.mark.parametrize(
    ("counts", "tiles", "programs", "splits", "expected"),
    [
        ([2, 2, 2, 2], 1, 4, 8, [1, 1, 1, 1]),
        ([14, 2, 0, 0], 1, 4, 8, [4, 1, 1, 1]),
        ([14, 2, 0, 0], 1, 4, 2, [2, 1, 1, 1]),
        ([14, 2, 0, 0], 4, 4, 8, [1, 1, 1, 1]),
        ([6, 4, 3, 3], 1, 4, 8, [1, 1, 1, 1]),
        ([7, 3, 3, 3], 1, 4, 8, [2, 1, 1, 1]),
        ([5, 5], 1, 64, 4, [4, 4]),
        ([0, 0], 1, 4, 4, [1, 1]),
    ],
)
def test_lines_are_cut_where_they_would_outlast_what_a_program_has_on_average(
    counts: list[int], tiles: int, programs: int, splits: int, expected: list[int]
) -> None:
    start = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    parts = torch.full((len(counts),), -1, dtype=torch.int32)
    for tiles_k in (1, 4):
        write_parts[(1,)](parts, start, len(counts), tiles, programs, TILES_K=tiles_k, SPLITS=splits)
        # Five blocks of one step in four parts; of four steps in four.
        assert parts.tolist() == expected, tiles_k


def test_one_heavy_line_is_cut_and_no_other_is_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Row 0 keeps all of 16 blocks, each other row one; one tile of x, so 8 items.
    flags = torch.eye(8, 16, dtype=torch.bool)
    flags[0] = True
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 256, generator=random)
    x, bias = torch.randn(5, 256, generator=random), torch.randn(128, generator=random)
    index, seen = build_index_reference(flags), []
    plain = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
        made = plain(self, size, **options)
        if made.ndim == 3:
            seen.append(made.fill_(float("nan")))
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    tiles = BlockTiles(16, 16, 16, splits=4, persistent=0)
    y = block_linear(x, weight, bias, index, block=(16, 16), activation="silu", backend="triton", tiles=tiles)
    expected = block_linear(x, weight, bias, index, block=(16, 16), activation="silu")
    torch.testing.assert_close(y, expected)
    (parts,) = seen
    assert parts.shape == (4, 5, 128)
    assert not parts[:, :, :16].isnan().any() and parts[:, :, 16:].isnan().all()
    # The parts are equal shares of the sixteen blocks.
    torch.testing.assert_close(parts[1, :, :16], x[:, 64:128] @ weight[:16, 64:128].t())


def test_bfloat16_products_are_upcast_under_the_interpreter(assert_close: Close) -> None:
    random = torch.Generator().manual_seed(0)
    given = weight_of(32, 48, (16, 16), 0.5, "stored", torch.bfloat16, random)
    x = torch.randn(9, 48, generator=random).bfloat16()
    y = block_linear(x, **given, bias=None, backend="triton", tiles=BlockTiles(16, 16, 16))
    assert_close("y", y, exact(block_linear, x, given, bias=None).bfloat16(), BOUND[torch.bfloat16])


def test_the_result_may_be_wider_than_the_operands(assert_close: Close) -> None:
    random = torch.Generator().manual_seed(0)
    given = weight_of(32, 32, (16, 16), 0.5, "stored", torch.float16, random)
    x = torch.randn(5, 32, generator=random).half()
    tiles = BlockTiles(16, 16, 16)
    y = block_linear(x, **given, bias=None, out_dtype=torch.float32, backend="triton", tiles=tiles)
    # Products of float16 are exact in float32, and nothing is rounded to float16 on the way.
    assert_close("y", y, exact(block_linear, x, given, bias=None).float(), 1e-6)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("descriptors", [False, True])
def test_rows_without_blocks_give_the_bias_and_columns_without_blocks_zeros(splits: int, descriptors: bool) -> None:
    # Nothing is kept but block (1, 1) of ones: 16 products of 1 x 1.
    weight = torch.full((48, 48), float("nan"))
    weight[16:32, 16:32] = 1.0
    flags = torch.zeros(3, 3, dtype=torch.bool)
    flags[1, 1] = True
    index, bias = build_index_reference(flags), torch.arange(48.0)
    given: dict[str, Any] = {"block": (16, 16), "backend": "triton"}
    tiles = BlockTiles(16, 16, 16, splits=splits, descriptors=descriptors)
    y = block_linear(torch.ones(3, 48), weight, bias, index, **given, tiles=tiles)
    sums = torch.zeros(48)
    sums[16:32] = 16.0
    assert torch.equal(y, (bias + sums).expand(3, 48))
    assert torch.equal(block_grad_input(torch.ones(3, 48), weight, index, **given, tiles=tiles), sums.expand(3, 48))
    index = build_index_reference(torch.zeros(3, 3, dtype=torch.bool))
    assert torch.equal(block_linear(torch.ones(3, 48), weight, bias, index, **given, tiles=tiles), bias.expand(3, 48))
    assert not block_grad_input(torch.ones(3, 48), weight, index, **given, tiles=tiles).any()


@pytest.mark.parametrize("shape", [(0, 16, 16), (2, 0, 16), (2, 16, 0)])
def test_an_empty_axis_gives_what_the_reference_gives(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    index = build_index_reference(torch.ones(-(-n // 16), -(-k // 16), dtype=torch.bool))
    w, bias, x, grad_y = torch.ones(n, k), torch.ones(n), torch.ones(m, k), torch.ones(m, n)
    for product, operands in ((block_linear, (x, w, bias, index)), (block_grad_input, (grad_y, w, index))):
        assert torch.equal(product(*operands, block=(16, 16), backend="triton"), product(*operands, block=(16, 16)))


def test_an_index_that_is_rewritten_is_followed() -> None:
    flags = torch.eye(2, dtype=torch.bool)
    index, x, w = build_index_reference(flags), torch.randn(4, 32), torch.randn(32, 32)
    for _ in range(2):
        y = block_linear(x, w, None, index, block=(16, 16), backend="triton", tiles=BlockTiles(16, 16, 16))
        torch.testing.assert_close(y, x @ dense_weight(w, index, block=(16, 16)).t())
        index.copy_(build_index_reference(~flags))
