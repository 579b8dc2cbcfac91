"""Topologies and products over kept blocks on a GPU: bfloat16, large shapes, tf32, graphs, offsets beyond 2^31.

A bound is 1.1 times the error that the reference makes on the same data in the dtypes of the case, at least that of
`tolerances.py`: relative RMS against float64. What is pruned holds NaN.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases.block import (
    CASES,
    DUE,
    FORMS,
    LARGE,
    Case,
    Results,
    answer,
    check_indices,
    compare,
    no_synchronization,
    op,
    operands,
    products,
)
from graphs import captured
from tolerances import product_bound
from torch import Tensor

from tritonsparse.kernels._tiles import limits_of
from tritonsparse.kernels.block._gemm_tiles import BlockTiles, block_tiles
from tritonsparse.kernels.block.gemm import BlockLayout, block_forward, block_grad_input
from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.storage import unpack_blocks
from tritonsparse.kernels.block.topology import IndexTable, build_index_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda"
BF16, F32, NAN = torch.bfloat16, torch.float32, float("nan")


def bound_of(case: Case, reference: Results, exact: Results, precision: str = "") -> Callable[[str, Tensor], float]:
    lengths = {"y": case.k, "grad_x": case.n, "grad_weight": case.m, "grad_bias": case.m}

    def bound(name: str, value: Tensor) -> float:
        error = (reference[name] - exact[name]).norm() / exact[name].norm().clamp(min=1e-30)
        return max(1.1 * error.item(), product_bound(case.x, value.dtype, lengths[name], precision))

    return bound


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_every_product_is_as_exact_as_the_dense_one(case: Case, precision: str) -> None:
    if precision == "tf32" and case.x != F32:
        pytest.skip("16 bits are exact either way")
    o = operands(case, DEVICE)
    exact, reference, actual, again = answer(o), *(products(o, each) for each in ("torch", "triton", "triton"))
    compare(actual, exact, bound_of(case, reference, exact, precision))
    assert all(torch.equal(value, again[name]) for name, value in actual.items()), "another result the second time"


@pytest.mark.parametrize("case", [c for c in LARGE if c.form == "packed" or (c.x == BF16 and c.m > 500)], ids=str)
def test_the_ops_and_their_gradients_are_as_exact_as_the_dense_layer(case: Case) -> None:
    for due in ("kept",) if case.form == "packed" else DUE:
        o = operands(case, DEVICE)
        (found, exact), (reference, _) = op(o, due, "triton"), op(o, due, "torch")
        compare(found, exact, bound_of(case, reference, exact))


@pytest.mark.parametrize("persistent", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_descriptors_and_pointers_give_the_same_bits_however_items_are_shared_out(form: str, persistent: int) -> None:
    o = operands(Case(1030, 1024, 2048, (64, 64), form, BF16, BF16), DEVICE)
    tiles = block_tiles(
        (1030, 1024, 2048), block=(64, 64), weight_bytes=2, x_bytes=2, precision="ieee", aligned=True,
        limits=limits_of(o.x.device),
    )  # fmt: skip
    # In parts, what is summed first depends on the number of programs.
    tiles = replace(tiles, splits=1)
    if not tiles.descriptors:
        pytest.skip("this GPU has no copy engine")
    by_descriptors = products(o, "triton", (tiles, tiles, None))
    tiles = replace(tiles, descriptors=False, persistent=persistent)
    by_pointers = products(o, "triton", (tiles, tiles, None))
    assert all(torch.equal(by_pointers[name], value) for name, value in by_descriptors.items())


def test_products_wait_for_nothing_and_follow_an_index_that_is_rebuilt_in_their_graph() -> None:
    o = operands(Case(2048, 1024, 2048, (64, 64), weight=BF16, x=BF16), DEVICE)
    packed = operands(Case(256, 1024, 2048, (64, 64), "packed", BF16, BF16), DEVICE)
    o.weight.normal_()
    table = IndexTable([o.kept, o.kept], [o.layout.index, o.grad_layout.index], "triton")

    def run() -> Results:
        table.build()
        unpack_blocks(packed.weight, packed.layout.index, packed.layout.shape)
        return products(o, "triton") | {f"{name}, packed": each for name, each in products(packed, "triton").items()}

    run()
    with no_synchronization():
        run()
    graph, found = captured(run)
    for _ in range(2):
        o.kept.logical_not_()
        for value in found.values():
            value.fill_(NAN)
        graph.replay()
        assert torch.equal(o.layout.index, build_index_reference(o.kept))
        assert all(torch.equal(found[name], value) for name, value in run().items())


def test_the_indices_of_many_layers_are_the_reference_s_and_nothing_waits() -> None:
    check_indices([(1, 1), (32, 33), (448, 112), (1, 700), (2001, 64), (64, 64)], "triton", DEVICE)


def test_offsets_beyond_two_to_the_31_reach_their_element() -> None:
    n, k = 70_016, 32_768
    assert n * k > 2**31
    flags = torch.zeros(n // 64, k // 64, dtype=torch.bool, device=DEVICE)
    flags[-1, -1] = True
    layout = BlockLayout(build_index_reference(flags), (64, 64), (n, k))
    weight = torch.full((n, k), NAN, device=DEVICE, dtype=BF16)
    weight[-64:, -64:] = torch.eye(64, device=DEVICE)
    x = torch.zeros(2, k, device=DEVICE, dtype=BF16)
    x[:, -64:] = torch.arange(128.0, device=DEVICE).view(2, 64)
    for descriptors in (False, True) if torch.cuda.get_device_capability() >= (9, 0) else (False,):
        tiles = BlockTiles(16, 64, 64, num_warps=4, descriptors=descriptors)
        y = block_forward(x, weight, layout, backend="triton", tiles=tiles)
        assert torch.equal(y[:, -64:], x[:, -64:]) and not y[:, :-64].any()
        assert torch.equal(block_grad_input(y, weight, layout, backend="triton", tiles=tiles), x)
    del weight
    x, grad_y = (torch.zeros(16, size, device=DEVICE, dtype=BF16) for size in (k, n))
    x[0, -1], grad_y[0, -1], grad_y[0, 0] = 3.0, 5.0, 7.0
    grad = block_grad_weight(grad_y, x, layout, out_dtype=BF16, backend="triton")
    assert grad[-1, -1] == 15.0 and grad.count_nonzero() == 1
