"""The definition of the products over kept blocks, their configurations and what they refuse, without Triton."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases.block import BF16, BOUND, CASES, F32, F64, NAN, ODD, Case, answer, compare, operands, products
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels.block._gemm_tiles import block_tiles, tile_side
from tritonsparse.kernels.block._grad_tiles import block_grad_tiles, takes_rows
from tritonsparse.kernels.block.gemm import BlockLayout, block_forward, block_grad_input
from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.storage import dense_weight
from tritonsparse.kernels.block.topology import build_index_reference, index_size


@pytest.mark.parametrize("case", [*ODD, *CASES], ids=str)
def test_the_references_are_the_products_of_the_masked_dense_weight(case: Case) -> None:
    for seed in range(3 if case in ODD else 1):
        o = operands(case, seed=seed)
        assert torch.equal(dense_weight(o.weight, o.layout).to(case.x).double(), o.dense)
        compare(products(o, "torch"), answer(o), lambda _, value: BOUND[value.dtype])


def test_the_products_of_three_blocks_by_hand() -> None:
    # W = [[1 2 | . .]   blocks of [1, 2]; what a pruned one holds is NaN.
    #      [. . | 3 4]
    #      [. . | . .]]
    weight = torch.tensor([[1.0, 2.0, NAN, NAN], [NAN, NAN, 3.0, 4.0], [NAN] * 4])
    layout = BlockLayout(build_index_reference(torch.tensor([[1, 0], [0, 1], [0, 0]]).bool()), (1, 2), (3, 4))
    x, bias = torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), torch.tensor([0.5, 0.5, -0.5])
    assert block_forward(x, weight, layout, bias).tolist() == [[21.5, 4300.5, -0.5]]
    # dX = dY W: [1 10 100] W.
    assert block_grad_input(torch.tensor([[1.0, 10.0, 100.0]]), weight, layout).tolist() == [[1.0, 2.0, 30.0, 40.0]]


def test_a_gradient_by_hand() -> None:
    # G = [3, 4]^T [1, 2, 5, 6] = [[3, 6, 15, 18], [4, 8, 20, 24]], in blocks of 1 x 2:
    #   (0, 0) is kept, (0, 1) outside the index, (1, 0) pruned with alpha 1/2, (1, 1) kept.
    layout = BlockLayout(build_index_reference(torch.tensor([[True, False], [True, True]])), (1, 2), (2, 4))
    rows = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0, 5.0, 6.0]])
    kept = torch.tensor([[True, False], [False, True]])
    grad = block_grad_weight(*rows, layout, kept=kept, alpha=torch.tensor(0.5))
    assert grad.tolist() == [[3.0, 6.0, 0.0, 0.0], [2.0, 4.0, 20.0, 24.0]]
    # Without alpha, what is pruned gets nothing; packed, the same blocks in order, and what has no room is left out.
    blocks = [[[3.0, 6.0]], [[0.0, 0.0]], [[20.0, 24.0]], [[0.0, 0.0]]]
    for count in (4, 3, 1, 0):
        assert block_grad_weight(*rows, replace(layout, count=count), kept=kept).tolist() == blocks[:count]


def test_no_nan_reaches_a_gradient_that_is_not_due_and_sums_are_in_float32_whatever_the_operands() -> None:
    # Outside the index, and behind a zero alpha.
    layout = BlockLayout(build_index_reference(torch.tensor([[True, False, True]])), (1, 1), (1, 3))
    kept, zero = torch.tensor([[True, False, False]]), torch.tensor(0.0)
    grad = block_grad_weight(torch.ones(1, 1), torch.tensor([[1.0, NAN, NAN]]), layout, kept=kept, alpha=zero)
    assert grad.tolist() == [[1.0, 0.0, 0.0]]
    # 4096 products of 1 + 2^-8, exact in bfloat16 to 8 bits each, are not in a bfloat16 sum.
    grad_y, x = torch.ones(4096, 1, dtype=BF16), torch.full((4096, 1), 1.0078125, dtype=BF16)
    grad = block_grad_weight(grad_y, x, BlockLayout(build_index_reference(torch.tensor([[True]])), (1, 1), (1, 1)))
    assert grad.dtype == F32 and grad.item() == 4096 * 1.0078125


def test_the_result_takes_the_dtype_asked_for_and_autocast_changes_nothing() -> None:
    o = operands(Case(2, 4, 6, (2, 2)))
    assert block_forward(o.x, o.weight, o.layout, out_dtype=F64).dtype == F64
    assert block_grad_input(o.grad_y, o.weight, o.layout, out_dtype=BF16).dtype == BF16
    plain = products(o, "torch")
    with torch.autocast("cpu", BF16):
        assert all(torch.equal(value, plain[name]) for name, value in products(o, "torch").items())


HOPPER, AMPERE, AMD = Limits(232_448, 132), Limits(166_912, 108), Limits(65_536, 304)
HALF: dict[str, Any] = {"weight_bytes": 2, "x_bytes": 2, "precision": "ieee", "aligned": True, "limits": HOPPER}


sides = st.sampled_from([16, 32, 48, 64, 128, 256])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.sampled_from([1, 33, 1000, 16384]), *[st.sampled_from([16, 512, 4096, 11008])] * 2),
    block=st.tuples(sides, sides), widths=st.sampled_from([(2, 2), (4, 2), (4, 4), (2, 4)]),
    precision=st.sampled_from(["ieee", "tf32"]), aligned=st.booleans(),
    limits=st.sampled_from([HOPPER, AMPERE, AMD]),
)  # fmt: skip
def test_computed_tiles_fit_into_shared_memory(
    shape: tuple[int, int, int], block: tuple[int, int], widths: tuple[int, int], precision: str, aligned: bool,
    limits: Limits,
) -> None:  # fmt: skip
    (r, c), (m, n, k), (weight_bytes, x_bytes) = block, shape, widths
    common: dict[str, Any] = {"precision": precision, "aligned": aligned, "limits": limits}
    tiles = block_tiles(shape, block=block, weight_bytes=weight_bytes, x_bytes=x_bytes, **common)
    assert r % tiles.n == 0 and c % tiles.k == 0 and min(tiles.m, tiles.n, tiles.k) >= 16
    assert all(side & (side - 1) == 0 for side in (tiles.m, tiles.n, tiles.k, tiles.group))
    stage = (tiles.m * x_bytes + tiles.n * weight_bytes) * tiles.k
    assert tiles.persistent * tiles.num_stages * stage <= limits.shared_bytes
    assert tiles.n % (16 * tiles.subtiles) == 0
    of_grad = block_grad_tiles(m, (-(-n // r), r), -(-k // c) * c, operand_bytes=x_bytes, **common)
    assert of_grad.m * (of_grad.n + of_grad.k) * x_bytes * of_grad.num_stages <= limits.shared_bytes
    assert of_grad.n // of_grad.subtiles >= 16 and of_grad.subtiles <= 8
    assert all(size & (size - 1) == 0 for size in (of_grad.m, of_grad.n, of_grad.k, of_grad.splits))
    # With one block in eight kept, as many programs as multiprocessors are not split up.
    programs = -(-n // r) * -(-r // of_grad.n) * -(-k // c) * c / of_grad.k / 8
    assert of_grad.splits == 1 or programs <= limits.multiprocessors


def test_tiles_on_hopper_are_wide_and_split_the_reduction_of_few_rows_and_few_blocks() -> None:
    # The largest power of two that divides the block's side, and no more than is asked for.
    assert [tile_side(*each) for each in ((128, 128), (256, 128), (48, 64), (96, 64))] == [128, 128, 16, 32]
    for side, shape in ((128, (256, 128, 64)), (64, (256, 64, 64)), (32, (256, 32, 32))):
        tiles = block_tiles((8192, 4096, 4096), block=(side, side), **HALF)
        assert (tiles.m, tiles.n, tiles.k) == shape and tiles.num_stages == 4 and tiles.descriptors
    # 4 block rows and 2 tiles of x are 8 items for 132 multiprocessors. 32 tiles of 64 rows are 128 items, taken at
    # once: the longest would outlast the others. 256 would not be. One multiprocessor's worth is not cut up.
    for m, k, splits in ((128, 16384, 16), (2048, 16384, 4), (8192, 16384, 1), (128, 256, 1)):
        assert block_tiles((m, 512, k), block=(128, 128), **HALF).splits == splits


def test_a_tile_s_own_axis_is_the_longer_side_of_a_block_then_the_longer_axis_then_that_of_stored_rows() -> None:
    assert takes_rows((64, 4096), (64, 16), False) and not takes_rows((4096, 64), (16, 64), False)
    # A tile takes no more than 128 of a side.
    assert takes_rows((4096, 1024), (128, 256), False) and not takes_rows((1024, 4096), (128, 256), False)
    assert takes_rows((512, 512), (64, 64), False) and not takes_rows((512, 512), (64, 64), True)


X, GRAD_Y, W = torch.zeros(2, 32), torch.zeros(2, 16), torch.zeros(16, 32)
LAYOUT = BlockLayout(build_index_reference(torch.ones(1, 2).bool()), (16, 16), (16, 32))
NARROW = BlockLayout(build_index_reference(torch.ones(2, 2).bool()), (8, 16), (16, 32))


FORWARD, GRAD = {"x": X, "weight": W, "layout": LAYOUT}, {"grad_y": GRAD_Y, "x": X, "layout": LAYOUT}


@pytest.mark.parametrize(("call", "changed", "expected", "remedy"), [
    (block_forward, {"x": X[:, :3]}, "x to be a floating-point matrix [M, 32]", "flatten the leading axes"),
    (block_forward, {"weight": W[0]}, "weight to be a floating-point [16, 32]", "as the layout says"),
    (block_forward, {"weight": W.int()}, "weight to be a floating-point", "as the layout says"),
    (block_forward, {"layout": replace(LAYOUT, transposed=True)}, "floating-point [32, 16]", "as the layout says"),
    (block_forward, {"layout": replace(LAYOUT, index=LAYOUT.index[1:])}, f"int32 [{index_size(1, 2)}]", "index_size"),
    (block_forward, {"layout": replace(LAYOUT, index=LAYOUT.index.to("meta"))}, "index on cpu", "weight's device"),
    (block_forward, {"layout": replace(LAYOUT, block=(16, 0))}, "(rows, columns) of at least 1", "(64, 64)"),
    (block_forward, {"layout": NARROW, "backend": "triton"}, "multiples of 16", 'backend="torch"'),
    (block_forward, {"layout": replace(LAYOUT, count=2, transposed=True)}, "not transposed", "as [N, K]"),
    (block_forward, {"layout": replace(LAYOUT, count=2)}, "[2, 16, 16], contiguous", "pack_blocks"),
    (block_forward, {"bias": torch.zeros(3)}, "bias to be torch.float32 [16]", "cast the bias with x"),
    (block_forward, {"out_dtype": torch.int8}, "a floating-point out_dtype", "leave it out"),
    (block_forward, {"backend": "cuda"}, 'backend "torch" or "triton"', "pass either"),
    (block_forward, {"x": X.double(), "backend": "triton"}, "x in float16, bfloat16 or float32", 'backend="torch"'),
    (block_forward, {"weight": W.double(), "backend": "triton"}, "weight in float16, bfloat16", 'backend="torch"'),
    (block_grad_weight, {"grad_y": X}, "grad_y to be a floating-point matrix [M, 16]", "flatten the leading axes"),
    (block_grad_weight, {"x": GRAD_Y}, "x to be a floating-point matrix [M, 32]", "flatten the leading axes"),
    (block_grad_weight, {"x": X[1:]}, "the rows and the dtype of x, 1", "as the forward's product left them"),
    (block_grad_weight, {"x": X.half()}, "the rows and the dtype of x", "as the forward's product left them"),
    (block_grad_weight, {"out_dtype": torch.int8}, "a floating-point out_dtype", "leave it out"),
    (block_grad_weight, {"kept": torch.ones(1, 2)}, "kept to be bool [1, 2]", "one flag a block"),
    (block_grad_weight, {"kept": torch.ones(2, 1).bool()}, "kept to be bool [1, 2]", "one flag a block"),
    (block_grad_weight, {"alpha": torch.zeros(2)}, "alpha to be one float32 value", "keep the schedule's value"),
    (block_grad_input, {"grad_y": X, "weight": W, "layout": LAYOUT}, "grad_y to be a floating-point matrix [M, 16]",
     "flatten"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_remedy(call: Any, changed: Any, expected: str, remedy: str) -> None:
    with pytest.raises(ValueError) as error:
        call(**{block_forward: FORWARD, block_grad_weight: GRAD}.get(call, {}) | changed)
    message = str(error.value)
    assert message.startswith("block_") and ": expected " in message and expected in message and remedy in message
