"""Convolutions whose effective weight a kernel makes, that are fused, or skip blocks, against the torch back end."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.methods import AutoSparse, Method, Static, TopKAST

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SOFT = AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="constant", backward_density=0.7)
MASK = TopKAST(sparsity=0.6, backward_sparsity=0.3, alpha=0.25)
# Of a convolution, and its images.
SMALL, WIDE = ((9, 12, (3, 2)), (2, 9, 7, 8)), ((32, 32, (2, 1)), (1, 32, 4, 3))
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "odd": (SMALL, {"stride": 2, "padding": 1}), "odd groups": (SMALL, {"stride": 2, "padding": 1, "groups": 3}),
    "strided": (WIDE, {"stride": 2, "padding": 1}), "same": (WIDE, {"padding": "same"}),
    "circular groups": (WIDE, {"stride": 2, "padding": (0, 1), "padding_mode": "circular", "groups": 2}),
}  # fmt: skip
BLOCKS = (("fused", SOFT), ("fused", MASK), ("block", Static(sparsity=0.5)), ("block", MASK))
CASES: list[tuple[str, Method, str, bool]] = [
    *(("triton", method, shape, last) for method in (SOFT, MASK) for shape in [*SHAPES][:2] for last in (False, True)),
    # One of the wide ones is a copy as a matrix, the others are views.
    *((*how, shape, shape != "circular groups") for how in BLOCKS for shape in [*SHAPES][2:]),
]


@pytest.mark.parametrize(("backend", "method", "shape", "last"), CASES, ids=lambda each: getattr(each, "name", None))
def test_a_layer_gives_what_its_reference_gives(
    backend: str, method: Method, shape: str, last: bool, assert_close: Callable[[str, Tensor, Tensor, float], None]
) -> None:
    (sizes, images), options = SHAPES[shape]
    torch.manual_seed(0)
    stock = nn.Conv2d(*sizes, **options)
    nn.init.normal_(stock.weight, std=0.2)
    x, found = torch.randn(images), {}
    for each in ("torch", backend):
        model = nn.Sequential(copy.deepcopy(stock))
        pattern = "block:16" if backend == "block" else "unstructured"
        ts.sparsify(model, method, backend=each, pattern=pattern, total_steps=10, steps_per_epoch=5)
        model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        layer: Any = model[0]
        assert layer.backend.name == each and layer.kind == ("soft" if method is SOFT else "mask")
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
        found[each] = {"y": y.detach(), "dx": inputs.grad, "dw": layer.weight.grad, "db": layer.bias.grad}
        if layer.threshold is not None:
            found[each]["ds"] = layer.threshold.grad
    for name, expected in found["torch"].items():
        assert_close(name, found[backend][name].contiguous(), expected.contiguous(), 1e-5)


def test_narrow_groups_are_not_fused_and_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32))
    ts.sparsify(model, MASK, backend="fused", include=["*"], total_steps=10, steps_per_epoch=5)
    layer: Any = model[0]
    assert layer.backend.name == "triton" and "32 narrow groups" in layer.backend.reason
