"""Sparse convolutions on a GPU: the back ends agree in bfloat16 and float32, and training steps can be captured."""

import copy
from typing import Any

import pytest
import torch
from graphs import captured
from small_runs import relative_error
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.methods import AutoSparse, Static

DEVICE = "cuda"
METHODS = {
    "soft": AutoSparse(threshold_init=-3.0, alpha=0.4, alpha_schedule="constant"),
    "mask": Static(sparsity=0.8),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 1), nn.ReLU(),
        nn.Conv2d(128, 64, 3, padding="same", groups=4),
    ).to(DEVICE)  # fmt: skip


def gradients(model: nn.Module, x: Tensor, grad: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        y = model(x)
    y.backward(grad.to(y.dtype))
    return {"y": y.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_agree(kind: str, last: bool, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    stock = network()
    x, grad = torch.randn(8, 16, 28, 28, device=DEVICE), torch.randn(8, 64, 14, 14, device=DEVICE)
    found = {}
    for backend in ("torch", "triton"):
        model: Any = copy.deepcopy(stock)
        ts.sparsify(model, METHODS[kind], backend=backend, total_steps=10, steps_per_epoch=5)
        if last:
            model.to(memory_format=torch.channels_last)
        found[backend] = gradients(model, x, grad, dtype)
    for name, expected in found["torch"].items():
        assert relative_error(found["triton"][name], expected) < bound, name


def test_forward_and_backward_can_be_captured_while_thresholds_move() -> None:
    model: Any = network().to(memory_format=torch.channels_last).eval()
    sparsifier = ts.sparsify(model, METHODS["soft"], backend="triton")
    x = torch.randn(4, 16, 28, 28, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        y: Tensor = model(x)
        y.square().mean().backward()
        return y

    graph, y = captured(run, calls=3, before=model.zero_grad)
    for threshold in (-3.0, -2.5):
        with torch.no_grad():
            for layer in sparsifier.layers.values():
                layer.threshold.fill_(threshold)
        for parameter in model.parameters():
            parameter.grad.zero_()
        graph.replay()
        assert relative_error(y.clone(), model(x)) < 1e-3


@pytest.mark.parametrize("backend", ["fused", "block"])
def test_a_network_trains_as_under_the_torch_back_end(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    losses = {}
    for each in ("torch", backend):
        model: Any = network().to(memory_format=torch.channels_last)
        soft = AutoSparse(threshold_init=-3.0, alpha=0.4, alpha_schedule="constant")
        method, pattern = (soft, "unstructured") if backend == "fused" else (Static(sparsity=0.5), "block:16")
        sparsifier = ts.sparsify(model, method, backend=each, pattern=pattern, total_steps=5, steps_per_epoch=5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        sparsifier.attach(optimizer)
        x = torch.randn(8, 16, 28, 28, device=DEVICE)
        losses[each] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses[each].append(float(loss.detach()))
    assert losses[backend] == pytest.approx(losses["torch"], rel=1e-3)
    assert losses["torch"][-1] < losses["torch"][0]
