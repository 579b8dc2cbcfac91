"""Training on the kept blocks alone: the same run as in dense storage, in less memory."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_runs import Build, Optimizers, Run, assert_same, flat, relative_error
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
import tritonsparse.methods as m
from tritonsparse.layers.compact import CompactLayer

PHASES = m.Phases([(0, "dense"), (2, "sparse"), (4, "dense"), (5, "sparse")], 8)
OFTEN: dict[str, Any] = {"sparsity": 0.7, "update_every": 4}
METHODS: dict[str, m.Method] = {
    "static": m.Static(sparsity=0.7),
    "rigl": m.RigL(**OFTEN),
    "set": m.SET(**OFTEN),
    "dsr": m.DSR(sparsity=0.7, update_every=3),
    "mest": m.MEST(**OFTEN, mutation=(0.1, 0.0), softness=(0.1, 0.0), stages=(0.5,)),
    "snfs": m.SNFS(sparsity=0.7, update_every=3, stop_at=0.5),
    "acdc": m.ACDC(sparsity=0.7, phases=PHASES),
    "gmp": m.GMP(sparsity=0.7, update_every=2, end=0.4),
}
# After which of 16 steps layers are compact. RigL has dense gradients at steps 4, 8 and (until 0.75 of 16) no more: the
# step before leaves layers dense. AC/DC is sparse from step 4 to 8 and from 10: packed after the first step of each,
# until after the last. GMP's last update is after step 6 (0.4 of 16); after step 7 nothing changes any more.
COMPACTED = {
    **{"static": "1111111111111111", "rigl": "1110111011111111"},
    **{"acdc": "0000111000111111", "gmp": "0000001111111111"},
}


# Stands for an optimizer that is not elementwise.
Factored = type("Factored", (torch.optim.SGD,), {})
OPTIMIZERS: Optimizers = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups),
    "adamw": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "factored": lambda groups: Factored(groups),
}
STEPS = 16
# A sum of 96 products, the longest in these models, in float32: another order moves it by this much of its norm.
ROUNDING = 96 * 2.0**-24


def linears(transposed: bool = True) -> nn.Module:
    """Without a transposed weight they lie in memory as their packed form: the same kernel sees the same layout."""
    torch.manual_seed(0)
    middle = Conv1D(64, 96) if transposed else nn.Linear(96, 64)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), middle, nn.GELU(), nn.Linear(64, 32))


def convolutions(memory_format: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    both = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1, stride=2)
    return nn.Sequential(nn.Unflatten(1, (16, 2, 2)), *both, nn.Flatten()).to(memory_format=memory_format)


def start(method: Any = "static", optimizer: str = "sgd", model: nn.Module | None = None, **options: Any) -> Run:
    def loss(model: Any) -> Tensor:
        return model(torch.randn(8, 64)).square().mean()

    options = {"pattern": "block:16", "total_steps": STEPS, "steps_per_epoch": 2, **options}
    chosen = METHODS.get(method, method) if isinstance(method, str) else method
    rates = {"lr": 0.01, "weight_decay": 0.1}
    return Run(model or linears(), chosen, OPTIMIZERS[optimizer], loss, groups=rates, **options)


def compact(*arguments: Any, **options: Any) -> Run:
    run = start(*arguments, **options)
    run.sparsifier.compact()
    return run


def trained(run: Run) -> tuple[dict[str, Any], list[Tensor]]:
    run.train(STEPS)
    run.sparsifier.expand()
    return run.state(), run.losses


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Of the model and of the optimizer."""
    leaves = flat({"model": state["model"], "optimizer": state["optimizer"]})
    return {key: value for key, value in leaves.items() if isinstance(value, Tensor)}


MORE = [(method, optimizer) for method in ("rigl", "acdc") for optimizer in ("sgd", "adam")]


@pytest.mark.parametrize(("method", "optimizer"), [*((method, "adamw") for method in METHODS), *MORE])
def test_every_bit_is_that_of_dense_storage_and_layers_are_compact_while_they_can(method: str, optimizer: str) -> None:
    dense, packed = (make(method, optimizer, linears(False)) for make in (start, compact))
    assert_same(trained(packed), trained(dense))
    assert any(packed.compacted) and not any(dense.compacted)
    if method in COMPACTED:
        assert "".join(str(int(each)) for each in packed.compacted) == COMPACTED[method]


