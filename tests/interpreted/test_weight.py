"""The kernels of the effective weight and its gradient, through the interpreter."""

from functools import partial

import pytest
import torch
from cases.matrices import same
from cases.weight import CASES, Case, check, check_empty, check_many
from cases.weight_exact import EXACT, check_exact, check_untouched

from tritonsparse.kernels import _triton
from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.op import effective_weight
from tritonsparse.kernels.weight.table import Viewed, ViewTable
from tritonsparse.kernels.weight.view import View

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_memory_is_poisoned_and_kernels_are_interpreted() -> None:
    assert _triton.INTERPRETED
    assert torch.empty(3).isnan().all()
    assert torch.zeros(1).new_empty(3, dtype=torch.int32).max() < 0


@pytest.mark.parametrize("name", EXACT)
def test_by_hand(name: str) -> None:
    check_exact(EXACT[name], partial(threshold_cast, backend="triton"), partial(threshold_backward, backend="triton"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_as_exact_as_the_references(case: Case) -> None:
    check(case, 1e-6)


def test_all_layers_in_one_launch_are_as_exact_as_one_by_one() -> None:
    # One of each kind and master dtype.
    check_many([*{(case.kind, case.master): case for case in CASES}.values()], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_threshold_of_zero_returns_the_weight_bit_for_bit_and_a_low_one_is_not_rounded(dtype: torch.dtype) -> None:
    check_untouched(dtype, "triton")
    # T = sigmoid(-0.0001) = 0.499975, which float16 would round to 0.5 = |W|, pruning both.
    weight, view = torch.tensor([[0.5, -0.5]]).half(), View("soft", torch.tensor([-0.0001]))
    assert same(threshold_cast(weight, view, backend="triton"), threshold_cast(weight, view))
    assert threshold_cast(weight, view).count_nonzero() == 2


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_weight_launches_nothing(shape: tuple[int, int]) -> None:
    check_empty(shape, "triton")


@pytest.mark.parametrize("blocks", [(4, 4), (2, 1)])
def test_blocks_that_the_kernels_do_not_sum_are_refused(blocks: tuple[int, int]) -> None:
    weight, view = torch.ones(4, 24), View("soft", torch.zeros(blocks))
    words = 'expected blocks of a multiple of 16 columns for backend="triton"'
    with pytest.raises(ValueError, match=f"threshold_backward: {words}"):
        threshold_backward(weight, weight, view, backend="triton")
    with pytest.raises(ValueError, match=f"ViewTable: {words}"):
        ViewTable([Viewed(weight, view)], "triton")


@pytest.mark.parametrize("kind", ["soft", "step", "mask"])
def test_the_op_s_triton_back_end_has_the_gradients_of_its_reference(kind: str) -> None:
    mask = torch.rand(40, 24) < 0.4 if kind == "mask" else None
    found = {}
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        weight = torch.randn(40, 24, requires_grad=True)
        threshold = None if kind == "mask" else torch.full((40,), 0.3, requires_grad=True)
        leaves = [leaf for leaf in (weight, threshold) if leaf is not None]
        w_hat = effective_weight(weight, View(kind, threshold, mask), backend=backend)
        found[backend] = [w_hat, *torch.autograd.grad(w_hat, leaves, torch.linspace(-1, 1, 960).view(40, 24))]
    torch.testing.assert_close(found["triton"], found["torch"], rtol=1e-5, atol=1e-6)
