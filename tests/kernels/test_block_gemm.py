"""The definition of the block-sparse products, their configurations and what they refuse, without Triton."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels.block._gemm_tiles import block_tiles, tile_side
from tritonsparse.kernels.block._weight import dense_weight
from tritonsparse.kernels.block.gemm import block_grad_input, block_linear
from tritonsparse.kernels.block.topology import build_index_reference, index_size

F64 = torch.float64
NAN = float("nan")


def test_the_products_of_three_blocks_by_hand() -> None:
    # W = [[1 2 | . .]   blocks of [1, 2]; what a pruned one holds is NaN.
    #      [. . | 3 4]
    #      [. . | . .]]
    weight = torch.tensor([[1.0, 2.0, NAN, NAN], [NAN, NAN, 3.0, 4.0], [NAN] * 4])
    index = build_index_reference(torch.tensor([[1, 0], [0, 1], [0, 0]]).bool())
    x, bias = torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), torch.tensor([0.5, 0.5, -0.5])
    assert block_linear(x, weight, bias, index, block=(1, 2)).tolist() == [[21.5, 4300.5, -0.5]]
    assert block_linear(x, weight, bias, index, block=(1, 2), activation="relu").tolist() == [[21.5, 4300.5, 0.0]]
    # dX = dY W: [1 10 100] W.
    assert block_grad_input(torch.tensor([[1.0, 10.0, 100.0]]), weight, index, block=(1, 2)).tolist() == [
        [1.0, 2.0, 30.0, 40.0]
    ]


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 12),
    r=st.integers(1, 5),
    c=st.integers(1, 5),
    layout=st.sampled_from(["stored", "transposed", "packed"]),
    seed=st.integers(0, 99),
)
def test_the_products_are_those_of_the_masked_dense_weight(
    n: int, k: int, r: int, c: int, layout: str, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    flags = torch.rand(-(-n // r), -(-k // c), generator=random) < 0.5
    mask = torch.zeros(n, k, dtype=torch.bool)
    for i, j in flags.nonzero().tolist():
        mask[i * r : (i + 1) * r, j * c : (j + 1) * c] = True
    dense = torch.where(mask, torch.randn(n, k, generator=random, dtype=F64), 0.0)
    given: dict[str, Any] = {"block": (r, c)}
    weight = dense.masked_fill(~mask, NAN)
    if layout == "transposed":
        weight, given["transposed"] = weight.t().contiguous(), True
    elif layout == "packed":
        whole = F.pad(dense, (0, -k % c, 0, -n % r)).view(flags.shape[0], r, -1, c).transpose(1, 2)
        # Two places more than blocks: what they hold is nobody's.
        weight = torch.cat([whole[flags], torch.full((2, r, c), NAN, dtype=F64)])
        given |= {"packed": True, "shape": (n, k)}
    index = build_index_reference(flags)
    assert torch.equal(dense_weight(weight, index, **given), dense)
    x, grad_y, bias = (torch.randn(shape, generator=random, dtype=F64) for shape in ((3, k), (3, n), (n,)))
    torch.testing.assert_close(block_linear(x, weight, bias, index, **given), x @ dense.t() + bias)
    torch.testing.assert_close(block_grad_input(grad_y, weight, index, **given), grad_y @ dense)


def test_the_result_takes_the_dtype_asked_for_and_autocast_changes_nothing() -> None:
    weight, x, index = torch.randn(4, 4), torch.randn(2, 4), build_index_reference(torch.ones(2, 2).bool())
    y = block_linear(x, weight, None, index, block=(2, 2))
    assert block_linear(x, weight, None, index, block=(2, 2), out_dtype=F64).dtype == F64
    assert block_grad_input(x, weight, index, block=(2, 2), out_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert block_linear(x.bfloat16(), weight, None, index, block=(2, 2)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block_linear(x, weight, None, index, block=(2, 2)), y)


# Side, the most, the tile's side.
@pytest.mark.parametrize(("side", "most", "tile"), [(128, 128, 128), (256, 128, 128), (48, 64, 16), (96, 64, 32)])
def test_a_tile_s_side_is_the_largest_power_of_two_that_divides_the_block(side: int, most: int, tile: int) -> None:
    assert tile_side(side, most) == tile


HOPPER, AMPERE = Limits(232_448, 132), Limits(166_912, 108)
BF16: dict[str, Any] = {"weight_bytes": 2, "x_bytes": 2, "precision": "ieee", "aligned": True, "limits": HOPPER}


@settings(max_examples=60, deadline=None)
@given(
    m=st.sampled_from([1, 7, 33, 64, 1000, 16384]),
    n=st.sampled_from([16, 512, 4096, 11008]),
    k=st.sampled_from([16, 1024, 11008]),
    r=st.sampled_from([16, 32, 48, 64, 128, 256]),
    c=st.sampled_from([16, 32, 48, 64, 128, 256]),
    widths=st.sampled_from([(2, 2), (4, 2), (4, 4), (2, 4)]),
    precision=st.sampled_from(["ieee", "tf32"]),
    aligned=st.booleans(),
    limits=st.sampled_from([HOPPER, AMPERE, Limits(65_536, 304)]),
)
def test_computed_tiles_divide_the_block_and_fit_into_shared_memory(
    m: int, n: int, k: int, r: int, c: int, widths: tuple[int, int], precision: str, aligned: bool, limits: Limits
) -> None:
    tiles = block_tiles(
        m, n, k, block=(r, c), weight_bytes=widths[0], x_bytes=widths[1], precision=precision, aligned=aligned,
        limits=limits,
    )  # fmt: skip
    assert r % tiles.n == 0 and c % tiles.k == 0 and min(tiles.m, tiles.n, tiles.k) >= 16
    assert all(side & (side - 1) == 0 for side in (tiles.m, tiles.n, tiles.k, tiles.group))
    stage = (tiles.m * widths[1] + tiles.n * widths[0]) * tiles.k
    assert tiles.persistent * tiles.num_stages * stage <= limits.shared_bytes
    assert tiles.n % (16 * tiles.subtiles) == 0


def test_large_products_on_hopper_take_wide_tiles_four_buffers_and_descriptors() -> None:
    for side, shape in ((128, (256, 128, 64)), (64, (256, 64, 64)), (32, (256, 32, 32))):
        tiles = block_tiles(8192, 4096, 4096, block=(side, side), **BF16)
        assert (tiles.m, tiles.n, tiles.k) == shape and tiles.num_stages == 4 and tiles.descriptors


def test_few_rows_and_few_blocks_split_the_reduction_and_many_do_not() -> None:
    # 4 block rows and 2 tiles of x are 8 items for 132 multiprocessors.
    assert block_tiles(128, 512, 16384, block=(128, 128), **BF16).splits == 16
    # 32 tiles of 64 rows are 128 items, taken at once: the longest would outlast the others. 256 would not be.
    assert block_tiles(2048, 512, 16384, block=(128, 128), **BF16).splits == 4
    assert block_tiles(8192, 512, 16384, block=(128, 128), **BF16).splits == 1
    # One multiprocessor's worth of reduction is not cut up.
    assert block_tiles(128, 512, 256, block=(128, 128), **BF16).splits == 1


X, W, INDEX = torch.zeros(2, 32), torch.zeros(16, 32), build_index_reference(torch.ones(1, 2).bool())
VALUES = torch.zeros(2, 16, 16)


@pytest.mark.parametrize(
    ("operands", "expected", "remedy"),
    [
        ({"x": X[:, :3]}, "x to be a floating-point matrix [M, 32]", "flatten the leading axes"),
        ({"weight": W[0]}, "weight to be a matrix [N, K]", "packed=True"),
        ({"weight": W.int()}, "a floating-point weight", "cast it"),
        ({"index": INDEX[1:]}, f"int32 [{index_size(1, 2)}]", "index_size(R, C)"),
        ({"index": INDEX.to("meta")}, "index on cpu", "beside the weight"),
        ({"block": (16, 0)}, "block to be (rows, columns) of at least 1", "(64, 64)"),
        ({"block": (8, 16), "index": torch.zeros(index_size(2, 2), dtype=torch.int32), "backend": "triton"},
         "multiples of 16", 'backend="torch"'),
        ({"shape": (16, 16)}, "expected shape (16, 32)", "leave it out"),
        ({"weight": VALUES, "packed": True}, "shape=(N, K) and not transposed", "as [N, K]"),
        ({"weight": VALUES[:, 1:], "packed": True, "shape": (16, 32)}, "values [blocks, 16, 16]", "row by row"),
        ({"bias": torch.zeros(3)}, "bias to be torch.float32 [16]", "cast the bias with x"),
        ({"activation": "tanh"}, "activation to be one of", "apply it to the result"),
        ({"out_dtype": torch.int8}, "a floating-point out_dtype", "omit it"),
        ({"backend": "cuda"}, 'backend "torch" or "triton"', "pass either"),
        ({"x": X.double(), "backend": "triton"}, "x in float16, bfloat16 or float32", 'backend="torch"'),
        ({"weight": W.double(), "backend": "triton"}, "weight in float16, bfloat16 or float32", 'backend="torch"'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_remedy(operands: dict[str, Any], expected: str, remedy: str) -> None:
    given: dict[str, Any] = {"x": X, "weight": W, "bias": None, "index": INDEX, "block": (16, 16)} | operands
    with pytest.raises(ValueError) as error:
        block_linear(**given)
    message = str(error.value)
    assert message.startswith("block_linear: ") and expected in message and remedy in message


def test_a_gradient_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block_grad_input: expected grad_y .* \[M, 16\]"):
        block_grad_input(X, W, INDEX, block=(16, 16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_triton_off_the_gpu_is_an_error() -> None:
    with pytest.raises(RuntimeError, match='pass backend="torch"'):
        block_linear(X, W, None, INDEX, block=(16, 16), backend="triton")


@pytest.mark.parametrize("name", ["block.gemm", "block._weight"])
def test_the_examples_in_the_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tritonsparse.kernels.{name}"))
    assert result.attempted >= 3 and result.failed == 0
