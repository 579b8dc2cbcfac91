"""Cached views and deferred multipliers change when work is done, never what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import tritonsparse as ts
from tritonsparse.kernels.weight import op
from tritonsparse.kernels.weight.view import View
from tritonsparse.methods import Method
from tritonsparse.methods.acdc import ACDC, Phases
from tritonsparse.methods.rigl_set import RigL
from tritonsparse.methods.str_autosparse import AutoSparse
from tritonsparse.methods.topkast import TopKAST

Optimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "AdamW": torch.optim.AdamW,
    "fused AdamW": lambda groups: torch.optim.AdamW(groups, fused=True),
}
METHODS: dict[str, Method] = {
    "autosparse": AutoSparse(threshold_init=-3.0),
    "topkast": TopKAST(sparsity=0.5, backward_sparsity=0.25),
    "acdc": ACDC(sparsity=0.5, phases=Phases([(0, "dense"), (1, "sparse"), (2, "dense")], epochs=3)),
    "rigl": RigL(sparsity=0.5, update_every=2),
}


def made(method: str = "autosparse") -> tuple[nn.Module, ts.Sparsifier]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return model, ts.sparsify(model, METHODS[method], include=["*"], total_steps=6, steps_per_epoch=2)


def trained(
    method: str = "autosparse",
    optimizer: str = "AdamW",
    *,
    micro_batches: int = 1,
    autocast: bool = False,
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda model: model,
    **options: Any,
) -> tuple[list[float], dict[str, Tensor], ts.Sparsifier]:
    model, sparsifier = made(method)
    made_optimizer = OPTIMIZERS[optimizer](sparsifier.param_groups(lr=0.05, weight_decay=0.01))
    sparsifier.attach(made_optimizer, **options)
    forward = wrap(model)
    random = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(6):
        for _ in range(micro_batches):
            x = torch.randn(5, 12, generator=random)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = forward(x).float().square().mean()
            loss.backward()
            losses.append(loss.item())
        made_optimizer.step()
        made_optimizer.zero_grad()
    return losses, {name: value.clone() for name, value in model.state_dict().items()}, sparsifier


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_cached_run_is_the_uncached_one_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, method: str, optimizer: str, autocast: bool
) -> None:
    expected = trained(method, optimizer, micro_batches=2, autocast=autocast)
    views = count_views(monkeypatch)
    dtype = torch.bfloat16 if autocast else torch.float32
    losses, weights, sparsifier = trained(method, optimizer, micro_batches=2, autocast=autocast, cache_dtype=dtype)
    assert views == []  # no forward built a view
    assert losses == expected[0]
    assert all(torch.equal(weights[name], value) for name, value in expected[1].items())
    for layer in sparsifier.layers.values():
        if layer.kind != "dense":
            assert layer.cache is not None and layer.cache.w_hat is not None
            assert torch.equal(layer.cache.w_hat, layer.effective_weight().to(dtype))


def count_views(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the views that the op builds from now on."""
    views: list[str] = []
    build = op.cast

    def counted(weight: Tensor, view: View, *rest: Any) -> Tensor:
        views.append(view.kind)
        return build(weight, view, *rest)

    monkeypatch.setattr(op, "cast", counted)
    return views


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_deferred_run_is_the_undeferred_one_to_rounding(method: str, optimizer: str) -> None:
    expected = trained(method, optimizer, micro_batches=4)
    losses, weights, _ = trained(method, optimizer, micro_batches=4, defer=True, cache_dtype=torch.float32)
    assert losses == pytest.approx(expected[0], rel=1e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)


def test_a_deferred_step_of_one_micro_batch_is_bit_equal() -> None:
    expected = trained()
    actual = trained(defer=True)
    assert actual[0] == expected[0]
    assert all(torch.equal(actual[1][name], value) for name, value in expected[1].items())


