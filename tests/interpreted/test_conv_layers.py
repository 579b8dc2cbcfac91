"""Layers whose convolutions are fused or skip blocks, through the interpreter, against the torch back end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.methods import AutoSparse, Static, TopKAST

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Close = Callable[[str, Tensor, Tensor, float], None]

METHODS: dict[str, Any] = {
    "fused soft": AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="constant", backward_density=0.7),
    "fused mask": TopKAST(sparsity=0.6, backward_sparsity=0.3, alpha=0.25),
    "block mask": Static(sparsity=0.5),
    "block larger": TopKAST(sparsity=0.6, backward_sparsity=0.3, alpha=0.25),
}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize(("padding", "mode"), [(1, "zeros"), ("same", "zeros"), ((0, 1), "circular")], ids=str)
def test_a_layer_gives_what_its_reference_gives(case: str, padding: Any, mode: str, assert_close: Close) -> None:
    backend = case.partition(" ")[0]
    torch.manual_seed(0)
    stride, groups = (1, 1) if padding == "same" else (2, 2), 1 if mode == "zeros" else 2
    stock = nn.Conv2d(32, 32, (2, 1), stride=stride, padding=padding, padding_mode=mode, groups=groups)
    nn.init.normal_(stock.weight, std=0.2)
    # One of these is a copy as a matrix, the other a view.
    stock.to(memory_format=torch.channels_last if mode == "zeros" else torch.contiguous_format)
    x = torch.randn(1, 32, 4, 3)
    found = {}
    for each in ("torch", backend):
        model = nn.Sequential(copy.deepcopy(stock))
        pattern = "block:16" if backend == "block" else "unstructured"
        ts.sparsify(model, METHODS[case], backend=each, pattern=pattern, total_steps=10, steps_per_epoch=5)
        assert model[0].backend == each
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
        tensors = {"y": y.detach(), "dx": inputs.grad, "dw": model[0].weight.grad, "db": model[0].bias.grad}
        if model[0].threshold is not None:
            tensors["ds"] = model[0].threshold.grad
        found[each] = tensors
    for name, expected in found["torch"].items():
        assert_close(name, found[backend][name].contiguous(), expected.contiguous(), 1e-5)


def test_narrow_groups_keep_their_view_beside_the_product_and_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32))
    ts.sparsify(model, METHODS["fused mask"], backend="fused", include=["*"], total_steps=10, steps_per_epoch=5)
    assert model[0].backend == "triton" and "32 groups" in model[0].backend_reason
