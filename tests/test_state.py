"""The Sparsifier's own state: refused where it does not fit, carried by accelerate, and used up by finalize."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_runs import Build, Run, assert_same, squares
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import GMP, STR, AutoSparse

MASKED = GMP(sparsity=0.5, initial_sparsity=0.25)


def sparse(model: nn.Module, method: Any = MASKED, **changes: Any) -> ts.Sparsifier:
    return ts.sparsify(model, method, **{"total_steps": 10, "steps_per_epoch": 5, **changes})


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 9), *[nn.ReLU()] * 2, nn.Linear(9, 4))


ANOTHER = "sparsify the model with the arguments"
# What is loaded: the state of another Sparsifier, or ours with one entry set (or, by None, left out).
REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "method": (lambda build: sparse(build(), STR()), (ANOTHER, "method", "'gmp'", "'str'")),
    "configuration": (
        lambda build: sparse(build(), GMP(sparsity=0.6, initial_sparsity=0.25)), (ANOTHER, "gmp.", "0.6")),
    "layers": (lambda build: sparse(build(), exclude=["3"]), (ANOTHER, "layers", "'3'")),
    "total_steps": (lambda build: sparse(build(), total_steps=11), (ANOTHER, "total_steps", "10", "11")),
    "steps_per_epoch": (lambda build: sparse(build(), steps_per_epoch=4), (ANOTHER, "steps_per_epoch", "5", "4")),
    "shapes": (lambda build: sparse(wider()), (ANOTHER, "0.mask")),
    "version": (("format_version", 0), ()),
    "mask missing": (("tensors", "0.mask", None), ()),
    "kind without its tensor": (("kinds", "0", "soft"), ()),
    "unknown kind": (("kinds", "0", "fancy"), ()),
    "stray tensor": (("tensors", "7.mask", torch.ones(2, 2, dtype=torch.bool)), ()),
    "key missing": (("step", None), ()),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_of_another_run_and_a_damaged_one_are_refused_and_nothing_changed(mlp: Build, case: str) -> None:
    (change, words), sparsifier = REFUSED[case], sparse(mlp())
    before = sparsifier.state_dict()
    state: Any = change(mlp).state_dict() if callable(change) else copy.deepcopy(before)
    if not callable(change):
        *path, key, value = change
        inner = state[path[0]] if path else state
        inner.pop(key, None)
        inner |= {} if value is None else {key: value}
    with pytest.raises(ValueError) as caught:
        sparsifier.load_state_dict(state)
    assert [word for word in ("load_state_dict: expected", *words) if word not in str(caught.value)] == []
    assert_same(sparsifier.state_dict(), before)


def test_a_state_is_a_copy_that_training_does_not_change(mlp: Build) -> None:
    sparsifier = sparse(mlp())
    saved = sparsifier.state_dict()
    mask = saved["tensors"]["0.mask"].clone()
    for _ in range(2):
        sparsifier.layers["0"].mask.fill_(False)
        assert torch.equal(saved["tensors"]["0.mask"], mask)
        sparsifier.load_state_dict(saved)


def test_a_state_holds_neither_weights_nor_thresholds(mlp: Build) -> None:
    sparsifier = sparse(mlp(), AutoSparse(backward_density=0.5))
    assert sparsifier.state_dict()["tensors"].keys() == {"0.grad_mask", "0.alpha", "3.grad_mask", "3.alpha"}


def test_accelerate_saves_and_loads_it_with_everything_else(
    mlp: Build, accelerator: Accelerator, tmp_path: Path
) -> None:
    def begin(seed: int) -> tuple[nn.Module, Any, ts.Sparsifier]:
        sparsifier = sparse(mlp(seed), AutoSparse(threshold_init=-2.0, alpha_schedule="linear", backward_density=0.5))
        optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=0.05))
        model, optimizer = accelerator.prepare(sparsifier.model, optimizer)
        sparsifier.attach(optimizer)
        sparsifier.register(accelerator)
        return model, optimizer, sparsifier

    def train(model: nn.Module, optimizer: Any, sparsifier: ts.Sparsifier) -> None:
        for _ in range(4):
            torch.manual_seed(sparsifier.step)
            accelerator.backward(squares(model))
            optimizer.step()
            optimizer.zero_grad()

    first = begin(0)
    train(*first)
    accelerator.save_state(str(tmp_path))
    assert {"tritonsparse_state.json", "tritonsparse_state.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob("custom_checkpoint_*"))
    train(*first)
    accelerator.free_memory()
    accelerator._load_model_state_pre_hook.clear()
    accelerator._save_model_state_pre_hook.clear()
    second = begin(1)
    accelerator.load_state(str(tmp_path))
    assert second[2].step == 4
    train(*second)
    assert second[2].step == 8
    assert_same([second[0].state_dict(), second[2].state_dict()], [first[0].state_dict(), first[2].state_dict()])


def test_a_folder_without_a_state_is_named(mlp: Build, accelerator: Accelerator, tmp_path: Path) -> None:
    model = accelerator.prepare(mlp())
    accelerator.save_state(str(tmp_path))
    sparse(model).register(accelerator)
    with pytest.raises(FileNotFoundError, match="resume from a checkpoint of a sparse run"):
        accelerator.load_state(str(tmp_path))


def test_finalize_uses_the_sparsifier_up(mlp: Build, tmp_path: Path) -> None:
    run = Run(mlp(), "str")
    sparsifier, state = run.sparsifier, run.sparsifier.state_dict()
    sparsifier.finalize()
    arguments = {"load_state_dict": [state], "save_pretrained": [tmp_path], "attach": [run.optimizer]}
    for name in (
        *("finalize", "sparsity", "report", "state_dict", "load_state_dict", "finalized_state_dict", "param_groups"),
        *("trained_state_dict", "save_pretrained", "attach", "compact", "expand", "refresh"),
    ):
        call: Callable[..., Any] = getattr(sparsifier, name)
        with pytest.raises(RuntimeError, match=f"{name}: expected a live Sparsifier.*sparsify the model again"):
            call(*arguments.get(name, []))
    run.optimizer.step()  # the hooks are gone: nothing happens
    assert sparsifier.step == 0


def test_finalize_warns_where_there_is_nothing_to_bake_in(mlp: Build) -> None:
    with pytest.warns(UserWarning, match="every layer dense under method 'str'"):
        sparse(mlp(), STR(threshold_init=-float("inf"))).finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse(mlp(), "dense").finalize()
        sparse(mlp()).finalize()
