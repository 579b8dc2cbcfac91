"""Topologies, the products over kept blocks and the ops made of them against float64, through the interpreter."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels._triton import tl, triton
from tritonsparse.kernels.block import _index
from tritonsparse.kernels.block._gemm_kernel import _parts
from tritonsparse.kernels.block._gemm_tiles import BlockTiles, tile_side
from tritonsparse.kernels.block._grad_tiles import BlockGradTiles
from tritonsparse.kernels.block.gemm import BlockLayout, block_forward, block_grad_input
from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.packed import few_rows_tiles
from tritonsparse.kernels.block.topology import IndexTable, build_index_reference, build_indices, index_size

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from cases.block import BF16, CASES, DUE, F16, F32, NAN, Case, Tiles, answer, op, operands, products

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Close = Callable[[str, torch.Tensor, torch.Tensor, float], None]

# By the dtype of the result: sums in float32, then one rounding.
BOUND = {F32: 2e-6, F16: 5e-4, BF16: 1e-2}


def tiles_of(case: Case, grad: BlockGradTiles, **options: Any) -> Tiles:
    """Small tiles of the forward and, of exchanged sides, of dX."""
    r, c = (tile_side(side, 32) for side in case.block)
    options = {"group": 2, "persistent": 0, **options}
    return BlockTiles(16, r, c, **options), BlockTiles(16, c, r, **options), grad


# A block a tile, parts of a block, several blocks, a tile larger than all, and reductions that are split.
CONFIGURATIONS: dict[str, Callable[[Case], Tiles]] = {
    "a program a tile": lambda case: tiles_of(case, BlockGradTiles(16, 32, 32, 1, 2)),
    "split": lambda case: tiles_of(case, BlockGradTiles(16, 64, 64, 2, 2), splits=4, persistent=1),
    "descriptors": lambda case: tiles_of(
        case, BlockGradTiles(32, 64, 128, 1, 4), splits=2, subtiles=2, persistent=1, descriptors=True
    ),
    "computed": lambda case: (None, None, None),
}


def described(case: Case) -> bool:
    """Whether a descriptor can be made of every operand."""
    even = case.n % 16 == case.k % 16 == 0 and case.m * case.n * case.k > 0
    return even and case.form != "strided" and (case.form != "packed" or case.divides)


def compare(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], assert_close: Close, least: float = 0.0
) -> None:
    for name, value in found.items():
        assert_close(name, value, expected[name].to(value.dtype), max(BOUND[value.dtype], least))
        # Nothing is written where no gradient is due.
        assert name != "grad_weight" or torch.equal(value == 0, expected[name] == 0)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_product_equals_the_one_in_float64(assert_close: Close, case: Case, configuration: str) -> None:
    if configuration == "descriptors" and not described(case):
        return
    o, tiles = operands(case), CONFIGURATIONS[configuration](case)
    found = products(o, "triton", tiles)
    assert all(value.is_contiguous() for value in found.values())
    compare(found, answer(o), assert_close)
    if configuration == "split" and case.lines and case.form == "transposed":
        assert all(torch.equal(value, found[name]) for name, value in products(o, "triton", tiles).items())


@pytest.mark.parametrize("case", [CASES[5], CASES[7], CASES[9], CASES[12]], ids=str)
def test_the_ops_and_their_gradients_equal_those_in_float64(assert_close: Close, case: Case) -> None:
    for due in ("kept",) if case.form == "packed" else DUE:
        # The dense product for dW is of the dtype of x.
        compare(*op(operands(case), due, "triton"), assert_close, BOUND[case.x] if due == "everywhere" else 0.0)


def test_bfloat16_products_are_upcast_under_the_interpreter(assert_close: Close) -> None:
    case = Case(9, 32, 48, (16, 16), weight=BF16, x=BF16)
    compare(products(operands(case), "triton", CONFIGURATIONS["split"](case)), answer(operands(case)), assert_close)


def test_a_result_may_be_wider_than_its_operands(assert_close: Close) -> None:
    case = Case(5, 32, 32, (16, 16), weight=F16, x=F16)
    o, tiles = operands(case), BlockTiles(16, 16, 16)
    y = block_forward(o.x, o.weight, o.layout, o.bias, out_dtype=F32, backend="triton", tiles=tiles)
    # Products of float16 are exact in float32, and nothing is rounded to float16 on the way.
    assert_close("y", y, answer(o)["y"].float(), 1e-6)


@pytest.mark.parametrize("descriptors", [False, True])
def test_packed_values_of_no_block_at_all_leave_the_bias(descriptors: bool) -> None:
    index, x, values = build_index_reference(torch.zeros(2, 3).bool()), torch.randn(5, 96), torch.empty(0, 32, 32)
    layout, tiles = BlockLayout(index, (32, 32), (64, 96), count=0), BlockTiles(16, 32, 32, descriptors=descriptors)
    given: dict[str, Any] = {"backend": "triton", "tiles": tiles}
    for bias in (torch.randn(64), None):
        expected = (torch.zeros(64) if bias is None else bias).expand(5, 64)
        assert torch.equal(block_forward(x, values, layout, bias, **given), expected)
    grad_x = block_grad_input(torch.ones(5, 64), values, layout, **given)
    assert grad_x.shape == (5, 96) and not grad_x.any()


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
    x, weight, bias = torch.randn(5, 256), torch.randn(128, 256), torch.randn(128)
    layout, seen, plain = BlockLayout(build_index_reference(flags), (16, 16), (128, 256)), [], torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
        made = plain(self, size, **options)
        if made.ndim == 3:
            seen.append(made.fill_(NAN))
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    tiles = BlockTiles(16, 16, 16, splits=4, persistent=0)
    y = block_forward(x, weight, layout, bias, backend="triton", tiles=tiles)
    torch.testing.assert_close(y, block_forward(x, weight, layout, bias))
    (parts,) = seen
    assert parts.shape == (4, 5, 128)
    assert not parts[:, :, :16].isnan().any() and parts[:, :, 16:].isnan().all()
    # The parts are equal shares of the sixteen blocks.
    torch.testing.assert_close(parts[1, :, :16], x[:, 64:128] @ weight[:16, 64:128].t())


def test_a_few_rows_are_shared_out_over_a_large_device(assert_close: Close) -> None:
    o = operands(Case(5, 64, 320, (32, 16), "packed"))
    tiles = few_rows_tiles((64, 320), (32, 16), Limits(65_536, 132))
    assert tiles.splits == 4
    y = block_forward(o.x, o.weight, o.layout, o.bias, backend="triton", tiles=tiles)
    assert_close("y", y, answer(o)["y"].float(), BOUND[F32])


def test_a_block_row_of_many_blocks_is_found_in_parts_of_its_list(assert_close: Close) -> None:
    # 70 blocks of 16 a row, more than are compared at a time; an empty row, and a full one.
    o = operands(Case(16, 48, 1120, (16, 16), kept=0.9, lines=True))
    given: dict[str, Any] = {"kept": o.kept, "alpha": o.alpha, "tiles": BlockGradTiles(16, 16, 256)}
    grad = block_grad_weight(o.grad_y, o.x, o.grad_layout, backend="triton", **given)
    compare({"grad_weight": grad}, answer(o), assert_close)


def test_a_packed_gradient_leaves_out_what_it_has_no_room_for() -> None:
    o = operands(Case(16, 64, 64, (16, 32), "packed", kept=1.0))
    given: dict[str, Any] = {"backend": "triton", "tiles": BlockGradTiles(16, 32, 32, 1, 2)}
    whole = block_grad_weight(o.grad_y, o.x, o.grad_layout, **given)
    for short in (0, 3):
        part = block_grad_weight(o.grad_y, o.x, o.grad_layout._replace(count=short), **given)
        assert part.shape == (short, 16, 32) and torch.equal(part, whole[:short])


def test_a_nan_of_the_product_stays_where_its_multiplier_is_zero() -> None:
    o = operands(Case(16, 32, 64, (16, 16), kept=1.0))
    kept = torch.tensor([[True, False, True, False]] * 2)
    o.x[3, 16:32] = NAN
    for alpha in (None, torch.tensor(0.0)):
        grad = block_grad_weight(o.grad_y, o.x, o.layout, kept=kept, alpha=alpha, backend="triton")
        assert grad.isfinite().all() and not grad[:, 16:32].any() and grad[:, :16].all()


def test_an_index_that_is_rewritten_is_followed() -> None:
    flags, x, weight = torch.eye(2, dtype=torch.bool), torch.randn(4, 32), torch.randn(32, 32)
    layout = BlockLayout(build_index_reference(flags), (16, 16), (32, 32))
    for kept in (flags, ~flags):
        layout.index.copy_(build_index_reference(kept))
        y = block_forward(x, weight, layout, backend="triton", tiles=BlockTiles(16, 16, 16))
        torch.testing.assert_close(y, block_forward(x, weight, layout))


# Around one and two tiles of 32 flags.
side = st.sampled_from([1, 2, 31, 32, 33, 70])


@settings(max_examples=10)
@given(
    layers=st.lists(st.tuples(side, side, st.sampled_from([0.0, 0.05, 0.5, 1.0])), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_the_indices_of_all_layers_are_the_reference_s(layers: list[tuple[int, int, float]], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    flags = [torch.rand(r, c, generator=random) < kept for r, c, kept in layers]
    indices = [torch.empty(index_size(r, c), dtype=torch.int32) for r, c, _ in layers]
    build_indices(flags, indices, "triton")
    for (r, c, _), one, index in zip(layers, flags, indices, strict=True):
        assert torch.equal(index, build_index_reference(one)), f"{r} x {c}"


def test_a_table_follows_its_flags() -> None:
    flags = [torch.rand(5, 40) < 0.5, torch.rand(40, 3) < 0.5]
    indices = [torch.empty(index_size(*one.shape), dtype=torch.int32) for one in flags]
    table = IndexTable(flags, indices, "triton")
    for _ in range(2):
        table.build()
        assert all(torch.equal(i, build_index_reference(f)) for f, i in zip(flags, indices, strict=True))
        for one in flags:
            one.logical_not_()


def test_sums_of_more_tiles_than_a_scan_takes_at_once_are_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_index, "SCAN_TILE", 16)
    flags = torch.rand(70, 70) < 0.5
    index = torch.empty(index_size(70, 70), dtype=torch.int32)
    build_indices([flags], [index], "triton")
    assert torch.equal(index, build_index_reference(flags))
