"""The one call: what its arguments may be, and that a refusal changes nothing."""

from __future__ import annotations

import doctest
import importlib
import logging
from typing import Any

import pytest
import torch
from small_runs import Build, Run
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import GMP, STR, AutoSparse

MASK = {"method": "gmp", "sparsity": 0.5}
REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "an unknown method": (
        {"method": "autosparce"}, ValueError,
        ("acdc, autosparse, dense, dsr, dst, gmp, mest, optg, powerprop, rigl, set, snfs", "str, swat", "topkast")),
    "a method class": ({"method": GMP}, TypeError, ("method name or object", "try one of")),
    "an unknown pattern": ({"pattern": "blocks:32"}, ValueError, ("'block:R'", "'blocks:32'", "correct the pattern")),
    "a 4:2 pattern": ({"pattern": "4:2"}, ValueError, ("'N:M' with N < M", "'4:2'")),
    "a pattern the method lacks": ({"pattern": "2:4"}, ValueError, ("'str'", "unstructured", "choose another")),
    "4:8 both ways": (
        MASK | {"pattern": "4:8:transposable"}, ValueError, ("'N:M:transposable' with M of at most 4", "'4:8:trans")),
    "an unknown back end": ({"backend": "cuda"}, ValueError, ("auto, torch, triton", "'cuda'")),
    "triton without a GPU": ({"backend": "triton"}, RuntimeError, ("a GPU", "use backend='auto' or 'torch'")),
    "2:4 products of others": (
        MASK | {"backend": "semi_structured"}, ValueError,
        ("'2:4' or '2:4:transposable' with backend='semi_structured'", "'unstr")),
    "2:4 products without a GPU": (
        MASK | {"pattern": "2:4", "backend": "semi_structured"}, RuntimeError,
        ("a GPU with 2:4 products", "operands are on cpu")),
    "sparsity for none": ({"method": "dense", "sparsity": 0.8}, ValueError, ("no sparsity= for method 'dense'",)),
    "distribution for a learned one": ({"distribution": "erk"}, ValueError, ("no distribution=", "leave it out")),
    "no sparsity for gmp": ({"method": "gmp"}, ValueError, ("sparsity=", "'gmp', sparsity=0.8")),
    "sparsity 1": (MASK | {"sparsity": 1.0}, ValueError, ("[0, 1)", "write 0.8 for 80 %")),
    "sparsity in per cent": (MASK | {"sparsity": 80}, ValueError, ("[0, 1)", "got 80;")),
    "sparsity below 0": (MASK | {"sparsity": -0.1}, ValueError, ("[0, 1)", "got -0.1;")),
    "sparsity NaN": (MASK | {"sparsity": float("nan")}, ValueError, ("[0, 1)", "got nan;")),
    "sparsity True": (MASK | {"sparsity": True}, ValueError, ("[0, 1)", "got True;")),
    "an unknown distribution": (MASK | {"distribution": "er"}, ValueError, ("uniform, erk", "'er'")),
    "a contradicted object": ({"method": GMP(sparsity=0.8), "sparsity": 0.9}, ValueError, ("0.8", "in one place")),
    "a keyword the object lacks": (
        {"method": STR(), "distribution": "erk"}, ValueError, ("no such field", "in one place")),
    "no total_steps": (MASK | {"total_steps": None}, ValueError, ("gmp: expected total_steps=", "pass total")),
    "no steps_per_epoch": ({"method": "autosparse"}, ValueError, ("autosparse: expected steps_per_epoch=",)),
    "total_steps 0": ({"total_steps": 0}, ValueError, ("total_steps", "at least 1", "got 0", "optimizer steps")),
    "a fraction of a step": ({"steps_per_epoch": 10.5}, ValueError, ("steps_per_epoch", "got 10.5")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_is_refused_with_the_remedy_and_nothing_changed(
    case: str, mlp: Build, refused: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, error, words = REFUSALS[case]
    model = mlp()
    with refused(model, error, "expected", "got" if error is not RuntimeError else "use backend=", *words):
        ts.sparsify(model, **{"method": "str", "total_steps": 10, **arguments})


def test_a_keyword_that_agrees_with_the_method_object_is_welcome(mlp: Build) -> None:
    sparsifier = ts.sparsify(mlp(), GMP(sparsity=0.8), sparsity=0.8, distribution="uniform", total_steps=10)
    assert sparsifier.method == GMP(sparsity=0.8)


def test_one_method_object_configures_two_models_that_share_nothing(mlp: Build) -> None:
    method = AutoSparse(alpha_schedule="constant")
    first, second = ts.sparsify(mlp(), method), ts.sparsify(mlp(), method)
    assert first.method == second.method == method
    assert first.method is not method and second.method is not method
    first.layers["0"].alpha.fill_(0.25)
    assert float(second.layers["0"].alpha) == 0.75


def test_the_summary_is_logged_in_one_line(mlp: Build, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tritonsparse"):
        ts.sparsify(mlp(), "str", exclude=["3"])
    # 128 weights of 128 + 16 + 64 + 4 parameters, and one threshold.
    assert [record.getMessage() for record in caplog.records] == [
        "tritonsparse: str on 1 layer, 128 weights (60.1% of the model); skipped: 1 excluded"
    ]


def test_a_lone_linear_layer_is_a_model_too() -> None:
    run = Run(nn.Linear(4, 4), "gmp", loss=lambda layer: layer(torch.randn(2, 4)).sum(), sparsity=0.5, total_steps=1)
    run.train(1)
    assert int((run.model.weight == 0).sum()) == 8
    again = ts.sparsify(nn.Linear(4, 4), "gmp", sparsity=0.5, total_steps=1, steps_per_epoch=3)
    again.load_state_dict(run.sparsifier.state_dict())
    assert torch.equal(again.layers[""].mask, run.model.mask)
    assert run.sparsifier.finalized_state_dict().keys() == {"weight", "bias"}


def test_the_doctest_runs() -> None:
    results = doctest.testmod(importlib.import_module("tritonsparse.api"))
    assert results.attempted > 0 and results.failed == 0
