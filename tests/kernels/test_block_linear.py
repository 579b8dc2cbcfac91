"""Linear layers of kept blocks as ops, of the dense weight and of packed blocks: gradients, and what torch asks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases.block import BF16, BOUND, CASES, DUE, F32, LEAVES, NAN, ODD, Case, compare, on_elements, op, operands
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels.block import linear as module
from tritonsparse.kernels.block.linear import block_linear
from tritonsparse.kernels.block.packed import few_rows_tiles, pack_blocks, packed_block_linear, unpack_blocks
from tritonsparse.kernels.block.storage import dense_weight
from tritonsparse.kernels.block.topology import Topology, build_index_reference
from tritonsparse.kernels.weight.view import View

SIZED = [case for case in (*ODD, *CASES) if case.n * case.k]
ODD_DUE = [(case, due) for case in ODD for due in (DUE[:1] if case.form == "packed" else DUE)]
SHAPE = Case(3, 4, 9, (2, 3))
MASK = on_elements(torch.tensor([[True, False, True], [False, False, False]]), SHAPE)
OTHER = on_elements(torch.tensor([[True, True, True], [False, True, False]]), SHAPE)
TOPOLOGY, VIEW = Topology.of(MASK, None, (2, 3)), View("mask", mask=MASK)


@pytest.mark.parametrize("case", SIZED, ids=str)
def test_values_and_gradients_are_those_of_the_masked_weight(case: Case) -> None:
    for due in ("kept",) if case.form == "packed" else DUE:
        # The dense product for dW is of the dtype of x.
        least = BOUND[case.x] if due == "everywhere" else 0.0
        compare(*op(operands(case), due, "torch"), lambda _, value, least=least: max(BOUND[value.dtype], least))


@pytest.mark.parametrize(("case", "due"), ODD_DUE, ids=str)
def test_a_gradient_may_be_asked_for_alone(case: Case, due: str) -> None:
    together, _ = op(operands(case), due, "torch")
    for leaf in LEAVES:
        alone, _ = op(operands(case), due, "torch", [leaf])
        assert torch.equal(alone[f"grad_{leaf}"], together[f"grad_{leaf}"]) and len(alone) == 2


@pytest.mark.parametrize("due", DUE)
def test_eager_code_and_the_registered_op_agree_bit_for_bit(due: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, _ = op(operands(ODD[0]), due, "torch")
    calls: list[bool] = []
    monkeypatch.setattr(module, "is_eager", lambda *_: calls.append(True))
    registered, _ = op(operands(ODD[0]), due, "torch")
    assert len(calls) == 2 and all(torch.equal(eager[name], value) for name, value in registered.items())


@pytest.mark.parametrize("due", DUE)
def test_block_linear_is_an_op_as_torch_wants_one(due: str) -> None:
    topology = Topology.of(MASK, OTHER, (2, 3))
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 9), (4, 9), (4,)))
    of_b = (topology.grad_index, topology.flags) if due == "B" else (None, None)
    torch.library.opcheck(
        torch.ops.tritonsparse.block_linear.default,
        (x, weight, bias, None, topology.index, *of_b, MASK if due == "everywhere" else None, torch.tensor(0.25)),
        {"block": [2, 3], "transposed": False, "backend": "torch", "dtype": F32},
    )


def test_packed_block_linear_is_an_op_as_torch_wants_one() -> None:
    values, x, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 2, 3), (2, 3, 9), (4,)))
    given: tuple[Any, ...] = (x, values, bias, TOPOLOGY.index)
    torch.library.opcheck(torch.ops.tritonsparse.packed_block_linear.default, (*given, 4, 9, "torch"))
    compiled = torch.compile(packed_block_linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given, shape=(4, 9)), packed_block_linear(*given, shape=(4, 9)))


def test_a_topology_that_moves_recompiles_nothing() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    mask, weight, x = MASK.clone(), torch.randn(4, 9), torch.randn(3, 9)
    topology, view = Topology.of(mask, None, (2, 3)), View("mask", mask=mask)
    compiled = torch.compile(lambda x: block_linear(x, weight, topology, view), backend=counter, fullgraph=True)
    for _ in range(3):
        topology.index.copy_(build_index_reference(topology.flags))
        torch.testing.assert_close(compiled(x), x @ torch.where(mask, weight, 0.0).t())
        mask.logical_not_()
        assert topology.rewrite(mask, None)
    assert counter.frame_count == 1


def test_w_hat_is_multiplied_by_in_place_of_the_weight() -> None:
    w_hat = torch.where(MASK, torch.randn(4, 9), NAN).bfloat16()
    x, weight = torch.randn(3, 9, dtype=BF16, requires_grad=True), torch.full((4, 9), NAN, requires_grad=True)
    y = block_linear(x, weight, TOPOLOGY, VIEW, w_hat=w_hat, dtype=BF16)
    y.sum().backward()
    dense = torch.where(MASK, w_hat, 0.0)
    torch.testing.assert_close(y, x @ dense.t())
    torch.testing.assert_close(x.grad, torch.ones(3, 4, dtype=BF16) @ dense)
    assert weight.grad is not None and weight.grad.dtype == F32


def test_blocks_are_packed_row_by_row_and_unpacked_where_they_were() -> None:
    matrix = torch.arange(1, 17).reshape(2, 8)
    # Blocks of 1 x 4: [1..4] [5..8] / [9..12] [13..16]; kept: the second of row 0, both of row 1; room for two more.
    index = build_index_reference(torch.tensor([[False, True], [True, True]]))
    for given in (matrix, matrix.t().contiguous().t()):
        values = pack_blocks(given, index, (1, 4), 5)
        blocks = [[[5, 6, 7, 8]], [[9, 10, 11, 12]], [[13, 14, 15, 16]], [[0] * 4], [[0] * 4]]
        assert values.tolist() == blocks and values.is_contiguous()
        values[3:] = -1
        assert unpack_blocks(values, index, (2, 8)).tolist() == [[0, 0, 0, 0, 5, 6, 7, 8], list(range(9, 17))]


@pytest.mark.parametrize("case", [case for case in SIZED if case.form == "packed"], ids=str)
def test_unpacked_is_the_reference_weight_also_where_edge_blocks_are_cut(case: Case) -> None:
    o = operands(case)
    unpacked = unpack_blocks(o.weight, o.layout.index, o.layout.shape)
    assert torch.equal(unpacked, dense_weight(o.weight, o.layout))
    if case.divides:
        assert torch.equal(pack_blocks(unpacked, o.layout.index, case.block, 1), o.weight[:1].nan_to_num())


# Outputs and inputs, a block's side, the tile's n, parts: shared out until each of 132 multiprocessors has four items.
# A long weight needs no parts; a small one may not have them, since of its 4 blocks a row one in four is kept.
@pytest.mark.parametrize(
    ("n", "k", "side", "tile", "splits"),
    [(4096, 4096, 32, 32, 8), (65_536, 4096, 32, 32, 1), (128, 128, 32, 32, 1), (96, 96, 48, 16, 1)],
)
def test_few_rows_are_shared_out_until_the_device_is_full(n: int, k: int, side: int, tile: int, splits: int) -> None:
    tiles = few_rows_tiles((n, k), (side, side), Limits(232_448, 132))
    assert (tiles.m, tiles.n, tiles.k, tiles.splits) == (16, tile, tile, splits)


def linear(**changed: Any) -> Tensor:
    given = {"x": torch.zeros(3, 9), "weight": torch.zeros(4, 9), "topology": TOPOLOGY, "view": VIEW, **changed}
    return block_linear(**given)


def packed(**changed: Any) -> Tensor:
    given = {"x": torch.zeros(3, 9), "values": torch.zeros(2, 2, 3), "bias": None, "index": TOPOLOGY.index, **changed}
    return packed_block_linear(**given, shape=(4, 9))


@pytest.mark.parametrize(("call", "words"), [
    (lambda: linear(x=torch.zeros(3, 8)), r"block_linear: expected x of shape \[..., 9\].*layer's input"),
    (lambda: linear(x=torch.zeros(3, 9).half()), "expected x in torch.float32.*cast x"),
    (lambda: linear(view=View("hard", torch.zeros(1))), 'expected a view of kind "mask", got "hard"; call'),
    (lambda: linear(view=View("mask", mask=MASK[:, 1:])), "block_linear: expected mask to be bool"),
    (lambda: linear(view=VIEW._replace(grad_mask=OTHER)), "got grad_mask alone; make the topology"),
    (lambda: linear(topology=Topology.of(MASK, OTHER, (2, 3))), "got grad_index alone; make the topology"),
    (lambda: linear(topology=replace(TOPOLOGY, index=TOPOLOGY.flags)), "expected index to be contiguous int32"),
    (lambda: linear(w_hat=torch.zeros(4, 9).half()), "expected w_hat to be torch.float32.*leave it out"),
    (lambda: linear(bias=torch.zeros(3)), r"expected bias to be torch.float32 \[4\]"),
    (lambda: packed(backend="cuda"), 'packed_block_linear: expected backend "torch" or "triton"'),
    (lambda: packed(x=torch.ones(2, 7)), r"expected x to be floating-point \[..., 9\].*check the layer's input"),
    (lambda: packed(bias=torch.ones(5)), r"expected bias to be torch.float32 \[4\].*cast the bias with x"),
    (lambda: packed(values=torch.ones(0, 2, 3)), "one at least.*pack_blocks makes them"),
    (lambda: packed(index=torch.zeros(3, dtype=torch.int32)), "expected index to be contiguous int32"),
    (lambda: packed(backend="triton"), 'multiples of 16 for backend="triton", got 2 x 3; pass backend="torch"'),
    (lambda: pack_blocks(torch.ones(7, 8), TOPOLOGY.index, (3, 4), 6), "divides into blocks of 3x4.*pad it"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_remedy(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
