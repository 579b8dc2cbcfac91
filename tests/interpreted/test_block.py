"""Topologies, the products over kept blocks and the ops made of them against float64, through the interpreter."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases.block import BOUND, CASES, DUE, NAN, Case, Tiles, answer, check_indices, compare, op, operands, products

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels._triton import tl, triton
from tritonsparse.kernels.block import _index
from tritonsparse.kernels.block._gemm_kernel import _parts
from tritonsparse.kernels.block._gemm_tiles import BlockTiles, tile_side
from tritonsparse.kernels.block._grad_tiles import BlockGradTiles
from tritonsparse.kernels.block.gemm import BlockLayout, block_forward, block_grad_input
from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.packed import few_rows_tiles
from tritonsparse.kernels.block.topology import build_index_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# The interpreter truncates to bfloat16.
BOUNDS = BOUND | {torch.bfloat16: 1e-2}


def bound(name: str, value: torch.Tensor) -> float:
    return BOUNDS[value.dtype]


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
    even = case.n % 16 == case.k % 16 == 0 and case.m * case.n * case.k > 0
    return even and case.form != "strided" and (case.form != "packed" or case.divides)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_product_equals_the_one_in_float64(case: Case, configuration: str) -> None:
    if configuration == "descriptors" and not described(case):
        return
    o, tiles = operands(case), CONFIGURATIONS[configuration](case)
    found = products(o, "triton", tiles)
    compare(found, answer(o), bound)
    if configuration == "split" and case.lines and case.form == "transposed":
        assert all(torch.equal(value, found[name]) for name, value in products(o, "triton", tiles).items())


@pytest.mark.parametrize("case", [CASES[5], CASES[7], CASES[9], CASES[12]], ids=str)
def test_the_ops_and_their_gradients_equal_those_in_float64(case: Case) -> None:
    for due in ("kept",) if case.form == "packed" else DUE:
        # The dense product for dW is of the dtype of x.
        least = BOUND[case.x] if due == "everywhere" else 0.0
        compare(*op(operands(case), due, "triton"), lambda _, value, least=least: max(BOUND[value.dtype], least))


def test_a_result_may_be_wider_than_its_operands() -> None:
    o = operands(Case(5, 32, 32, (16, 16), weight=torch.half, x=torch.half))
    how: dict[str, Any] = {"out_dtype": torch.float32, "backend": "triton", "tiles": BlockTiles(16, 16, 16)}
    y = block_forward(o.x, o.weight, o.layout, o.bias, **how)
    # Products of float16 are exact in float32, and nothing is rounded to float16 on the way.
    compare({"y": y}, answer(o), lambda *_: 1e-6)


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
        ([2, 2, 2, 2], 1, 4, 8, [1, 1, 1, 1]), ([14, 2, 0, 0], 1, 4, 8, [4, 1, 1, 1]),
        ([14, 2, 0, 0], 1, 4, 2, [2, 1, 1, 1]), ([14, 2, 0, 0], 4, 4, 8, [1, 1, 1, 1]),
        ([6, 4, 3, 3], 1, 4, 8, [1, 1, 1, 1]), ([7, 3, 3, 3], 1, 4, 8, [2, 1, 1, 1]),
        ([5, 5], 1, 64, 4, [4, 4]), ([0, 0], 1, 4, 4, [1, 1]),
    ],
)  # fmt: skip
def test_long_lines_are_cut(counts: list[int], tiles: int, programs: int, splits: int, expected: list[int]) -> None:
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
    torch.testing.assert_close(parts[1, :, :16], x[:, 64:128] @ weight[:16, 64:128].t())


def test_a_few_rows_are_shared_out_over_a_large_device() -> None:
    o = operands(Case(5, 64, 320, (32, 16), "packed"))
    tiles = few_rows_tiles((64, 320), (32, 16), Limits(65_536, 132))
    assert tiles.splits == 4
    y = block_forward(o.x, o.weight, o.layout, o.bias, backend="triton", tiles=tiles)
    compare({"y": y}, answer(o), bound)


def test_a_block_row_of_many_blocks_is_found_in_parts_of_its_list() -> None:
    # 70 blocks of 16 a row, more than are compared at a time; an empty row, and a full one.
    o = operands(Case(16, 48, 1120, (16, 16), kept=0.9, lines=True))
    given: dict[str, Any] = {"kept": o.kept, "alpha": o.alpha, "tiles": BlockGradTiles(16, 16, 256)}
    grad = block_grad_weight(o.grad_y, o.x, o.grad_layout, backend="triton", **given)
    compare({"grad_weight": grad}, answer(o), bound)


def test_a_packed_gradient_leaves_out_what_it_has_no_room_for() -> None:
    o = operands(Case(16, 64, 64, (16, 32), "packed", kept=1.0))
    given: dict[str, Any] = {"backend": "triton", "tiles": BlockGradTiles(16, 32, 32, 1, 2)}
    whole = block_grad_weight(o.grad_y, o.x, o.grad_layout, **given)
    for short in (0, 3):
        part = block_grad_weight(o.grad_y, o.x, replace(o.grad_layout, count=short), **given)
        assert part.shape == (short, 16, 32) and torch.equal(part, whole[:short])


def test_a_nan_of_the_product_stays_where_its_multiplier_is_zero() -> None:
    o = operands(Case(16, 32, 64, (16, 16), kept=1.0))
    kept = torch.tensor([[True, False, True, False]] * 2)
    o.x[3, 16:32] = NAN
    for alpha in (None, torch.tensor(0.0)):
        grad = block_grad_weight(o.grad_y, o.x, o.layout, kept=kept, alpha=alpha, backend="triton")
        assert grad.isfinite().all() and not grad[:, 16:32].any() and grad[:, :16].all()


def test_the_indices_of_all_layers_are_the_reference_s(monkeypatch: pytest.MonkeyPatch) -> None:
    # Around one and two tiles of 32 flags.
    check_indices([(1, 1), (2, 70), (31, 32), (32, 1), (33, 70), (70, 32)], "triton")
    # Sums of more tiles than a scan takes at once are carried on.
    monkeypatch.setattr(_index, "SCAN_TILE", 16)
    check_indices([(70, 70)], "triton")
