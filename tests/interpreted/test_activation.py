"""The kernels that pack activations and multiply packed ones, and the ops around them, interpreted."""

import pytest
import torch
from cases import sparse_input
from cases.activation import CASES, Case, packed_errors

from tritonsparse.kernels.activation.cutoff import activation_cutoff

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy's of products with the infinities and NaN of the cases.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_packed_unpacked_and_multiplied_is_what_the_definition_keeps(case: Case) -> None:
    # Sums over at most 33 rows; float16 results are rounded once.
    assert packed_errors(case, "triton")[0] <= (5e-4 if case.half else 1e-6)


def test_a_cutoff_selected_without_sorting_is_the_same() -> None:
    x, tied = torch.randn(3, 5, 41), torch.ones(4, 8)
    for each, density, scope in (
        (x, 0.001, "batch"), (x.half(), 0.2, "batch"), (x, 1.0, "batch"), (tied, 0.5, "batch"), (x, 0.2, "plane"),
        (x, 0.2, "sample"),
    ):  # fmt: skip
        cutoff = activation_cutoff(each, density, scope)
        assert torch.equal(activation_cutoff(each, density, scope, backend="triton"), cutoff)


# A few: the kernels are those above.
@pytest.mark.parametrize("case", sparse_input.CASES[::3], ids=str)
def test_the_ops_equal_their_answer_in_float64(case: sparse_input.Case) -> None:
    p = sparse_input.product(case, torch.float32)
    wrong = p.errors(p.run("triton"))
    assert max(wrong.values()) <= 1e-6, wrong
