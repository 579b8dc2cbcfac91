"""Training on the kept blocks alone: the same run as in dense storage, in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.layers.compact import CompactLayer
from tritonsparse.methods import ACDC, DSR, GMP, MEST, SET, SNFS, Phases, RigL, Static

PHASES = Phases([(0, "dense"), (2, "sparse"), (4, "dense"), (5, "sparse")], 8)
METHODS = {
    "static": Static(sparsity=0.7),
    "rigl": RigL(sparsity=0.7, update_every=4),
    "set": SET(sparsity=0.7, update_every=4),
    "dsr": DSR(sparsity=0.7, update_every=3),
    "mest": MEST(sparsity=0.7, update_every=4, mutation=(0.1, 0.0), softness=(0.1, 0.0), stages=(0.5,)),
    "snfs": SNFS(sparsity=0.7, update_every=3, stop_at=0.5),
    "acdc": ACDC(sparsity=0.7, phases=PHASES),
    "gmp": GMP(sparsity=0.7, update_every=2, end=0.4),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups),
    "adamw": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
}
STEPS = 16
# A sum of 96 products, the longest in these models, in float32: another order moves it by this much of its norm.
ROUNDING = 96 * 2.0**-24


def linears() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), Conv1D(64, 96), nn.GELU(), nn.Linear(64, 32))


def untransposed() -> nn.Module:
    """Weights that lie in memory as their packed form is multiplied: the same kernel sees the same layout."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32))


def assert_to_rounding(actual: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    """The weight of a Conv1D lies transposed and its packed form does not: CPU libraries may add in another order."""
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (16, 2, 2)), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1, stride=2),
        nn.Flatten(),
    )  # fmt: skip


