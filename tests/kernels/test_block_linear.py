"""Linear layers of kept blocks as ops, of the dense weight and of packed blocks: gradients, and what torch asks."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels.block import linear as module
from tritonsparse.kernels.block._layout import dense_weight
from tritonsparse.kernels.block.linear import block_linear
from tritonsparse.kernels.block.packed import few_rows_tiles, pack_blocks, packed_block_linear, unpack_blocks
from tritonsparse.kernels.block.topology import Topology, build_index_reference
from tritonsparse.kernels.weight.view import View

sys.path.append(str(Path(__file__).parent))
from cases.block import BF16, CASES, DUE, F32, F64, NAN, ODD, Case, as_blocks, on_elements, op, operands

SIZED = [case for case in (*ODD, *CASES) if case.n * case.k and case.weight.itemsize >= 4 and case.x.itemsize >= 4]
WIDE = Case(3, 4, 9, (2, 3), weight=F64, x=F64)
FLAGS = torch.tensor([[True, False, True], [False, False, False]])
MASK = on_elements(FLAGS, WIDE)
OTHER = on_elements(torch.tensor([[True, True, True], [False, True, False]]), WIDE)
TOPOLOGY, VIEW = Topology.of(MASK, None, (2, 3)), View("mask", mask=MASK)


def viewed(due: str) -> tuple[Topology, View]:
    grad_mask, alpha = OTHER if due == "B" else None, None if due == "kept" else torch.tensor(0.25)
    return Topology.of(MASK, grad_mask, (2, 3)), View("mask", None, MASK, grad_mask, alpha)


@pytest.mark.parametrize("case", SIZED, ids=str)
def test_values_and_gradients_are_those_of_the_masked_weight(case: Case) -> None:
    for due in ("kept",) if case.form == "packed" else DUE:
        found, expected = op(operands(case), due, "torch")
        for name, value in found.items():
            bound = 2e-6 if value.dtype == F32 else 1e-14
            assert value.shape == expected[name].shape
            assert (value - expected[name]).norm() <= bound * expected[name].norm(), (name, due)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0, 4)], ids=str)
def test_leading_axes_of_x_are_those_of_the_result(leading: tuple[int, ...]) -> None:
    weight, x = torch.randn(4, 9, dtype=F64), torch.randn(*leading, 9, dtype=F64)
    values = pack_blocks(weight, TOPOLOGY.index, (2, 3), 2)
    expected = x @ torch.where(MASK, weight, 0.0).t()
    for product, *given in ((block_linear, weight, TOPOLOGY, VIEW), (packed_block_linear, values, None)):
        more: dict[str, Any] = {} if product is block_linear else {"index": TOPOLOGY.index, "shape": (4, 9)}
        leaf = x.clone().requires_grad_()
        y = product(leaf, *given, **more)
        y.sum().backward()
        torch.testing.assert_close(y, expected)
        assert leaf.grad is not None and leaf.grad.shape == x.shape


def test_two_blocks_by_hand() -> None:
    weight, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True), torch.tensor([[False, False, True, True]])
    x = torch.tensor([[1.0, 1.0, 10.0, 10.0]], requires_grad=True)
    y = block_linear(x, weight, Topology.of(mask, None, (1, 2)), View("mask", mask=mask), torch.tensor([0.5]))
    y.backward()
    assert y.item() == 70.5
    assert x.grad is not None and x.grad.tolist() == [[0.0, 0.0, 3.0, 4.0]]
    assert weight.grad is not None and weight.grad.tolist() == [[0.0, 0.0, 10.0, 10.0]]


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_gradient_may_be_asked_for_alone(packed: bool, wanted: int) -> None:
    weight = torch.randn(4, 9, dtype=F64)
    grads = []
    for leaves in ((wanted,), (0, 1, 2)):
        torch.manual_seed(1)
        values = pack_blocks(weight, TOPOLOGY.index, (2, 3), 2) if packed else weight.clone()
        given = [torch.randn(3, 9, dtype=F64), values, torch.randn(4, dtype=F64)]
        for leaf in leaves:
            given[leaf].requires_grad_()
        x, w, bias = given
        y = (
            packed_block_linear(x, w, bias, TOPOLOGY.index, shape=(4, 9))
            if packed
            else block_linear(x, w, TOPOLOGY, VIEW, bias)
        )
        y.square().sum().backward()
        grads.append(given[wanted].grad)
        assert [each.grad is not None for each in given] == [leaf in leaves for leaf in range(3)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("due", DUE)
def test_eager_code_and_the_registered_op_agree_bit_for_bit(due: str, monkeypatch: pytest.MonkeyPatch) -> None:
    topology, view = viewed(due)
    weight, bias, x, grad_y = torch.randn(4, 9), torch.randn(4), torch.randn(2, 5, 9), torch.randn(2, 5, 4)
    results = []
    for eager in (True, False):
        if not eager:
            monkeypatch.setattr(module, "is_eager", lambda *_: False)
        given = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        y = block_linear(*given[:2], topology, view, given[2])
        assert ("_BlockLinear" in type(y.grad_fn).__name__) == eager
        y.backward(grad_y)
        with torch.no_grad():
            plain = block_linear(*given[:2], topology, view, given[2])
        results.append([y.detach(), plain, *(each.grad for each in given)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("due", DUE)
def test_block_linear_is_an_op_as_torch_wants_one(due: str) -> None:
    topology, view = viewed(due)
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 9), (4, 9), (4,)))
    mask, kept = (view.mask, None) if due == "everywhere" else (None, topology.flags if due == "B" else None)
    torch.library.opcheck(
        torch.ops.tritonsparse.block_linear.default,
        (x, weight, bias, None, topology.index, topology.grad_index, kept, mask, view.alpha),
        {"block": [2, 3], "transposed": False, "backend": "torch", "dtype": F32},
    )


def test_packed_block_linear_is_an_op_as_torch_wants_one() -> None:
    values = torch.randn(2, 2, 3, dtype=F64, requires_grad=True)
    x, bias = torch.randn(2, 3, 9, dtype=F64, requires_grad=True), torch.randn(4, dtype=F64, requires_grad=True)
    torch.library.opcheck(
        torch.ops.tritonsparse.packed_block_linear.default, (x, values, bias, TOPOLOGY.index, 4, 9, "torch")
    )
    compiled = torch.compile(packed_block_linear, backend="aot_eager", fullgraph=True)
    given: tuple[Any, ...] = (x, values, bias, TOPOLOGY.index)
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


def test_values_of_another_dtype_are_rounded_to_that_of_x() -> None:
    o = operands(Case(4, 16, 32, (8, 16), "packed", x=BF16))
    values = o.weight.requires_grad_()
    y = packed_block_linear(o.x, values, None, o.layout.index, shape=(16, 32))
    assert torch.equal(y, o.x @ o.dense.bfloat16().t())
    y.sum().backward()
    assert values.grad is not None and values.grad.dtype == F32


def test_blocks_are_packed_row_by_row_and_unpacked_where_they_were() -> None:
    matrix = torch.arange(1, 17).reshape(2, 8)
    # Blocks of 1 x 4: [1..4] [5..8] / [9..12] [13..16]; kept: the second of row 0, both of row 1.
    index = build_index_reference(torch.tensor([[False, True], [True, True]]))
    for given in (matrix, matrix.t().contiguous().t()):
        values = pack_blocks(given, index, (1, 4), 3)
        assert values.tolist() == [[[5, 6, 7, 8]], [[9, 10, 11, 12]], [[13, 14, 15, 16]]] and values.is_contiguous()
    assert unpack_blocks(values, index, (2, 8)).tolist() == [[0, 0, 0, 0, 5, 6, 7, 8], list(range(9, 17))]
    # Room behind the kept blocks is zero, and is not read.
    values = pack_blocks(matrix, index, (1, 4), 5)
    assert not values[3:].any()
    values[3:] = -1
    assert unpack_blocks(values, index, (2, 8)).tolist() == [[0, 0, 0, 0, 5, 6, 7, 8], list(range(9, 17))]


@pytest.mark.parametrize("case", [case for case in (*ODD, *CASES) if case.form == "packed"], ids=str)
def test_unpacked_is_the_reference_weight_also_where_edge_blocks_are_cut(case: Case) -> None:
    for seed in range(3):
        o = operands(case, seed=seed)
        unpacked = unpack_blocks(o.weight, o.layout.index, (case.n, case.k))
        assert torch.equal(unpacked, dense_weight(o.weight, o.layout))
        if case.divides and case.n:
            packed = pack_blocks(unpacked, o.layout.index, case.block, len(o.weight))
            assert torch.equal(packed[:-2], o.weight[:-2]) and not packed[-2:].any()
            assert torch.equal(packed[:-2], as_blocks(unpacked, o.kept, case, 0.0))


def test_a_weight_of_which_nothing_is_kept_gives_the_bias() -> None:
    index, bias = build_index_reference(torch.zeros(2, 2, dtype=torch.bool)), torch.randn(4)
    y = packed_block_linear(torch.randn(3, 4), torch.full((1, 2, 2), NAN), bias, index, shape=(4, 4))
    assert torch.equal(y, bias.expand(3, 4))


def test_few_rows_are_shared_out_until_the_device_is_full() -> None:
    limits = Limits(232_448, 132)
    # 4096 rows in tiles of 32 are 128 items: five programs a multiprocessor take 8 shares, of 16 blocks each.
    tiles = few_rows_tiles((4096, 4096), (32, 32), limits)
    assert (tiles.m, tiles.n, tiles.k, tiles.splits) == (16, 32, 32, 8)
    # A long weight needs no shares, a small one may not have them: of its 4 blocks a row one in four is kept.
    assert few_rows_tiles((65_536, 4096), (32, 32), limits).splits == 1
    assert few_rows_tiles((128, 128), (32, 32), limits).splits == 1
    assert few_rows_tiles((96, 96), (48, 48), limits).n == 16


def linear(**changed: Any) -> Tensor:
    given = {"x": torch.zeros(3, 9), "weight": torch.zeros(4, 9), "topology": TOPOLOGY, "view": VIEW, **changed}
    return block_linear(**given)


def packed(**changed: Any) -> Tensor:
    given = {"x": torch.zeros(3, 9), "values": torch.zeros(2, 2, 3), "bias": None, "index": TOPOLOGY.index, **changed}
    return packed_block_linear(**given, shape=(4, 9))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: linear(x=torch.zeros(3, 8)), r"block_linear: expected x of shape \[..., 9\].*layer's input"),
        (lambda: linear(x=torch.zeros(3, 9).half()), "expected x in torch.float32.*cast x"),
        (lambda: linear(view=View("hard", torch.zeros(1))), 'expected a view of kind "mask", got "hard"; call'),
        (lambda: linear(view=View("mask", mask=MASK[:, 1:])), "block_linear: expected mask to be bool"),
        (lambda: linear(view=VIEW._replace(grad_mask=OTHER)), "got grad_mask alone; make the topology"),
        (lambda: linear(topology=viewed("B")[0]), "got grad_index alone; make the topology of the view's masks"),
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
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_remedy(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
