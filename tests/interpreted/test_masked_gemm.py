"""The fused products and the packing of masks against their references, through the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels._tiles import GemmTiles, grouped_tile
from tritonsparse.kernels._triton import tl, triton
from tritonsparse.kernels.fused.bits import pack_bits, pack_bits_reference, unpack_bits
from tritonsparse.kernels.fused.gemm import fused_grad_input, fused_linear

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Close = Callable[[str, torch.Tensor, torch.Tensor, float], None]

# Against the reference in float64 on the same operands: for float16, of the view's and the result's rounding, each
# 2^-12 of the value at worst on average; for bfloat16 of the interpreter's truncation, eight and two times as coarse.
BOUND = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 1e-2}
# Several tiles along every axis in shapes that the interpreter gets through.
SMALL = GemmTiles(16, 32, 32)

sizes = st.sampled_from([1, 7, 31, 32, 33, 70])
kinds = st.sampled_from(["soft", "soft per row", "hard", "hard per row", "step per row", "mask", "bits"])
dtypes = st.sampled_from([torch.float32, torch.float16])
layouts = st.sampled_from(["contiguous", "transposed", "strided"])


def laid_out(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values behind other strides."""
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "strided":
        wide = matrix.new_zeros(matrix.shape[0] + 1, 2 * matrix.shape[1])
        wide[1:, ::2] = matrix
        return wide[1:, ::2]
    return matrix


def view(kind: str, shape: tuple[int, int], layout: str, random: torch.Generator) -> dict[str, Any]:
    """The operands of a random view of weights of this shape."""
    name = kind.removesuffix(" per row")
    if name in ("mask", "bits"):
        mask = laid_out(torch.rand(shape, generator=random) < 0.5, layout)
        return {"kind": "mask", "mask": laid_out(pack_bits(mask), layout) if name == "bits" else mask}
    threshold = torch.rand(shape[0] if "per row" in kind else 1, generator=random)
    return {"kind": name, "threshold": threshold - 0.5 if name == "soft" else threshold}


def exact(operands: dict[str, Any]) -> dict[str, Any]:
    """The same operands in float64."""
    floats = {name: t.double() for name, t in operands.items() if torch.is_tensor(t) and t.is_floating_point()}
    return operands | floats


@settings(max_examples=30)
@given(
    m=st.sampled_from([0, 1, 7, 16, 17, 40]),
    n=sizes,
    k=sizes,
    kind=kinds,
    transposed=st.booleans(),
    weight=dtypes,
    dtype=dtypes,
    layout=layouts,
    weight_layout=layouts,
    activation=st.sampled_from([None, "relu", "gelu", "silu"]),
    bias=st.booleans(),
    splits=st.sampled_from([1, 1, 2, 4]),
    seed=st.integers(0, 2**16),
)
def test_linear_and_grad_input_equal_the_reference_in_float64(
    assert_close: Close,
    m: int,
    n: int,
    k: int,
    kind: str,
    transposed: bool,
    weight: torch.dtype,
    dtype: torch.dtype,
    layout: str,
    weight_layout: str,
    activation: str | None,
    bias: bool,
    splits: int,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (k, n) if transposed else (n, k)
    given = view(kind, shape, weight_layout, random)
    given |= {"weight": laid_out(torch.randn(shape, generator=random).to(weight), weight_layout)}
    tiles = GemmTiles(16, 32, 32, splits)
    forward = given | {
        "x": laid_out(torch.randn(m, k, generator=random).to(dtype), layout),
        "bias": torch.randn(n, generator=random).to(dtype) if bias else None,
    }
    y = fused_linear(**forward, transposed=transposed, activation=activation, backend="triton", tiles=tiles)
    expected = fused_linear(**exact(forward), transposed=transposed, activation=activation)
    assert_close("y", y, expected.to(dtype), BOUND[dtype])
    backward = given | {"grad_y": laid_out(torch.randn(m, n, generator=random).to(dtype), layout)}
    grad_x = fused_grad_input(**backward, transposed=transposed, backend="triton", tiles=tiles)
    assert_close("grad_x", grad_x, fused_grad_input(**exact(backward), transposed=transposed).to(dtype), BOUND[dtype])
    assert y.is_contiguous() and grad_x.is_contiguous()


@pytest.mark.parametrize("kind", ["soft", "hard", "mask"])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_bfloat16_products_are_upcast_under_the_interpreter(
    assert_close: Close, kind: str, weight: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(0)
    given = view(kind, (40, 50), "contiguous", random) | {"weight": torch.randn(40, 50, generator=random).to(weight)}
    x = torch.randn(9, 50, generator=random).bfloat16()
    actual = fused_linear(x, **given, backend="triton", tiles=SMALL)
    expected = fused_linear(**exact(given | {"x": x}))
    assert_close("y", actual, expected.bfloat16(), BOUND[torch.bfloat16])


def test_the_result_may_be_wider_than_the_operands(assert_close: Close) -> None:
    random = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=random).half() for shape in ((5, 40), (40, 40)))
    t = torch.tensor([0.5])
    y = fused_linear(x, w, kind="hard", threshold=t, out_dtype=torch.float32, backend="triton", tiles=SMALL)
    # Products of float16 are exact in float32, and nothing is rounded to float16 on the way.
    assert_close("y", y, fused_linear(x.double(), w.double(), kind="hard", threshold=t.double()).float(), 1e-6)


