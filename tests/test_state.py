"""The Sparsifier's own state: refused where it does not fit, carried by accelerate, and used up by finalize."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import GMP, STR, AutoSparse

Build = Callable[..., Any]

MASKED = GMP(sparsity=0.5, initial_sparsity=0.25)


def sparse(model: nn.Module, method: Any = MASKED, **changes: Any) -> ts.Sparsifier:
    return ts.sparsify(model, method, **{"total_steps": 10, "steps_per_epoch": 5, **changes})


def clone(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "kinds": dict(state["kinds"]), "tensors": dict(state["tensors"]), "config": dict(state["config"])}


def spoil(state: dict[str, Any], *path: str, value: Any = None, drop: bool = False) -> dict[str, Any]:
    state = clone(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return state


def assert_refused(sparsifier: ts.Sparsifier, state: dict[str, Any], *words: str) -> None:
    before = sparsifier.state_dict()
    with pytest.raises(ValueError) as caught:
        sparsifier.load_state_dict(state)
    text = str(caught.value)
    assert [word for word in ("load_state_dict: expected", *words) if word not in text] == [], text
    after = sparsifier.state_dict()
    left, right = before.pop("tensors"), after.pop("tensors")
    assert before == after and left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda build: sparse(build(), STR()), ("method", "'gmp'", "'str'")),
        (lambda build: sparse(build(), GMP(sparsity=0.6, initial_sparsity=0.25)), ("gmp.", "0.6")),
        (lambda build: sparse(build(), exclude=["3"]), ("layers", "'3'")),
        (lambda build: sparse(build(), total_steps=11), ("total_steps", "10", "11")),
        (lambda build: sparse(build(), steps_per_epoch=4), ("steps_per_epoch", "5", "4")),
        (lambda build: sparse(nn.Sequential(nn.Linear(8, 9), *[nn.ReLU()] * 2, nn.Linear(9, 4))), ("0.mask",)),
    ],
    ids=["method", "configuration", "layers", "total_steps", "steps_per_epoch", "shapes"],
)
def test_a_state_of_another_run_is_refused_and_nothing_changed(mlp: Build, other: Any, words: tuple[str, ...]) -> None:
    assert_refused(sparse(mlp()), other(mlp).state_dict(), "sparsify the model with the arguments", *words)


@pytest.mark.parametrize(
    "damage",
    [
        {"path": ("format_version",), "value": 0},
        {"path": ("tensors", "0.mask"), "drop": True},
        {"path": ("kinds", "0"), "value": "soft"},
        {"path": ("kinds", "0"), "value": "fancy"},
        {"path": ("tensors", "7.mask"), "value": torch.ones(2, 2, dtype=torch.bool)},
        {"path": ("step",), "drop": True},
    ],
    ids=["version", "mask missing", "kind without its tensor", "unknown kind", "stray tensor", "key missing"],
)
def test_a_damaged_state_is_refused_and_nothing_changed(mlp: Build, damage: dict[str, Any]) -> None:
    sparsifier = sparse(mlp())
    assert_refused(sparsifier, spoil(sparsifier.state_dict(), *damage.pop("path"), **damage))


def test_a_state_is_a_copy_that_training_does_not_change(mlp: Build) -> None:
    sparsifier = sparse(mlp())
    saved = sparsifier.state_dict()
    mask = saved["tensors"]["0.mask"].clone()
    sparsifier.layers["0"].mask.fill_(False)
    assert torch.equal(saved["tensors"]["0.mask"], mask)
    sparsifier.load_state_dict(saved)
    sparsifier.layers["0"].mask.fill_(False)
    assert torch.equal(saved["tensors"]["0.mask"], mask)


def test_a_state_holds_neither_weights_nor_thresholds(mlp: Build) -> None:
    sparsifier = sparse(mlp(), AutoSparse(backward_density=0.5))
    assert sparsifier.state_dict()["tensors"].keys() == {"0.grad_mask", "0.alpha", "3.grad_mask", "3.alpha"}


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerate_saves_and_loads_it_with_everything_else(
    mlp: Build, accelerator: Accelerator, tmp_path: Path
) -> None:
    def begin(seed: int) -> tuple[nn.Module, Any, ts.Sparsifier]:
        model = mlp(seed).eval()
        sparsifier = sparse(model, AutoSparse(threshold_init=-2.0, alpha_schedule="linear", backward_density=0.5))
        optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=0.05))
        model, optimizer = accelerator.prepare(model, optimizer)
        sparsifier.attach(optimizer)
        sparsifier.register(accelerator)
        return model, optimizer, sparsifier

    def train(model: nn.Module, optimizer: Any, sparsifier: ts.Sparsifier) -> None:
        for _ in range(4):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(sparsifier.step))
            accelerator.backward(model(x).square().mean())
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
    assert second[2].step == first[2].step == 8
    for left, right in ((first[0].state_dict(), second[0].state_dict()),
                        (first[2].state_dict()["tensors"], second[2].state_dict()["tensors"])):  # fmt: skip
        assert all(torch.equal(left[key], right[key]) for key in left | right)


def test_a_folder_without_a_state_is_named(mlp: Build, accelerator: Accelerator, tmp_path: Path) -> None:
    model = accelerator.prepare(mlp())
    accelerator.save_state(str(tmp_path))
    sparse(model).register(accelerator)
    with pytest.raises(FileNotFoundError, match="resume from a checkpoint of a sparse run"):
        accelerator.load_state(str(tmp_path))


def test_finalize_uses_the_sparsifier_up(mlp: Build, tmp_path: Path) -> None:
    sparsifier = sparse(mlp(), STR())
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    sparsifier.attach(optimizer)
    state = sparsifier.state_dict()
    sparsifier.finalize()
    calls: dict[str, Callable[[], Any]] = {
        "finalize": sparsifier.finalize,
        "sparsity": sparsifier.sparsity,
        "report": sparsifier.report,
        "state_dict": sparsifier.state_dict,
        "load_state_dict": lambda: sparsifier.load_state_dict(state),
        "finalized_state_dict": sparsifier.finalized_state_dict,
        "save_pretrained": lambda: sparsifier.save_pretrained(tmp_path),
        "attach": lambda: sparsifier.attach(optimizer),
        "param_groups": sparsifier.param_groups,
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: expected a live Sparsifier.*sparsify the model again"):
            call()
    optimizer.step()  # the hooks are gone: nothing happens
    assert sparsifier.step == 0


def test_finalize_warns_where_there_is_nothing_to_bake_in(mlp: Build) -> None:
    with pytest.warns(UserWarning, match="every layer dense under method 'str'"):
        sparse(mlp(), STR(threshold_init=-float("inf"))).finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse(mlp(), "dense").finalize()
        sparse(mlp()).finalize()
