"""The op's Triton back ends against its reference, gradients included, through the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tritonsparse.kernels.fused.linear import masked_linear

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def operands(kind: str, transposed: bool, *leading: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    shape = (24, 40) if transposed else (40, 24)
    soft = kind != "mask"
    return {
        "x": torch.randn(*leading, 24, generator=random, requires_grad=True),
        "weight": torch.randn(shape, generator=random, requires_grad=True),
        "bias": torch.randn(40, generator=random, requires_grad=True),
        "threshold": torch.full((shape[0],), 0.3).requires_grad_(kind != "hard") if soft else None,
        "mask": None if soft else torch.rand(shape, generator=random) < 0.4,
        "grad_mask": None if kind == "step" else torch.rand(shape, generator=random) < 0.7,
        "alpha": None if kind == "step" else torch.tensor(0.5),
    }


@pytest.mark.parametrize("leading", [(3, 5), (0,), (1,), ()])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize(
    ("backend", "kind"),
    [("triton", "soft"), ("triton", "step"), ("fused", "soft"), ("fused", "hard"), ("fused", "mask")],
)
def test_forward_and_gradients_equal_the_reference(
    assert_close: Callable[[str, torch.Tensor, torch.Tensor, float], None],
    backend: str,
    kind: str,
    transposed: bool,
    leading: tuple[int, ...],
) -> None:
    found = {}
    for each in ("torch", backend):
        given = operands(kind, transposed, *leading)
        y = masked_linear(**given, kind=kind, transposed=transposed, backend=each)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
        leaves = {name: value.grad for name, value in given.items() if value is not None and value.requires_grad}
        found[each] = {"y": y.detach(), **leaves}
    assert found["torch"].keys() == found[backend].keys()
    for name, expected in found["torch"].items():
        assert expected is not None and found[backend][name] is not None
        assert_close(name, found[backend][name], expected, 1e-5)


def test_what_the_fused_back_end_does_not_compute_is_refused() -> None:
    given = operands("step", False, 2)
    with pytest.raises(ValueError, match=r'a threshold for the matrix or a row with backend "fused", got .step.; pass'):
        masked_linear(**given, kind="step", backend="fused")