@pytest.mark.parametrize("s", [float("inf"), -float("inf")])
def test_nothing_kept_gives_the_bias_and_everything_kept_the_dense_product(assert_close: Close, s: float) -> None:
    random = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(shape, generator=random) for shape in ((3, 40), (40, 40), (40,)))
    # T = sigmoid(inf) = 1 prunes all |W| <= 1; sigmoid(-inf) = 0 none.
    w = w.clamp(-1, 1)
    y = fused_linear(x, w, bias, kind="soft", threshold=torch.tensor([s]), backend="triton", tiles=SMALL)
    if s > 0:
        assert torch.equal(y, bias.expand(3, 40))
    else:
        assert_close("y", y, torch.nn.functional.linear(x.double(), w.double(), bias.double()).float(), 1e-6)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_threshold_itself_zeros_nan_and_infinity_are_treated_as_the_view_does(kind: str) -> None:
    inf, nan = float("inf"), float("nan")
    # T = 0.5 either way, without rounding; the identity as x shows the view's columns one by one.
    w = torch.tensor([[0.5, -0.5, 0.0, -0.0, 0.50000006, -0.50000006, 1e-40, inf], [nan, 1.0, 0, 0, 0, 0, 0, 0]])
    t = torch.tensor([0.0 if kind == "soft" else 0.5])
    x = torch.ones(1, 8)
    for row, one in ((0, slice(0, 7)), (0, slice(7, 8)), (1, slice(0, 2))):
        part = w[row : row + 1, one].contiguous()
        expected = fused_linear(x[:, one], part, kind=kind, threshold=t)
        actual = fused_linear(x[:, one].contiguous(), part, kind=kind, threshold=t, backend="triton", tiles=SMALL)
        assert torch.equal(actual.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))
        assert actual.isnan().all() if row else not actual.isnan().any()


def test_what_is_pruned_leaks_neither_nan_nor_infinity() -> None:
    w = torch.tensor([[1.0, float("nan"), float("inf")]])
    for mask in (torch.tensor([[True, False, False]]), torch.tensor([[1]], dtype=torch.int32)):
        y = fused_linear(torch.ones(2, 3), w, kind="mask", mask=mask, backend="triton", tiles=SMALL)
        assert y.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_empty_axis_gives_what_the_reference_gives(shape: tuple[int, int, int], transposed: bool) -> None:
    m, n, k = shape
    w, bias = torch.ones(k, n) if transposed else torch.ones(n, k), torch.ones(n)
    given = {"kind": "soft", "threshold": torch.zeros(1), "transposed": transposed}
    x, grad_y = torch.ones(m, k), torch.ones(m, n)
    assert torch.equal(fused_linear(x, w, bias, **given, backend="triton"), fused_linear(x, w, bias, **given))
    assert torch.equal(fused_grad_input(grad_y, w, **given, backend="triton"), fused_grad_input(grad_y, w, **given))


def test_computed_configurations_give_the_reference_too(assert_close: Close) -> None:
    random = torch.Generator().manual_seed(0)
    w = torch.randn(70, 130, generator=random)
    given = view("bits", (70, 130), "contiguous", random)
    for m in (7, 65):
        x = torch.randn(m, 130, generator=random)
        expected = fused_linear(**exact(given | {"x": x, "weight": w})).float()
        assert_close(f"y of {m} rows", fused_linear(x, w, **given, backend="triton"), expected, BOUND[torch.float32])


@settings(max_examples=20)
@given(n=st.integers(1, 40), k=st.integers(1, 100), layout=layouts, seed=st.integers(0, 2**16))
def test_packed_bits_are_the_reference_s_and_unpack_to_the_mask(n: int, k: int, layout: str, seed: int) -> None:
    mask = laid_out(torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < 0.5, layout)
    bits = pack_bits(mask, backend="triton")
    assert bits.dtype == torch.int32 and torch.equal(bits, pack_bits_reference(mask))
    assert torch.equal(unpack_bits(bits, k), mask)


@triton.jit
def _order_of_tiles(order, tiles_m, tiles_n, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    i_m, i_n = grouped_tile(program, tiles_m, tiles_n, GROUP)
    tl.store(order + i_m * tiles_n + i_n, program)


def order_of_tiles(tiles_m: int, tiles_n: int, group: int) -> torch.Tensor:
    """Which program computes each tile; -1 where none does."""
    order = torch.full((tiles_m, tiles_n), -1)
    _order_of_tiles[(tiles_m * tiles_n,)](order, tiles_m, tiles_n, GROUP=group)
    return order


def test_programs_go_down_a_group_of_rows_of_tiles_before_they_go_along() -> None:
    # Groups of two rows of three tiles; the last group has one row.
    assert order_of_tiles(3, 3, 2).tolist() == [[0, 2, 4], [1, 3, 5], [6, 7, 8]]


@settings(max_examples=15)
@given(tiles_m=st.integers(1, 9), tiles_n=st.integers(1, 6), group=st.sampled_from([1, 4, 8]))
def test_every_tile_is_computed_by_one_program(tiles_m: int, tiles_n: int, group: int) -> None:
    order = order_of_tiles(tiles_m, tiles_n, group)
    assert order.flatten().sort().values.tolist() == list(range(tiles_m * tiles_n))