@pytest.mark.parametrize("case", ["static", "rigl", "acdc", torch.channels_last, torch.contiguous_format], ids=str)
def test_transposed_weights_and_convolutions_train_as_in_dense_storage_to_rounding(case: Any) -> None:
    makes = (start, compact)
    dense, packed = (make(case) if isinstance(case, str) else make("rigl", model=convolutions(case)) for make in makes)
    (theirs, _), (ours, _) = (trained(run) for run in (dense, packed))
    assert_same(ours["sparsifier"]["tensors"], theirs["sparsifier"]["tensors"])
    assert tensors(ours).keys() == tensors(theirs).keys() and any(packed.compacted)
    assert [p.stride() for p in packed.model.parameters()] == [p.stride() for p in dense.model.parameters()]
    # The packed form of a Conv1D is not transposed, and images are elsewhere in memory: CPU libraries may add in
    # another order.
    if not isinstance(case, str):
        torch.testing.assert_close(tensors(ours), tensors(theirs), rtol=1e-4, atol=1e-6)
    else:
        errors = {key: relative_error(tensors(ours)[key], value) for key, value in tensors(theirs).items()}
        assert max(errors.values()) <= STEPS * ROUNDING, errors


def bytes_of(run: Run) -> dict[str, int]:
    layers = run.sparsifier.layers.values()
    weights = [layer.weight for layer in layers]
    state = [value for weight in weights for value in run.optimizer.state[weight].values() if value.dim()]
    views = [getattr(layer, name, None) for layer in layers for name in ("mask", "index")]
    held = {"weights": weights, "gradients": [weight.grad for weight in weights], "state": state, "views": views}
    return {name: sum(each.nbytes for each in tensors if each is not None) for name, tensors in held.items()}


def test_weights_gradients_and_state_take_the_memory_of_the_kept_blocks() -> None:
    run = start(m.Static(sparsity=0.75), "adamw").train(1)
    run.loss(run.model).backward()
    before = bytes_of(run)
    assert before == {"weights": 57_344, "gradients": 57_344, "state": 3 * 57_344, "views": 14_336}
    run.sparsifier.compact()
    packed = bytes_of(run)
    # 6 of 24, 6 of 24 and 2 of 8 blocks of 16 x 16; an index has R + C and 3 R C entries and a few more, of 4 bytes.
    assert packed.pop("views") < 1_000 and packed == {"weights": 14_336, "gradients": 14_336, "state": 3 * 14_336}
    assert not any(tensor.untyped_storage().nbytes() > tensor.nbytes for tensor in run.model.parameters())
    run.sparsifier.expand()
    assert bytes_of(run) == before


def test_parameters_stay_the_objects_that_others_hold_and_gradients_of_earlier_batches_survive() -> None:
    run = start(optimizer="adamw").train(1)
    held, (x, y) = list(run.model.parameters()), torch.randn(2, 4, 64)
    run.model(x).sum().backward()
    run.sparsifier.compact()
    run.model(y).sum().backward()
    run.sparsifier.expand()
    grads = [parameter.grad.clone() for parameter in held]
    run.optimizer.zero_grad()
    (run.model(x).sum() + run.model(y).sum()).backward()
    torch.testing.assert_close(grads, [parameter.grad for parameter in held])
    run.sparsifier.compact()
    run.train(2)
    run.loss(run.model).backward()
    nn.utils.clip_grad_norm_(held, 1e-3)
    assert max(float(weight.grad.norm()) for weight in held if weight.grad is not None) <= 1e-3
    for _ in range(2):
        assert all(a is b for a, b in zip(held, run.model.parameters(), strict=True))
        run.sparsifier.expand()


def test_compact_layers_report_copy_move_and_evaluate_as_dense_ones() -> None:
    run, x = start(optimizer="adamw").train(2), torch.randn(4, 64)
    sparsifier = run.sparsifier

    def looks() -> list[Any]:
        said = sparsifier.sparsity(), str(sparsifier.report()), sparsifier.summary()
        return [*said, sparsifier.finalized_state_dict()]

    before, y = copy.deepcopy(looks()), run.model(x)
    sparsifier.compact()
    packed, moved = run.model(x), copy.deepcopy(run.model).to("meta")
    assert all(layer.compacted for layer in sparsifier.layers.values()) and relative_error(packed, y) <= ROUNDING
    assert_same(looks(), before)
    assert torch.equal(copy.deepcopy(run.model)(x), packed)
    assert {layer.index.device.type for layer in moved if isinstance(layer, CompactLayer)} == {"meta"}
    torch.testing.assert_close(run.model.double()(x.double()).float(), run.model.float()(x))
    stock = linears()
    stock.load_state_dict(sparsifier.finalize().state_dict())
    assert relative_error(stock(x), packed) <= ROUNDING and type(run.model[0]) is nn.Linear


