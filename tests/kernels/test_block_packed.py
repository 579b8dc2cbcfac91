"""A linear layer of packed blocks: what is packed, what the products are, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels.block._weight import dense_weight
from tritonsparse.kernels.block.packed import few_rows_tiles, pack_blocks, packed_block_linear, unpack_blocks
from tritonsparse.kernels.block.topology import build_index_reference


def packed(shape: tuple[int, int], block: tuple[int, int], keep: float = 0.4, **options: Any) -> tuple[Tensor, ...]:
    """A matrix with pruned blocks of NaN, its index, its values, and the matrix with zeros there."""
    flags = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) < keep
    mask = flags.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    matrix = torch.where(mask, torch.randn(mask.shape, **options), torch.nan)
    index = build_index_reference(flags)
    values = pack_blocks(matrix, index, block, max(1, int(flags.sum())))
    # What blocks at the edges hold beyond them must not matter.
    return index, values, torch.where(mask, matrix, 0.0)[: shape[0], : shape[1]]


def test_blocks_are_packed_row_by_row_and_unpacked_where_they_were() -> None:
    matrix = torch.arange(1, 17).reshape(2, 8)
    # Blocks of 1 x 4: [1..4] [5..8] / [9..12] [13..16]; kept: the second of row 0, both of row 1.
    index = build_index_reference(torch.tensor([[False, True], [True, True]]))
    values = pack_blocks(matrix, index, (1, 4), 3)
    assert values.tolist() == [[[5, 6, 7, 8]], [[9, 10, 11, 12]], [[13, 14, 15, 16]]]
    assert unpack_blocks(values, index, (2, 8)).tolist() == [[0, 0, 0, 0, 5, 6, 7, 8], list(range(9, 17))]


def test_packed_blocks_are_contiguous_whatever_the_matrix_is() -> None:
    index = build_index_reference(torch.tensor([[True, False], [True, True]]))
    matrix = torch.randn(8, 6)
    of_transposed = pack_blocks(matrix.t().contiguous().t(), index, (4, 3), 3)
    assert of_transposed.is_contiguous() and torch.equal(of_transposed, pack_blocks(matrix, index, (4, 3), 3))


def test_room_behind_the_kept_blocks_is_zero_and_is_not_read() -> None:
    index = build_index_reference(torch.tensor([[False, True]]))
    values = pack_blocks(torch.ones(2, 4), index, (2, 2), 3)
    assert values.sum((1, 2)).tolist() == [4.0, 0.0, 0.0]
    values[1:] = torch.nan
    assert unpack_blocks(values, index, (2, 4)).tolist() == [[0.0, 0.0, 1.0, 1.0]] * 2
    y = packed_block_linear(torch.ones(1, 4), values.requires_grad_(), None, index, shape=(2, 4))
    y.sum().backward()
    assert y.tolist() == [[2.0, 2.0]] and values.grad is not None
    assert values.grad.sum((1, 2)).tolist() == [4.0, 0.0, 0.0]


def test_a_weight_of_which_nothing_is_kept_gives_the_bias() -> None:
    index, values, _ = packed((4, 4), (2, 2), keep=0.0)
    bias = torch.randn(4)
    y = packed_block_linear(torch.randn(3, 4), values, bias, index, shape=(4, 4))
    assert values.shape == (1, 2, 2) and torch.equal(y, bias.expand(3, 4))


sides = st.integers(1, 4)


@settings(deadline=None, max_examples=60)
@given(sides, sides, sides, sides, st.integers(0, 3), st.integers(0, 3), st.floats(0, 1), st.integers(0, 2**31))
def test_unpacked_is_the_reference_weight_also_where_edge_blocks_are_cut(
    rows: int, columns: int, r: int, c: int, cut_n: int, cut_k: int, keep: float, seed: int
) -> None:
    torch.manual_seed(seed)
    shape = (rows * r - min(cut_n, r - 1), columns * c - min(cut_k, c - 1))
    index, values, matrix = packed(shape, (r, c), keep)
    unpacked = unpack_blocks(values, index, shape)
    assert torch.equal(unpacked, matrix)
    assert torch.equal(unpacked, dense_weight(values, index, block=(r, c), shape=shape, packed=True))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0, 4)], ids=str)
def test_output_and_gradients_are_those_of_the_matrix(leading: tuple[int, ...]) -> None:
    shape, block = (12, 20), (4, 5)
    index, values, matrix = packed(shape, block, dtype=torch.float64)
    x, bias = torch.randn(*leading, 20).double(), torch.randn(12).double()
    grad_y = torch.randn(*leading, 12).double()
    ours = [tensor.clone().requires_grad_() for tensor in (x, values, bias)]
    theirs = [tensor.clone().requires_grad_() for tensor in (x, matrix, bias)]
    y = packed_block_linear(*ours, index, shape=shape)
    expected = torch.nn.functional.linear(*theirs)
    torch.testing.assert_close(y, expected)
    y.backward(grad_y)
    expected.backward(grad_y)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(ours[1].grad, pack_blocks(theirs[1].grad, index, block, len(values)))
    torch.testing.assert_close(ours[2].grad, theirs[2].grad)


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_a_gradient_may_be_asked_for_alone(wanted: str) -> None:
    index, values, matrix = packed((6, 8), (3, 4), dtype=torch.float64)
    operands = {"x": torch.randn(7, 8).double(), "values": values, "bias": torch.randn(6).double()}
    operands[wanted].requires_grad_()
    y = packed_block_linear(*operands.values(), index, shape=(6, 8))
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    dense = grad_y.t() @ operands["x"].detach()
    expected = {"x": grad_y @ matrix, "values": pack_blocks(dense, index, (3, 4), len(values)), "bias": grad_y.sum(0)}
    torch.testing.assert_close(operands[wanted].grad, expected[wanted])


def test_values_of_another_dtype_are_rounded_to_that_of_x() -> None:
    index, values, matrix = packed((16, 32), (8, 16))
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    values.requires_grad_()
    y = packed_block_linear(x, values, None, index, shape=(16, 32))
    assert y.dtype == torch.bfloat16 and torch.equal(y, x @ matrix.bfloat16().t())
    y.sum().backward()
    assert values.grad is not None and values.grad.dtype == torch.float32


def test_the_operator_fulfils_the_contract_of_torch() -> None:
    index, values, _ = packed((8, 12), (4, 4), dtype=torch.float64)
    x, bias = torch.randn(2, 3, 12).double().requires_grad_(), torch.randn(8).double().requires_grad_()
    torch.library.opcheck(
        torch.ops.tritonsparse.packed_block_linear.default,
        (x, values.requires_grad_(), bias, index, 8, 12, "torch"),
    )
    compiled = torch.compile(packed_block_linear, backend="aot_eager", fullgraph=True)
    y = compiled(x, values, bias, index, shape=(8, 12))
    expected = packed_block_linear(x, values, bias, index, shape=(8, 12))
    torch.testing.assert_close(y, expected)


def test_few_rows_are_shared_out_until_the_device_is_full() -> None:
    limits = Limits(232_448, 132)
    # 4096 rows in tiles of 32 are 128 items: five programs a multiprocessor take 8 shares, of 16 blocks each.
    tiles = few_rows_tiles((4096, 4096), (32, 32), limits)
    assert (tiles.m, tiles.n, tiles.k, tiles.splits) == (16, 32, 32, 8)
    # A long weight needs no shares, a small one may not have them: of its 4 blocks a row one in four is kept.
    assert few_rows_tiles((65_536, 4096), (32, 32), limits).splits == 1
    assert few_rows_tiles((128, 128), (32, 32), limits).splits == 1
    assert few_rows_tiles((96, 96), (48, 48), limits).n == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "cuda"}, 'expected backend "torch" or "triton"'),
        ({"x": torch.ones(2, 7)}, r"expected x to be floating-point \[..., 8\].*check the layer's input"),
        ({"bias": torch.ones(5)}, r"expected bias to be torch.float32 \[6\].*cast the bias with x"),
        ({"values": torch.ones(0, 3, 4)}, "one at least.*pack_blocks makes them"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, "expected index to be contiguous int32"),
        ({"backend": "triton"}, 'multiples of 16 for backend="triton", got 3x4; pass backend="torch"'),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_refused_with_the_remedy(change: dict[str, Any], words: str) -> None:
    index, values, _ = packed((6, 8), (3, 4))
    operands: dict[str, Any] = {"x": torch.ones(2, 8), "values": values, "bias": None, "index": index} | change
    with pytest.raises(ValueError, match=words):
        packed_block_linear(**operands, shape=(6, 8))


def test_a_block_that_does_not_divide_the_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"divides into blocks of 3x4.*pad it with zeros"):
        pack_blocks(torch.ones(7, 8), build_index_reference(torch.ones(3, 2, dtype=torch.bool)), (3, 4), 6)
