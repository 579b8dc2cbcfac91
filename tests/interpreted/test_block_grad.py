"""The gradient of kept blocks against its reference, through the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonsparse.kernels.block._grad_tiles import BlockGradTiles
from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.topology import build_index_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Close = Callable[[str, Tensor, Tensor, float], None]

# By the dtype of dW, against the reference in float64 on the same operands: sums in float32, then one rounding.
BOUND = {torch.float32: 2e-6, torch.float16: 4e-4}
# A block a tile, parts of a block, several blocks, a tile larger than all, and each with a split reduction.
TILES = [
    BlockGradTiles(16, 32, 32, 1, 2),
    BlockGradTiles(16, 32, 64, 2),
    BlockGradTiles(32, 64, 128, 1, 4),
    BlockGradTiles(16, 64, 16, 4, 2),
    None,
]
sizes = st.sampled_from([1, 31, 48, 64, 70])
sides = st.sampled_from([16, 32, 48, 64])


def exact(operands: dict[str, Any]) -> dict[str, Any]:
    floats = {name: t.double() for name, t in operands.items() if torch.is_tensor(t) and t.is_floating_point()}
    return operands | floats | {"out_dtype": torch.float64, "backend": "torch", "tiles": None}


def compare(operands: dict[str, Any], assert_close: Close) -> None:
    actual, inner = block_grad_weight(**operands, backend="triton")
    expected, expected_inner = block_grad_weight(**exact(operands))
    assert actual.dtype == operands["out_dtype"] and actual.is_contiguous()
    assert_close("grad_weight", actual, expected.to(actual.dtype), BOUND[actual.dtype])
    assert torch.equal(actual == 0, expected == 0)
    if expected_inner is None:
        assert inner is None
    else:
        # Sums that cancel: measured against their terms.
        assert inner is not None and inner.dtype == torch.float32 and inner.shape == expected_inner.shape
        assert torch.equal(inner == 0, expected_inner == 0)
        scale = operands["grad_y"].shape[0] ** 0.5 * operands["block"][0]
        assert (inner - expected_inner).abs().amax() <= 1e-5 * scale


def case(
    m: int, shape: tuple[int, int], block: tuple[int, int], form: str, dtype: torch.dtype, density: float, seed: int
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    (n, k), grid = shape, (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    listed = torch.rand(grid, generator=random) < density
    capacity = int(listed.sum()) + 1 if form == "packed" else None
    stored = {"dense": (n, k), "transposed": (k, n), "packed": (capacity, *block)}[form]
    return {
        "grad_y": torch.randn(m, n, generator=random).to(dtype),
        "x": torch.randn(m, k, generator=random).to(dtype),
        "index": build_index_reference(listed),
        "block": block,
        "shape": shape,
        "kept": listed & (torch.rand(grid, generator=random) < 0.5),
        "alpha": torch.tensor(0.25),
        "transposed": form == "transposed",
        "packed": form == "packed",
        "capacity": capacity,
        "out_dtype": dtype,
        "weight": torch.randn(stored, generator=random),
    }


@settings(max_examples=40)
@given(
    m=st.sampled_from([1, 16, 37]),
    shape=st.tuples(sizes, sizes),
    block=st.tuples(sides, sides),
    form=st.sampled_from(["dense", "transposed", "packed"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    density=st.sampled_from([0.3, 0.7, 1.0]),
    optional=st.sampled_from(["all", "no weight", "all kept", "no alpha"]),
    tiles=st.sampled_from(TILES),
    seed=st.integers(0, 5),
)
def test_the_gradient_equals_the_reference_on_every_shape(
    m: int,
    shape: tuple[int, int],
    block: tuple[int, int],
    form: str,
    dtype: torch.dtype,
    density: float,
    optional: str,
    tiles: BlockGradTiles | None,
    seed: int,
    assert_close: Close,
) -> None:
    operands = case(m, shape, block, form, dtype, density, seed) | {"tiles": tiles}
    left_out = {"all": [], "no weight": ["weight"], "all kept": ["kept", "alpha"], "no alpha": ["alpha"]}[optional]
    compare({name: value for name, value in operands.items() if name not in left_out}, assert_close)


@pytest.mark.parametrize("form", ["dense", "transposed", "packed"])
def test_operands_of_any_strides_and_blocks_of_every_orientation_agree(form: str, assert_close: Close) -> None:
    for block in ((16, 48), (48, 16)):
        operands = case(20, (64, 96), block, form, torch.float32, 0.5, 0) | {"tiles": TILES[0]}
        operands |= {"grad_y": operands["grad_y"].t().contiguous().t()}
        wide = torch.zeros(21, 192)
        wide[1:, ::2] = operands["x"]
        operands |= {"x": wide[1:, ::2], "kept": operands["kept"].t().contiguous().t()}
        if form != "packed":
            operands |= {"weight": operands["weight"].t().contiguous().t()}
        compare(operands, assert_close)


def test_a_block_row_of_many_blocks_is_found_in_parts_of_its_list(assert_close: Close) -> None:
    # 70 blocks of 16 a row, more than are compared at a time; an empty row, and a full one.
    operands = case(16, (48, 1120), (16, 16), "dense", torch.float32, 0.9, 0)
    listed = torch.rand(3, 70, generator=torch.Generator().manual_seed(1)) < 0.95
    listed[0], listed[1] = False, True
    operands |= {"index": build_index_reference(listed), "kept": listed, "tiles": BlockGradTiles(16, 16, 256)}
    compare(operands, assert_close)


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_nothing_listed_and_no_rows_give_zeros(form: str) -> None:
    for m, density in ((16, 0.0), (0, 1.0)):
        grad, inner = block_grad_weight(
            **case(m, (48, 64), (16, 32), form, torch.float32, density, 0), backend="triton"
        )
        assert inner is not None and not grad.any() and not inner.any()
    empty, _ = block_grad_weight(**case(4, (0, 64), (16, 32), form, torch.float32, 1.0, 0), backend="triton")
    assert empty.numel() == (512 if form == "packed" else 0) and not empty.any()


def test_a_packed_gradient_leaves_out_what_its_capacity_has_no_room_for() -> None:
    operands = case(16, (64, 64), (16, 32), "packed", torch.float32, 1.0, 0)
    operands |= {"weight": None, "kept": None, "tiles": TILES[0]}
    whole, _ = block_grad_weight(**operands, backend="triton")
    for short in (0, 3):
        part, _ = block_grad_weight(**operands | {"capacity": short}, backend="triton")
        assert part.shape == (short, 16, 32) and torch.equal(part, whole[:short])


def test_a_nan_of_the_product_stays_where_its_multiplier_is_zero() -> None:
    operands = case(16, (32, 64), (16, 16), "dense", torch.float32, 1.0, 0) | {"alpha": torch.tensor(0.0)}
    kept = torch.tensor([[True, False, True, False]] * 2)
    operands["x"][3, 16:32] = float("nan")
    for alpha in (None, torch.tensor(0.0)):
        grad, _ = block_grad_weight(**operands | {"kept": kept, "alpha": alpha}, backend="triton")
        assert grad.isfinite().all() and not grad[:, 16:32].any() and grad[:, :16].all()


def test_repeated_calls_agree_bit_for_bit() -> None:
    operands = case(64, (48, 96), (16, 48), "dense", torch.float32, 0.6, 0) | {"tiles": TILES[3]}
    first, second = (block_grad_weight(**operands, backend="triton") for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[1] is not None and second[1] is not None
    assert torch.equal(first[1], second[1])