def test_the_back_end_is_that_of_the_packed_products_and_afterwards_what_it_was(monkeypatch: Any) -> None:
    run = start()
    layer = run.sparsifier.layers["0"]
    layer.backend = replace(layer.backend, name="fused", reason="decided in between")
    # As on a GPU, where `auto` takes the kernels.
    monkeypatch.setattr("tritonsparse.layers.compact.packed_block_backend", lambda choice, values: "triton")
    run.sparsifier.compact()
    report = run.sparsifier.report()
    assert layer.backend.name == "block" and report.exploitable == pytest.approx(report.sparsity)
    run.sparsifier.expand()
    assert (layer.backend.name, layer.backend.reason) == ("fused", "decided in between")


def test_a_compiled_model_follows_its_layers_and_autocast_trains_to_the_rounding_of_low_precision() -> None:
    run = start(optimizer="adamw").train(1)
    compiled, x = torch.compile(run.model, backend="aot_eager"), torch.randn(4, 64)
    outputs = [compiled(x)]
    run.sparsifier.compact()
    outputs.append(compiled(x))
    outputs[1].sum().backward()
    assert run.model[0].weight.grad.shape == run.model[0].weight.shape == (7, 16, 16)
    run.sparsifier.expand()
    outputs.append(compiled(x))
    torch.testing.assert_close(outputs[1:], outputs[:1] * 2)
    runs = [make("rigl", "adamw") for make in (start, compact)]
    with torch.autocast("cpu", torch.bfloat16):
        dense, packed = (torch.stack(run.train(4).losses) for run in runs)
        assert runs[1].model(torch.randn(8, 64)).dtype == torch.bfloat16
    assert relative_error(packed, dense) <= 1e-2


def test_what_is_saved_is_dense_and_compact_weights_load_nothing(gpt2: Build, tmp_path: Path) -> None:
    run, resumed = compact("rigl", "adamw").train(6), start("rigl", "adamw")
    assert all(layer.compacted for layer in run.sparsifier.layers.values())
    saved = copy.deepcopy(run.state())
    for part in ("sparsifier", "optimizer"):
        with pytest.raises(RuntimeError, match=r"load_state_dict: expected weights in dense storage.*call expand\(\)"):
            run.parts()[part].load_state_dict(saved[part])
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight"):
        run.model.load_state_dict(saved["model"])
    run.sparsifier.expand()
    assert_same(saved, run.state())
    run.load(copy.deepcopy(saved))
    resumed.load(saved).sparsifier.compact()
    assert_same(resumed.train(STEPS - 6).state(), compact("rigl", "adamw").train(STEPS).state())
    # The sidecar of compact weights goes on as that of dense ones.
    sparsifier = compact(model=gpt2(), pattern="block:8").sparsifier
    sparsifier.save_pretrained(tmp_path)
    again, loaded = ts.load(tmp_path, GPT2LMHeadModel)
    assert_same({**again.state_dict()}, {**sparsifier.model.state_dict()})
    assert loaded.sparsity() > 0.6


# What is wrong from the start, or what is done to a run of one step.
REFUSED: list[tuple[str, Any]] = [
    ("ValueError: compact: expected a pattern of blocks, got 'unstructured'", {"pattern": "unstructured"}),
    ("ValueError: compact: expected a method whose topology stays for a while, got 'dense'", {"method": "dense"}),
    ("topology stays for a while, got 'rigl'", {"method": m.RigL(sparsity=0.0)}),
    ("ValueError: compact: expected an optimizer whose update is elementwise", {"optimizer": "factored"}),
    ("got 'row' of [96] in SGD", lambda run: run.optimizer.state[run.model[2].weight].update(row=torch.ones(96))),
    ("RuntimeError: compact: expected zeros outside the mask of 4", lambda run: run.model[4].weight.data.add_(1.0)),
    ("got gradients of pruned weights (grad_mask, alpha > 0) on 2",
     lambda run: setattr(run.sparsifier.layers["2"], "alpha", torch.ones(()))),
    ("RuntimeError: compact: expected an attached optimizer, got none; call attach",
     lambda run: run.sparsifier.detach()),
    ("ValueError: compact: expected an optimizer attached without cache_dtype and defer",
     lambda run: (run.sparsifier.detach(), run.sparsifier.attach(run.optimizer, defer=True))),
]  # fmt: skip


@pytest.mark.parametrize(("words", "wrong"), REFUSED)
def test_what_cannot_be_packed_is_refused_by_name_and_nothing_has_changed(words: str, wrong: Any) -> None:
    run = start(**(wrong if isinstance(wrong, dict) else {})).train(1)
    if callable(wrong):
        wrong(run)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run.sparsifier.compact()
    assert words in f"{type(caught.value).__name__}: {caught.value}"
    assert_same({**run.model.state_dict()}, {**before})
    assert not any(layer.compacted for layer in run.sparsifier.layers.values())


def test_a_process_group_is_refused(request: Any) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    with pytest.raises(RuntimeError, match=r"single process.*DistributedDataParallel"):
        start().sparsifier.compact()
