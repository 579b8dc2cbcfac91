"""The definition of the gradient of kept blocks and what it refuses, without Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels.block._grad_tiles import block_grad_tiles, takes_rows
from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.topology import build_index_reference

F64 = torch.float64
sides = st.integers(1, 4)
sizes = st.integers(1, 9)


def on_elements(blocks: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """A value a block -> a value an element."""
    return blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


@settings(deadline=None, max_examples=60)
@given(m=st.integers(0, 5), n=sizes, k=sizes, block=st.tuples(sides, sides), transposed=st.booleans(), seed=sizes)
def test_the_gradient_is_the_dense_product_times_its_multiplier_by_blocks(
    m: int, n: int, k: int, block: tuple[int, int], transposed: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    grid = -(-n // block[0]), -(-k // block[1])
    listed = torch.rand(grid, generator=random) < 0.6
    kept = listed & (torch.rand(grid, generator=random) < 0.5)
    grad_y = torch.randn(m, n, generator=random, dtype=F64)
    x = torch.randn(m, k, generator=random, dtype=F64)
    weight = torch.randn((n, k), generator=random, dtype=F64)
    given: dict[str, Any] = {"block": block, "shape": (n, k), "kept": kept, "alpha": torch.tensor(0.25)}
    given |= {"out_dtype": F64, "transposed": transposed, "weight": weight.t() if transposed else weight}
    actual, inner = block_grad_weight(grad_y, x, build_index_reference(listed), **given)

    dense = grad_y.t() @ x
    multiplier = torch.where(kept, 1.0, torch.where(listed, 0.25, 0.0)).double()
    expected = dense * on_elements(multiplier, block, (n, k))
    torch.testing.assert_close(actual.t() if transposed else actual, expected, rtol=1e-12, atol=1e-12)
    assert inner is not None and inner.dtype == F64
    for i in range(grid[0]):
        for j in range(grid[1]):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            wanted = (dense[here] * weight[here]).sum() if listed[i, j] else torch.zeros((), dtype=F64)
            torch.testing.assert_close(inner[i, j], wanted, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(n=sizes, k=sizes, block=st.tuples(sides, sides), spare=st.integers(-1, 3), seed=sizes)
def test_packed_gradients_are_the_blocks_of_the_dense_one_in_row_major_order(
    n: int, k: int, block: tuple[int, int], spare: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    (r, c), grid = block, (-(-n // block[0]), -(-k // block[1]))
    listed = torch.rand(grid, generator=random) < 0.6
    count = int(listed.sum())
    capacity = max(count + spare, 0)
    operands = torch.randn(3, n, generator=random), torch.randn(3, k, generator=random)
    index = build_index_reference(listed)
    dense, _ = block_grad_weight(*operands, index, block=block, shape=(n, k))
    packed, inner = block_grad_weight(*operands, index, block=block, shape=(n, k), packed=True, capacity=capacity)
    assert packed.shape == (capacity, r, c) and inner is None
    padded = torch.zeros(grid[0] * r, grid[1] * c)
    padded[:n, :k] = dense
    for place, (i, j) in enumerate(listed.nonzero().tolist()[:capacity]):
        assert torch.equal(packed[place], padded[i * r : (i + 1) * r, j * c : (j + 1) * c])
    assert not packed[count:].any()


def test_a_matrix_by_hand() -> None:
    # G = [3, 4]^T [1, 2, 5, 6] = [[3, 6, 15, 18], [4, 8, 20, 24]], in blocks of 1 x 2:
    #   (0, 0) is kept, (0, 1) outside the index, (1, 0) pruned with alpha 1/2, (1, 1) kept.
    index = build_index_reference(torch.tensor([[True, False], [True, True]]))
    given: dict[str, Any] = {"block": (1, 2), "shape": (2, 4), "kept": torch.tensor([[True, False], [False, True]])}
    operands = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0, 5.0, 6.0]])
    weight = torch.tensor([[1.0, -1.0, 9.0, 9.0], [1.0, 1.0, 0.0, 2.0]])
    grad, inner = block_grad_weight(*operands, index, **given, alpha=torch.tensor(0.5), weight=weight)
    assert grad.tolist() == [[3.0, 6.0, 0.0, 0.0], [2.0, 4.0, 20.0, 24.0]]
    # Before the multiplier: 3 - 6, 4 + 8 and 2 * 24.
    assert inner is not None and inner.tolist() == [[-3.0, 0.0], [12.0, 48.0]]
    # Without alpha, what is pruned gets nothing; packed, the same blocks in order.
    values = torch.tensor([[[1.0, -1.0]], [[1.0, 1.0]], [[0.0, 2.0]], [[7.0, 7.0]]])
    packed, inner = block_grad_weight(*operands, index, **given, packed=True, weight=values)
    assert packed.tolist() == [[[3.0, 6.0]], [[0.0, 0.0]], [[20.0, 24.0]], [[0.0, 0.0]]]
    assert inner is not None and inner.tolist() == [[-3.0, 0.0], [12.0, 48.0]]


def test_a_nan_outside_the_index_or_behind_a_zero_alpha_reaches_no_gradient() -> None:
    index = build_index_reference(torch.tensor([[True, False, True]]))
    x = torch.tensor([[1.0, float("nan"), float("nan")]])
    grad, inner = block_grad_weight(
        torch.ones(1, 1), x, index, block=(1, 1), shape=(1, 3), kept=torch.tensor([[True, False, False]]),
        alpha=torch.tensor(0.0), weight=torch.ones(1, 3),
    )  # fmt: skip
    assert grad.tolist() == [[1.0, 0.0, 0.0]]
    assert inner is not None and inner[0, :2].tolist() == [1.0, 0.0] and inner[0, 2].isnan()


def test_sums_are_in_float32_whatever_the_operands() -> None:
    # 4096 products of 1 + 2^-8, exact in bfloat16 to 8 bits each, are not in a bfloat16 sum.
    grad_y, x = torch.ones(4096, 1, dtype=torch.bfloat16), torch.full((4096, 1), 1.0078125, dtype=torch.bfloat16)
    index = build_index_reference(torch.tensor([[True]]))
    grad, _ = block_grad_weight(grad_y, x, index, block=(1, 1), shape=(1, 1))
    assert grad.dtype == torch.float32 and grad.item() == 4096 * 1.0078125


@pytest.mark.parametrize("shared", [65_536, 166_912, 232_448])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "half"])
@pytest.mark.parametrize("side", [16, 32, 48, 64, 128, 256])
@pytest.mark.parametrize("columns", [256, 4096, 28672])
def test_a_configuration_fits_the_device_and_splits_only_what_is_small(
    columns: int, side: int, precision: str, shared: int
) -> None:
    for summed in (False, True):
        for aligned in (False, True):
            operand_bytes = 2 if precision == "half" else 4
            tiles = block_grad_tiles(
                8192, 4096 // side, side, columns, operand_bytes=operand_bytes, summed=summed,
                precision="ieee" if precision == "half" else precision, aligned=aligned, limits=Limits(shared, 132),
            )  # fmt: skip
            assert tiles.m * (tiles.n + tiles.k) * operand_bytes * tiles.num_stages <= shared
            assert tiles.n // tiles.subtiles >= 16 and tiles.subtiles <= 8
            assert all(size & (size - 1) == 0 for size in (tiles.m, tiles.n, tiles.k, tiles.splits))
            assert tiles.splits == 1 or 4096 * columns < 8 * 132 * tiles.n * tiles.k


def test_a_tile_s_own_axis_is_the_longer_side_of_a_block_then_the_longer_axis_then_that_of_stored_rows() -> None:
    assert takes_rows((64, 4096), (64, 16), False) and not takes_rows((4096, 64), (16, 64), False)
    # A tile takes no more than 128 of a side.
    assert takes_rows((4096, 1024), (128, 256), False) and not takes_rows((1024, 4096), (128, 256), False)
    assert takes_rows((512, 512), (64, 64), False) and not takes_rows((512, 512), (64, 64), True)


INDEX = build_index_reference(torch.ones(2, 3, dtype=torch.bool))
GIVEN: dict[str, Any] = {"grad_y": torch.zeros(5, 4), "x": torch.zeros(5, 6), "index": INDEX, "block": (2, 2)}


@pytest.mark.parametrize(
    ("operands", "expected", "remedy"),
    [
        ({"backend": "cuda"}, 'backend "torch" or "triton", got \'cuda\'', "pass either"),
        ({"backend": "triton"}, "multiples of 16", 'choose such a block or pass backend="torch"'),
        ({"packed": True, "transposed": True}, "packed or transposed, got both", "pass transposed=False"),
        ({"capacity": 3}, "capacity with packed=True only, got 3", "leave it out"),
        ({"block": (0, 2)}, "at least 1, got (0, 2)", "pass for example"),
        ({"index": INDEX[:-1]}, "index to be contiguous int32", "index_size(R, C)"),
        ({"grad_y": torch.zeros(5, 3)}, "grad_y to be a floating-point matrix [M, 4]", "flatten the leading axes"),
        ({"x": torch.zeros(5, 4)}, "x to be a floating-point matrix [M, 6]", "flatten the leading axes"),
        ({"x": torch.zeros(4, 6)}, "the rows and the dtype of x, 4", "as the forward's product left them"),
        ({"x": torch.zeros(5, 6).half()}, "the rows and the dtype of x", "as the forward's product left them"),
        ({"out_dtype": torch.int32}, "a floating-point out_dtype, got torch.int32", "pass torch.float32"),
        ({"kept": torch.ones(2, 3)}, "kept to be bool [2, 3]", "one flag a block"),
        ({"kept": torch.ones(3, 2).bool()}, "kept to be bool [2, 3]", "one flag a block"),
        ({"alpha": torch.zeros(2)}, "alpha to be one float32 value", "keep the schedule's value"),
        ({"weight": torch.zeros(6, 4)}, "weight to be a floating-point [4, 6]", "stored as its gradient is"),
        ({"weight": torch.zeros(4, 6), "transposed": True}, "[6, 4]", "stored as its gradient is"),
        ({"weight": torch.zeros(7, 2, 3), "packed": True}, "[7, 2, 2] on cpu, contiguous", "stored as its gradient"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(operands: dict[str, Any], expected: str, remedy: str) -> None:
    given: dict[str, Any] = GIVEN | {"shape": (4, 6)} | operands
    with pytest.raises(ValueError) as error:
        block_grad_weight(given.pop("grad_y"), given.pop("x"), given.pop("index"), **given)
    message = str(error.value)
    assert ": expected " in message and expected in message and remedy in message
