"""The kernels that pack activations and multiply packed ones, and the ops around them, interpreted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from cases import sparse_input
from cases.activation import PACKS, PRODUCTS, Packs, Product, assert_packs, product_errors

from tritonsparse.kernels.activation.compress import pack_activation
from tritonsparse.kernels.activation.cutoff import activation_cutoff
from tritonsparse.kernels.activation.grad_weight import packed_grad_weight

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", PACKS, ids=str)
def test_what_is_packed_and_unpacked_is_what_the_definition_keeps(case: Packs) -> None:
    assert_packs(case, "triton")


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_the_product_equals_that_of_the_dense_matrix_in_float64(case: Product) -> None:
    # Sums over at most 33 rows; float16 results are rounded once.
    assert product_errors(case, "triton")[0] <= (5e-4 if case.half else 1e-6)


def test_a_value_that_was_not_stored_makes_its_column_nan() -> None:
    packed = pack_activation(torch.ones(4, 40), torch.zeros(1), None, 3 * 40 + 5)[:3]
    grad = packed_grad_weight(torch.ones(4, 2), *packed, 40, backend="triton")
    assert grad[:, :5].eq(4).all() and grad[:, 5:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_cutoff_selected_without_sorting_is_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 41, dtype=dtype)
    for density in (0.001, 0.2, 1.0):
        assert torch.equal(activation_cutoff(x, density, backend="triton"), activation_cutoff(x, density))
    assert activation_cutoff(torch.ones(4, 8, dtype=dtype), 0.5, backend="triton").tolist() == [1.0]
    for scope in ("sample", "plane"):
        assert torch.equal(activation_cutoff(x, 0.2, scope, backend="triton"), activation_cutoff(x, 0.2, scope))


# A few: the kernels are those above.
@pytest.mark.parametrize("case", sparse_input.CASES[::3], ids=str)
def test_the_ops_equal_their_answer_in_float64(case: sparse_input.Case) -> None:
    o = sparse_input.operands(case, torch.float32)
    wrong = sparse_input.errors(sparse_input.run(o, "triton"), sparse_input.answer(o))
    assert max(wrong.values()) <= 1e-6, wrong