class Run:
    """A short training run: its model, optimizer and Sparsifier, and after which steps layers were packed."""

    def __init__(
        self,
        method: Any,
        optimizer: Callable[[Any], Optimizer],
        build: Callable[[], nn.Module] = linears,
        **options: Any,
    ) -> None:
        self.model = build()
        steps = {"total_steps": STEPS, "steps_per_epoch": 2}
        self.sparsifier = ts.sparsify(self.model, method, **({"pattern": "block:16"} | steps | options))
        self.optimizer = optimizer(self.sparsifier.param_groups(lr=0.01, weight_decay=0.1))
        self.sparsifier.attach(self.optimizer)
        self.packed: list[bool] = []
        self.losses: list[Tensor] = []

    def train(self, steps: int = STEPS) -> Run:
        for _ in range(steps):
            torch.manual_seed(self.sparsifier.step)
            loss = self.model(torch.randn(8, 64)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            # The last graph lives while the next is built, as in most training loops.
            self.losses.append(loss)
            self.packed.append(any(layer.compacted for layer in self.sparsifier.layers.values()))
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimizer state and masks."""
        found = dict(self.model.state_dict())
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name}:{key}"] = torch.as_tensor(value)
        return found | self.sparsifier.state_dict()["tensors"]


def pair(*arguments: Any, **options: Any) -> tuple[Run, Run]:
    """The same run in dense storage and on packed blocks."""
    dense, packed = Run(*arguments, **options).train(), Run(*arguments, **options)
    packed.sparsifier.compact()
    packed.train()
    packed.sparsifier.expand()
    return dense, packed


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [*((method, "adamw") for method in METHODS), ("rigl", "sgd"), ("acdc", "sgd"), ("rigl", "adam"), ("acdc", "adam")],
)
def test_every_bit_is_that_of_the_dense_storage(method: str, optimizer: str) -> None:
    dense, packed = pair(METHODS[method], OPTIMIZERS[optimizer], untransposed)
    assert torch.equal(torch.stack(dense.losses), torch.stack(packed.losses))
    ours, theirs = packed.tensors(), dense.tensors()
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert any(packed.packed) and not any(dense.packed)


@pytest.mark.parametrize("method", ["static", "rigl", "acdc"])
def test_a_transposed_weight_trains_as_in_dense_storage_to_rounding(method: str) -> None:
    dense, packed = pair(METHODS[method], OPTIMIZERS["sgd"])
    ours, theirs = packed.tensors(), dense.tensors()
    assert ours.keys() == theirs.keys() and any(packed.packed)
    for key, value in theirs.items():
        if value.dtype == torch.bool:
            assert torch.equal(ours[key], value), key
        else:
            assert_to_rounding(ours[key], value, STEPS * ROUNDING)


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_train_as_in_dense_storage(channels_last: bool) -> None:
    def build() -> nn.Module:
        return convolutions().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    dense, packed = pair(METHODS["rigl"], OPTIMIZERS["sgd"], build)
    ours, theirs = packed.tensors(), dense.tensors()
    for key, value in theirs.items():
        # A convolution library may add in another order where a weight lies elsewhere in memory.
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6, msg=key)
    for a, b in zip(packed.model.parameters(), dense.model.parameters(), strict=True):
        assert a.stride() == b.stride()
    assert any(packed.packed)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("static", "1111111111111111"),
        # Dense gradients at steps 4, 8 and (until 0.75 of 16) no more: the step before leaves layers dense.
        ("rigl", "1110111011111111"),
        # Sparse from step 4 to 8 and from 10: packed after the first step of each, until after the last.
        ("acdc", "0000111000111111"),
        # The last update is after step 6 (0.4 of 16); after step 7 nothing changes any more.
        ("gmp", "0000001111111111"),
    ],
)
def test_layers_are_packed_exactly_while_the_topology_stays(method: str, expected: str) -> None:
    _, packed = pair(METHODS[method], OPTIMIZERS["sgd"])
    assert "".join(str(int(each)) for each in packed.packed) == expected


def bytes_of(run: Run) -> dict[str, int]:
    weights = [layer.weight for layer in run.sparsifier.layers.values()]
    state = [value for weight in weights for value in run.optimizer.state[weight].values() if value.dim()]
    views = [getattr(layer, name, None) for layer in run.sparsifier.layers.values() for name in ("mask", "index")]
    return {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(weight.grad.nbytes for weight in weights if weight.grad is not None),
        "state": sum(value.nbytes for value in state),
        "views": sum(view.nbytes for view in views if view is not None),
    }


def test_weights_gradients_and_state_take_the_memory_of_the_kept_blocks() -> None:
    run = Run(Static(sparsity=0.75), OPTIMIZERS["adamw"]).train(1)
    run.model(torch.randn(4, 64)).sum().backward()
    before = bytes_of(run)
    assert before == {"weights": 57_344, "gradients": 57_344, "state": 3 * 57_344, "views": 14_336}
    run.sparsifier.compact()
    packed = bytes_of(run)
    # 6 of 24, 6 of 24 and 2 of 8 blocks of 16 x 16; an index has R + C and 3 R C entries and a few more, of 4 bytes.
    assert packed | {"views": 0} == {"weights": 14_336, "gradients": 14_336, "state": 3 * 14_336, "views": 0}
    assert packed["views"] < 1_000
    assert not any(tensor.untyped_storage().nbytes() > tensor.nbytes for tensor in run.model.parameters())
    run.sparsifier.expand()
    assert bytes_of(run) == before


def test_parameters_stay_the_objects_that_others_hold() -> None:
    run = Run(METHODS["static"], OPTIMIZERS["adamw"])
    held = list(run.model.parameters())
    run.sparsifier.compact()
    run.train(2)
    assert all(a is b for a, b in zip(held, run.model.parameters(), strict=True))
    run.model(torch.randn(4, 64)).sum().backward()
    nn.utils.clip_grad_norm_(held, 1e-3)
    assert max(float(weight.grad.norm()) for weight in held if weight.grad is not None) <= 1e-3
    run.sparsifier.expand()
    assert all(a is b for a, b in zip(held, run.model.parameters(), strict=True))


def test_gradients_of_accumulated_batches_survive_packing_and_unpacking() -> None:
    run = Run(METHODS["static"], OPTIMIZERS["sgd"]).train(1)
    x, y = torch.randn(2, 4, 64)
    run.model(x).sum().backward()
    run.sparsifier.compact()
    run.model(y).sum().backward()
    run.sparsifier.expand()
    grads = [parameter.grad.clone() for parameter in run.model.parameters() if parameter.grad is not None]
    run.optimizer.zero_grad()
    (run.model(x).sum() + run.model(y).sum()).backward()
    for grad, parameter in zip(grads, run.model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_packed_layers_report_copy_and_evaluate_as_dense_ones() -> None:
    run = Run(METHODS["static"], OPTIMIZERS["adamw"]).train(2)
    x = torch.randn(4, 64)
    before = run.model(x), run.sparsifier.sparsity(), str(run.sparsifier.report()), run.sparsifier.summary()
    weights = {key: value.clone() for key, value in run.sparsifier.finalized_state_dict().items()}
    run.sparsifier.compact()
    assert all(isinstance(layer, CompactLayer) for layer in run.sparsifier.layers.values())
    after = run.model(x), run.sparsifier.sparsity(), str(run.sparsifier.report()), run.sparsifier.summary()
    assert_to_rounding(after[0], before[0])
    assert before[1:] == after[1:]
    finalized = run.sparsifier.finalized_state_dict()
    assert finalized.keys() == weights.keys()
    assert all(torch.equal(finalized[key], weights[key]) for key in weights)
    assert torch.equal(copy.deepcopy(run.model)(x), after[0])
    stock = linears()
    stock.load_state_dict(run.sparsifier.finalize().state_dict())
    assert_to_rounding(stock(x), after[0])
    assert type(run.model[0]) is nn.Linear


def test_the_back_end_is_that_of_the_packed_products_and_afterwards_what_it_was(monkeypatch: Any) -> None:
    run = Run(METHODS["static"], OPTIMIZERS["sgd"])
    layer = run.sparsifier.layers["0"]
    layer.backend = replace(layer.backend, name="fused", reason="decided in between")
    # As on a GPU, where `auto` takes the kernels.
    monkeypatch.setattr("tritonsparse.layers.compact.packed_block_backend", lambda choice, values: "triton")
    run.sparsifier.compact()
    assert layer.backend.name == "block"
    report = run.sparsifier.report()
    assert report.exploitable == pytest.approx(report.sparsity)
    run.sparsifier.expand()
    assert (layer.backend.name, layer.backend.reason) == ("fused", "decided in between")


def test_a_compiled_model_follows_its_layers_into_packed_form_and_back() -> None:
    run = Run(METHODS["static"], OPTIMIZERS["adamw"]).train(1)
    compiled = torch.compile(run.model, backend="aot_eager")
    x = torch.randn(4, 64)
    outputs = [compiled(x)]
    run.sparsifier.compact()
    outputs.append(compiled(x))
    outputs[1].sum().backward()
    assert run.model[0].weight.grad.shape == run.model[0].weight.shape == (7, 16, 16)
    run.sparsifier.expand()
    outputs.append(compiled(x))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_under_autocast_it_trains_to_the_rounding_of_the_low_precision() -> None:
    runs = []
    for packs in (False, True):
        run = Run(METHODS["rigl"], OPTIMIZERS["adamw"])
        if packs:
            run.sparsifier.compact()
        with torch.autocast("cpu", torch.bfloat16):
            run.train(4)
        assert run.losses[0].dtype == torch.bfloat16 or run.losses[0].dtype == torch.float32
        runs.append(run)
    dense, packed = (torch.stack(run.losses).double() for run in runs)
    assert (dense - packed).norm() <= 1e-2 * dense.norm()


def test_what_is_saved_meanwhile_is_the_checkpoint_of_the_dense_storage() -> None:
    straight, stopped = Run(METHODS["rigl"], OPTIMIZERS["adamw"]), Run(METHODS["rigl"], OPTIMIZERS["adamw"])
    for run, steps in ((straight, STEPS), (stopped, 6)):
        run.sparsifier.compact()
        run.train(steps)
    parts = [stopped.sparsifier, stopped.model, stopped.optimizer]
    saved = copy.deepcopy([part.state_dict() for part in parts])
    assert all(layer.compacted for layer in stopped.sparsifier.layers.values())
    stopped.sparsifier.expand()
    of_dense = [part.state_dict() for part in parts]
    for ours, theirs in ((saved[0]["tensors"], of_dense[0]["tensors"]), (saved[1], of_dense[1])):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert saved[2]["param_groups"] == of_dense[2]["param_groups"]
    for key, state in of_dense[2]["state"].items():
        assert all(torch.equal(torch.as_tensor(saved[2]["state"][key][name]), value) for name, value in state.items())

    resumed = Run(METHODS["rigl"], OPTIMIZERS["adamw"])
    for part, state in zip((resumed.sparsifier, resumed.model, resumed.optimizer), saved, strict=True):
        part.load_state_dict(state)
    resumed.sparsifier.compact()
    resumed.train(STEPS - 6)
    ours, theirs = resumed.tensors(), straight.tensors()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_the_sidecar_of_packed_weights_goes_on_as_that_of_dense_ones(
    gpt2: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = gpt2()
    sparsifier = ts.sparsify(model, METHODS["static"], pattern="block:8", total_steps=STEPS)
    sparsifier.attach(torch.optim.SGD(sparsifier.param_groups(lr=0.1)))
    sparsifier.compact()
    sparsifier.save_pretrained(tmp_path)
    again, loaded = ts.load(tmp_path, GPT2LMHeadModel)
    ours, theirs = again.state_dict(), sparsifier.finalize().state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and loaded.sparsity() > 0.6


def test_loading_into_packed_weights_is_refused() -> None:
    run = Run(METHODS["static"], OPTIMIZERS["sgd"])
    saved = run.sparsifier.state_dict(), run.optimizer.state_dict(), run.model.state_dict()
    run.sparsifier.compact()
    for part, state in zip((run.sparsifier, run.optimizer), saved, strict=False):
        with pytest.raises(RuntimeError, match=r"load_state_dict: expected weights in dense storage.*call expand\(\)"):
            part.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight"):
        run.model.load_state_dict(saved[2])
    run.sparsifier.expand()
    run.optimizer.load_state_dict(saved[1])


class Factored(torch.optim.SGD):
    """Stands for an optimizer that is not elementwise."""


def test_what_cannot_be_packed_is_refused_by_name_and_nothing_has_changed() -> None:
    def refused(error: type[Exception], words: str, run: Run) -> None:
        before = {key: value.clone() for key, value in run.model.state_dict().items()}
        with pytest.raises(error, match=words):
            run.sparsifier.compact()
        after = run.model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert not any(layer.compacted for layer in run.sparsifier.layers.values())

    sgd = OPTIMIZERS["sgd"]
    refused(ValueError, "pattern of blocks, got 'unstructured'", Run(METHODS["static"], sgd, pattern="unstructured"))
    refused(ValueError, "whose topology stays for a while, got 'dense'", Run("dense", sgd))
    refused(ValueError, "whose topology stays for a while, got 'rigl'", Run(RigL(sparsity=0.0), sgd))
    refused(ValueError, "update is elementwise.*got Factored", Run(METHODS["static"], lambda g: Factored(g)))
    run = Run(METHODS["static"], sgd).train(1)
    weight = run.model[2].weight
    run.optimizer.state[weight]["row"] = torch.ones(96)
    refused(ValueError, r"got 'row' of \[96\] in SGD", run)
    run = Run(METHODS["static"], sgd).train(1)
    run.model[4].weight.data += 1.0
    refused(RuntimeError, "zeros outside the mask of 4.*take a step first", run)
    run = Run(METHODS["static"], sgd)
    run.sparsifier.layers["2"].alpha = torch.ones(())
    refused(ValueError, r"gradients of pruned weights \(grad_mask, alpha > 0\) on 2", run)
    run = Run(METHODS["static"], sgd)
    run.sparsifier.detach()
    refused(RuntimeError, r"attached optimizer, got none; call attach", run)
    run.sparsifier.attach(run.optimizer, defer=True)
    refused(ValueError, "without cache_dtype and defer", run)


def test_a_process_group_is_refused(tmp_path: Any) -> None:
    run = Run(METHODS["static"], OPTIMIZERS["sgd"])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match=r"single process.*DistributedDataParallel"):
            run.sparsifier.compact()
    finally:
        dist.destroy_process_group()


def test_moving_a_packed_model_moves_all_of_it() -> None:
    run = Run(METHODS["static"], OPTIMIZERS["sgd"])
    run.sparsifier.compact()
    moved = copy.deepcopy(run.model).to("meta")
    assert {layer.index.device.type for layer in moved if isinstance(layer, CompactLayer)} == {"meta"}
    x = torch.randn(4, 64)
    torch.testing.assert_close(run.model.double()(x.double()).float(), run.model.float()(x))
