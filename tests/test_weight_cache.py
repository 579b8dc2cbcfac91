"""Kept effective weights and deferred multipliers change when work is done, never what comes out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_runs import Build, Optimizers, Run, assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tritonsparse.kernels.weight import op
from tritonsparse.methods import ACDC, AutoSparse, Method, Phases, RigL, TopKAST

OPTIMIZERS: Optimizers = {
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups),
    "fused AdamW": lambda groups: torch.optim.AdamW(groups, fused=True),
}
METHODS: dict[str, Method] = {
    "autosparse": AutoSparse(threshold_init=-3.0), "topkast": TopKAST(sparsity=0.5, backward_sparsity=0.25),
    "acdc": ACDC(sparsity=0.5, phases=Phases([(0, "dense"), (1, "sparse"), (2, "dense")], epochs=3)),
    "rigl": RigL(sparsity=0.5, update_every=2),
}  # fmt: skip
FLOAT32 = {"cache_dtype": torch.float32}


def made(method: str = "autosparse", optimizer: str = "AdamW", autocast: bool = False, **attach: Any) -> Run:
    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(torch.randn(5, 12)).float().square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    options: dict[str, Any] = {"groups": {"lr": 0.05, "weight_decay": 0.01}, "total_steps": 6, "steps_per_epoch": 2}
    return Run(model, METHODS[method], OPTIMIZERS[optimizer], loss, attach=attach, include=["*"], **options)


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the views whose effective weight a forward makes from now on."""
    kinds: list[str] = []
    cast = op.cast
    monkeypatch.setattr(op, "cast", lambda *given: (kinds.append(given[2].kind), cast(*given))[1])
    return kinds


def assert_kept(run: Run, dtype: torch.dtype = torch.float32) -> None:
    for layer in run.sparsifier.layers.values():
        if layer.kind != "dense":
            assert layer.cache is not None and layer.cache.w_hat is not None
            assert torch.equal(layer.cache.w_hat, layer.effective_weight().to(dtype))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_cached_run_is_bit_for_bit_and_a_deferred_one_to_rounding(method: str, optimizer: str, casts: Any) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        expected = made(method, optimizer, dtype == torch.bfloat16).train(6, 2)
        casts.clear()
        run = made(method, optimizer, dtype == torch.bfloat16, cache_dtype=dtype).train(6, 2)
        assert casts == []
        assert_same([run.losses, run.state()], [expected.losses, expected.state()])
        assert_kept(run, dtype)
    deferred = made(method, optimizer, defer=True, **FLOAT32).train(6, 2)
    torch.testing.assert_close(deferred.losses, expected.losses, rtol=1e-4, atol=0)
    torch.testing.assert_close({**deferred.model.state_dict()}, {**expected.model.state_dict()}, rtol=1e-3, atol=1e-5)


def test_deferred_steps_of_one_micro_batch_and_checkpointed_and_compiled_forwards_are_equal() -> None:
    expected, deferred, checkpointed, once = made(), made(defer=True), made(**FLOAT32), made(defer=True, **FLOAT32)
    loss, counter = expected.loss, CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(once.model, backend=counter, fullgraph=True)
    checkpointed.loss = lambda model: loss(lambda x: checkpoint(model, x, use_reentrant=False))
    once.loss = lambda model: loss(compiled)
    for run in (expected, deferred, checkpointed, once):
        run.train(6)
    assert_same([deferred.losses, deferred.state()], [expected.losses, expected.state()])
    assert_same(checkpointed.losses, expected.losses)
    # It is compiled once while the cache, alpha and thresholds move.
    torch.testing.assert_close(once.losses, expected.losses, rtol=1e-5, atol=0)
    assert counter.frame_count == 1


def test_deferred_gradients_are_dense_until_the_step_multiplies_them() -> None:
    run = made(optimizer="SGD", defer=True)
    run.loss(run.model).backward()
    layer = run.sparsifier.layers["0"]
    pruned, dense = layer.effective_weight() == 0, layer.weight.grad.clone()
    assert dense[pruned].abs().max() > 0 and layer.threshold.grad.tolist() == [0.0]
    alpha = layer.alpha.clone()
    run.optimizer.step()
    torch.testing.assert_close(layer.weight.grad[pruned], dense[pruned] * alpha)
    assert torch.equal(layer.weight.grad[~pruned], dense[~pruned])
    assert layer.threshold.grad.item() != 0


def test_an_in_place_edit_is_seen_at_once_and_a_data_edit_after_refresh(casts: list[str]) -> None:
    run, x = made(**FLOAT32), torch.randn(3, 12)
    weight = run.model[0].weight
    with torch.no_grad():
        weight.mul_(2.0)
    run.model(x)
    assert casts == ["soft"]  # that layer, and no other
    run.sparsifier.refresh()
    before = run.model(x)
    weight.data = weight.data * 3.0
    run.sparsifier.refresh()
    assert not torch.equal(before, run.model(x)) and casts == ["soft"]
    assert_kept(run)


def test_loading_rewrites_the_cache_and_a_copy_a_move_and_a_detach_drop_it() -> None:
    run, other = made(**FLOAT32), made()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.5)
    run.model.load_state_dict(other.model.state_dict())
    assert_kept(run)
    run.sparsifier.load_state_dict(other.sparsifier.state_dict())
    assert_kept(run)
    run, x = made(defer=True, **FLOAT32), torch.randn(3, 12)
    model: Any = run.model
    expected, twin = model(x), copy.deepcopy(model)
    assert twin[0].cache is None and torch.equal(twin(x), expected)
    model.double()
    assert model[0].cache.w_hat is None
    torch.testing.assert_close(model(x.double()).float(), expected)
    model.float()
    run.sparsifier.refresh()
    assert model[0].cache.w_hat is not None
    run.sparsifier.detach()
    assert model[0].cache is None and torch.equal(model(x), expected)


def test_a_backward_through_an_overwritten_weight_and_a_cache_in_integers_are_refused(mlp: Build) -> None:
    run = made(**FLOAT32)
    loss = run.loss(run.model)
    run.sparsifier.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match=r"attach: expected a floating-point cache_dtype, got torch\.int8"):
        Run(mlp(), "str", attach={"cache_dtype": torch.int8})
