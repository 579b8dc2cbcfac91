"""Block topologies and products on a GPU: bfloat16, ragged blocks, tf32, graphs, and offsets beyond 2^31.

A bound is 1.1 times the error that the reference makes on the same data in the dtypes of the case, at least that of
`tolerances.py`: relative RMS against the reference in float64. What is pruned holds NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import product_bound
from torch import Tensor

from tritonsparse.kernels._tiles import limits_of
from tritonsparse.kernels.block._gemm_tiles import BlockTiles, block_tiles
from tritonsparse.kernels.block.gemm import block_grad_input, block_linear
from tritonsparse.kernels.block.topology import IndexTable, build_index_reference, build_indices, index_size

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (weight, product)
DTYPES = [(BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP32)]
# (rows, N, K, r, c): decoding, odd sizes, ragged edges, oblong blocks, wide tiles, a split reduction.
SHAPES = [
    (1, 256, 512, 64, 64),
    (7, 100, 130, 16, 32),
    (33, 96, 144, 48, 48),
    (513, 1000, 520, 64, 32),
    (1024, 1024, 2048, 128, 128),
    (2048, 4096, 1024, 64, 64),
    (300, 512, 768, 256, 32),
    (128, 256, 16384, 128, 128),
]
LAYOUTS = ["stored", "transposed", "packed"]


def operands(
    m: int, n: int, k: int, r: int, c: int, layout: str, weight: torch.dtype, x: torch.dtype, kept: float = 0.3
) -> dict[str, Any]:
    """Random operands of one case; a block row and a column keep everything, one of each nothing."""
    random = torch.Generator(DEVICE).manual_seed(0)
    flags = torch.rand(-(-n // r), -(-k // c), generator=random, device=DEVICE) < kept
    flags[:1], flags[:, :1] = True, True
    flags[1:2], flags[:, 2:3] = False, False
    dense = torch.randn(n, k, generator=random, device=DEVICE).to(weight)
    given: dict[str, Any] = {"index": build_index_reference(flags), "block": (r, c)}
    if layout == "packed":
        blocks = F.pad(dense, (0, -k % c, 0, -n % r), value=float("nan")).view(flags.shape[0], r, -1, c)
        given |= {"weight": blocks.transpose(1, 2)[flags].contiguous(), "packed": True, "shape": (n, k)}
    else:
        mask = flags.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
        stored = dense.masked_fill(~mask, float("nan"))
        given["weight"] = stored.t().contiguous() if layout == "transposed" else stored
        given["transposed"] = layout == "transposed"
    return given | {
        "x": torch.randn(m, k, generator=random, device=DEVICE).to(x),
        "grad_y": torch.randn(m, n, generator=random, device=DEVICE).to(x),
        "bias": torch.randn(n, generator=random, device=DEVICE).to(x),
    }


def products(case: dict[str, Any], backend: str, tiles: BlockTiles | None = None) -> dict[str, Tensor]:
    given = {name: value for name, value in case.items() if name not in ("x", "grad_y", "bias")}
    y = block_linear(case["x"], bias=case["bias"], **given, activation="gelu", backend=backend, tiles=tiles)
    return {"y": y, "grad_x": block_grad_input(case["grad_y"], **given, backend=backend, tiles=tiles)}


def exact(case: dict[str, Any]) -> dict[str, Any]:
    """In float64: the weight as it is rounded to the dtype of the product, everything else as it is."""
    doubled = {name: case[name].double() for name in ("x", "grad_y", "bias")}
    return case | doubled | {"weight": case["weight"].to(case["x"].dtype).double()}


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def bound(case: dict[str, Any], name: str, reference: Tensor, expected: Tensor, precision: str = "") -> float:
    length = case["x" if name == "y" else "grad_y"].shape[1]
    least = product_bound(case["x"].dtype, reference.dtype, length, precision)
    return max(1.1 * error(reference, expected), least)


@pytest.fixture(params=["full float32", "tf32"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_product_is_as_exact_as_the_dense_one(
    shape: tuple[int, int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype], layout: str, precision: str
) -> None:
    if precision == "tf32" and dtypes[1] != FP32:
        pytest.skip("16 bits are exact either way")
    case = operands(*shape, layout, *dtypes)
    expected = products(exact(case), "torch")
    reference, actual, again = products(case, "torch"), products(case, "triton"), products(case, "triton")
    for name, value in actual.items():
        assert error(value, expected[name]) <= bound(case, name, reference[name], expected[name], precision), name
        assert torch.equal(value, again[name]), f"{name}: another result the second time"


@pytest.mark.parametrize("persistent", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_descriptors_and_pointers_give_the_same_bits_however_the_items_are_shared_out(
    layout: str, persistent: int
) -> None:
    case = operands(1030, 1024, 2048, 64, 64, layout, BF16, BF16)
    tiles = block_tiles(
        1030, 1024, 2048, block=(64, 64), weight_bytes=2, x_bytes=2, precision="ieee", aligned=True,
        limits=limits_of(case["x"].device),
    )  # fmt: skip
    # In parts, what is summed first depends on the number of programs.
    tiles = replace(tiles, splits=1)
    if not tiles.descriptors:
        pytest.skip("this GPU has no copy engine")
    by_descriptors = products(case, "triton", tiles)
    by_pointers = products(case, "triton", replace(tiles, descriptors=False, persistent=persistent))
    assert all(torch.equal(by_pointers[name], value) for name, value in by_descriptors.items())


@pytest.mark.parametrize("splits", [2, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_heavy_line_cut_into_parts_is_as_exact_and_repeats(layout: str, splits: int) -> None:
    case = operands(128, 1024, 4096, 64, 64, layout, BF16, BF16, kept=0.02)
    expected, reference = products(exact(case), "torch"), products(case, "torch")
    for descriptors in (False, True):
        if descriptors and torch.cuda.get_device_capability() < (9, 0):
            continue
        tiles = BlockTiles(64, 64, 64, splits=splits, num_warps=4, descriptors=descriptors)
        actual, again = products(case, "triton", tiles), products(case, "triton", tiles)
        for name, value in actual.items():
            assert error(value, expected[name]) <= bound(case, name, reference[name], expected[name]), name
            assert torch.equal(value, again[name]), f"{name}: another result the second time"


def test_products_replay_in_a_graph_and_follow_an_index_that_is_rebuilt_in_it() -> None:
    case = operands(64, 512, 1024, 64, 64, "stored", BF16, BF16)
    case["weight"] = torch.randn(512, 1024, device=DEVICE).to(BF16)
    flags = torch.rand(8, 16, device=DEVICE) < 0.5
    table = IndexTable([flags], [case["index"]], "triton")
    table.build()
    products(case, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table.build()
        captured = products(case, "triton")
    for _ in range(2):
        flags.logical_not_()
        graph.replay()
        assert torch.equal(case["index"], build_index_reference(flags))
        expected = products(case, "triton")
        assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_the_indices_of_many_layers_are_the_reference_s_and_nothing_waits() -> None:
    random = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(1, 1), (32, 33), (448, 112), (1, 700), (2001, 64), (64, 64)]
    flags = [torch.rand(shape, generator=random, device=DEVICE) < 0.3 for shape in shapes]
    indices = [torch.empty(index_size(*shape), dtype=torch.int32, device=DEVICE) for shape in shapes]
    build_indices(flags, indices, "triton")
    for one in flags:
        one.logical_not_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        build_indices(flags, indices, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(i, build_index_reference(f)) for f, i in zip(flags, indices, strict=True))


def test_offsets_beyond_two_to_the_31_reach_their_element() -> None:
    n, k = 70_016, 32_768
    assert n * k > 2**31
    weight = torch.full((n, k), float("nan"), device=DEVICE, dtype=BF16)
    flags = torch.zeros(n // 64, k // 64, dtype=torch.bool, device=DEVICE)
    flags[-1, -1] = True
    weight[-64:, -64:] = torch.eye(64, device=DEVICE)
    index = build_index_reference(flags)
    x = torch.zeros(2, k, device=DEVICE, dtype=BF16)
    x[:, -64:] = torch.arange(128.0, device=DEVICE).view(2, 64)
    for descriptors in (False, True):
        if descriptors and torch.cuda.get_device_capability() < (9, 0):
            continue
        tiles = BlockTiles(16, 64, 64, num_warps=4, descriptors=descriptors)
        y = block_linear(x, weight, None, index, block=(64, 64), backend="triton", tiles=tiles)
        assert torch.equal(y[:, -64:], x[:, -64:]) and not y[:, :-64].any()
        assert torch.equal(block_grad_input(y, weight, index, block=(64, 64), backend="triton", tiles=tiles), x)