def test_deferred_gradients_are_dense_until_the_step_multiplies_them() -> None:
    model, sparsifier = made()
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.0))
    sparsifier.attach(optimizer, defer=True)
    x = torch.randn(5, 12)
    model(x).square().mean().backward()
    layer = sparsifier.layers["0"]
    assert layer.weight.grad is not None and layer.threshold is not None and layer.threshold.grad is not None
    pruned = layer.effective_weight() == 0
    assert layer.weight.grad[pruned].abs().max() > 0 and layer.threshold.grad.tolist() == [0.0]
    dense = layer.weight.grad.clone()
    optimizer.step()
    assert layer.alpha is not None
    torch.testing.assert_close(layer.weight.grad[pruned], dense[pruned] * layer.alpha)
    assert torch.equal(layer.weight.grad[~pruned], dense[~pruned])
    assert layer.threshold.grad.item() != 0


def test_checkpointed_forwards_use_the_cache() -> None:
    expected = trained()
    actual = trained(
        cache_dtype=torch.float32,
        wrap=lambda model: lambda x: checkpoint(model, x, use_reentrant=False),
    )
    assert actual[0] == expected[0]


def test_a_compiled_model_is_compiled_once_while_cache_alpha_and_thresholds_move() -> None:
    expected = trained()
    counter = CompileCounterWithBackend("aot_eager")
    actual = trained(
        cache_dtype=torch.float32, defer=True, wrap=lambda model: torch.compile(model, backend=counter, fullgraph=True)
    )
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert counter.frame_count == 1


def test_an_in_place_edit_is_seen_at_once_and_a_data_edit_after_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sparsifier = made()
    sparsifier.attach(torch.optim.SGD(sparsifier.param_groups(lr=0.1)), cache_dtype=torch.float32)
    x = torch.randn(3, 12)
    layer = sparsifier.layers["0"]
    views = count_views(monkeypatch)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    model(x)
    assert views == ["soft"]  # that layer, and no other
    sparsifier.refresh()
    model(x)
    assert views == ["soft"]
    before = model(x)
    layer.weight.data = layer.weight.data * 3.0
    sparsifier.refresh()
    after = model(x)
    assert not torch.equal(before, after)
    assert layer.cache is not None and layer.cache.w_hat is not None
    assert torch.equal(layer.cache.w_hat, layer.effective_weight())
    assert views == ["soft"]


def test_loading_rewrites_the_cache() -> None:
    model, sparsifier = made()
    sparsifier.attach(torch.optim.SGD(sparsifier.param_groups(lr=0.1)), cache_dtype=torch.float32)
    other, other_sparsifier = made()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    model.load_state_dict(other.state_dict())
    sparsifier.load_state_dict(other_sparsifier.state_dict())
    for layer in sparsifier.layers.values():
        assert layer.cache is not None and layer.cache.w_hat is not None
        assert torch.equal(layer.cache.w_hat, layer.effective_weight())


def test_a_copy_a_move_and_a_detach_drop_the_buffers() -> None:
    model, sparsifier = made()
    sparsifier.attach(torch.optim.SGD(sparsifier.param_groups(lr=0.1)), cache_dtype=torch.float32, defer=True)
    x = torch.randn(3, 12)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert twin[0].cache is None
    assert torch.equal(twin(x), expected)

    model.double()
    assert model[0].cache.w_hat is None
    torch.testing.assert_close(model(x.double()).float(), expected)
    model.float()
    sparsifier.refresh()
    assert model[0].cache.w_hat is not None

    sparsifier.detach()
    assert model[0].cache is None
    assert torch.equal(model(x), expected)


def test_a_backward_through_an_overwritten_view_is_refused() -> None:
    model, sparsifier = made()
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    sparsifier.attach(optimizer, cache_dtype=torch.float32)
    loss = model(torch.randn(3, 12)).square().mean()
    sparsifier.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_cache_in_integers_is_refused() -> None:
    _, sparsifier = made()
    with pytest.raises(ValueError, match=r"attach: expected a floating-point cache_dtype, got torch\.int8"):
        sparsifier.attach(torch.optim.SGD(sparsifier.param_groups(lr=0.1)), cache_dtype=torch.int8)
