"""A sparse convolution whose view the kernels compute, through Triton's interpreter, against the torch back end."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.methods import AutoSparse, TopKAST

Check = Callable[[str, Tensor, Tensor, float], None]
METHODS = {
    "soft": AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="constant", backward_density=0.7),
    "mask": TopKAST(sparsity=0.6, backward_sparsity=0.3, alpha=0.25),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", METHODS)
def test_the_kernels_give_what_the_reference_gives(
    kind: str, groups: int, channels_last: bool, poisoned_memory: None, assert_close: Check
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(9, 12, (3, 2), stride=2, padding=1, groups=groups)
    nn.init.normal_(layer.weight, std=0.2)
    layers = {backend: nn.Sequential(copy.deepcopy(layer)) for backend in ("torch", "triton")}
    x = torch.randn(2, 9, 7, 8)
    grad: Tensor | None = None
    found = {}
    for backend, model in layers.items():
        ts.sparsify(model, METHODS[kind], backend=backend, total_steps=10, steps_per_epoch=5)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        grad = torch.randn_like(y) if grad is None else grad
        y.backward(grad)
        tensors = {"y": y.detach(), "dx": inputs.grad, "dw": model[0].weight.grad, "db": model[0].bias.grad}
        if model[0].threshold is not None:
            tensors["ds"] = model[0].threshold.grad
        found[backend] = tensors
    assert layers["triton"][0].backend.name == "triton" and layers["triton"][0].kind == kind
    for name, expected in found["torch"].items():
        assert_close(name, found["triton"][name].contiguous(), expected.contiguous(), 1e-5)
