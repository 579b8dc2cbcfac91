"""One launch over many layers against the references, through the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels.weight.backward_many import backward_many, backward_many_reference
from tritonsparse.kernels.weight.forward_many import cast_many, cast_many_reference
from tritonsparse.kernels.weight.table import View, ViewTable

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Close = Callable[[str, torch.Tensor, torch.Tensor, float], None]

layers = st.tuples(
    st.sampled_from([1, 7, 64, 70]),
    st.sampled_from([1, 16, 63, 96, 128]),
    st.sampled_from(["soft", "soft per row", "soft per block", "hard", "step per row", "mask"]),
    st.booleans(),
)


def made(n: int, k: int, kind: str, annealed: bool, random: torch.Generator) -> View:
    weight = torch.randn(n, k, generator=random)
    weight[torch.rand(n, k, generator=random) < 0.1] = 0.0
    kind, _, per = kind.partition(" per ")
    threshold = None
    if kind != "mask":
        # Blocks of n x 16, where they fit.
        shape = {"": (1,), "row": (n,), "block": (1, k // 16) if k % 16 == 0 else (n,)}[per]
        threshold = torch.randn(shape, generator=random)
    limited = annealed and kind != "step"
    return View(
        kind,
        weight,
        threshold,
        torch.rand(n, k, generator=random) < 0.3 if kind == "mask" else None,
        torch.rand(n, k, generator=random) < 0.5 if limited else None,
        torch.tensor(0.5) if limited else None,
        torch.empty(n, k),
    )


@settings(max_examples=12)
@given(shapes=st.lists(layers, min_size=1, max_size=3), seed=st.integers(0, 2**16), bracketed=st.booleans())
def test_all_layers_equal_the_reference(
    assert_close: Close, shapes: list[tuple[int, int, str, bool]], seed: int, bracketed: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    views = [made(*shape, random) for shape in shapes]
    bracket = torch.tensor([0.25, 0.75]) if bracketed else None
    table = ViewTable(views, "triton")
    counted = cast_many(table, bracket)
    actual = [view.w_hat.clone() for view in views if view.w_hat is not None]
    expected = cast_many_reference(views, bracket)
    for view, w_hat in zip(views, actual, strict=True):
        assert view.w_hat is not None
        assert_close("w_hat", w_hat, view.w_hat, 1e-6)
    assert torch.equal(counted.kept, expected.kept)
    if bracketed:
        assert torch.equal(counted.below, expected.below) and torch.equal(counted.inside, expected.inside)
    assert all(torch.equal(a, e) for a, e in zip(counted.occupancy, expected.occupancy, strict=True))

    # The second of several layers got no gradient.
    given_grads = [torch.randn(view.weight.shape, generator=random) for view in views]
    grads = [None if index == 1 else grad.clone() for index, grad in enumerate(given_grads)]
    expected_grads = [None if index == 1 else grad.clone() for index, grad in enumerate(given_grads)]
    of_thresholds = backward_many(table, grads)
    expected_of_thresholds = backward_many_reference(views, expected_grads)
    for view, grad, expected_grad, ds, expected_ds in zip(
        views, grads, expected_grads, of_thresholds, expected_of_thresholds, strict=True
    ):
        if grad is not None and expected_grad is not None:
            assert_close("grad", grad, expected_grad, 1e-6)
        assert ds.shape == expected_ds.shape
        if ds.numel():
            assert (ds - expected_ds).abs().max().item() <= 4e-6 * view.weight.numel() ** 0.5


def test_a_layer_without_weights_is_passed_over() -> None:
    views = [
        View("soft", torch.zeros(0, 4), torch.zeros(1), w_hat=torch.empty(0, 4)),
        made(5, 16, "soft", False, torch.Generator()),
    ]
    counted = cast_many(ViewTable(views, "triton"))
    assert counted.kept[0] == 0 and counted.occupancy[0].numel() == 0
    assert backward_many(ViewTable(views, "triton"), [None, None])[0].tolist() == [0.0]
