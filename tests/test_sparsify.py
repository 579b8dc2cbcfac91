"""The one call: what its arguments may be, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import doctest
import importlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import GMP, STR, AutoSparse

Build = Callable[..., Any]

REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "an unknown method": (
        {"method": "autosparce"},
        ValueError,
        (
            "acdc, autosparse, dense, dsr, dst, gmp, mest, optg, powerprop, rigl, set, snfs",
            "str, swat, topkast",
            "choose",
        ),
    ),
    "a method class": ({"method": GMP}, TypeError, ("method name or object", "try one of")),
    "an unknown pattern": ({"pattern": "blocks:32"}, ValueError, ("'block:R'", "'blocks:32'", "correct the pattern")),
    "a 4:2 pattern": ({"pattern": "4:2"}, ValueError, ("'N:M' with N < M", "'4:2'")),
    "a pattern the method lacks": ({"pattern": "2:4"}, ValueError, ("'str'", "unstructured", "choose another")),
    "an unknown back end": ({"backend": "cuda"}, ValueError, ("auto, torch, triton", "'cuda'")),
    "sparsity for none": ({"method": "dense", "sparsity": 0.8}, ValueError, ("no sparsity= for method 'dense'",)),
    "distribution for a learned one": ({"distribution": "erk"}, ValueError, ("no distribution=", "leave it out")),
    "no sparsity for gmp": ({"method": "gmp"}, ValueError, ("sparsity=", "'gmp', sparsity=0.8")),
    "sparsity 1": ({"method": "gmp", "sparsity": 1.0}, ValueError, ("[0, 1)", "write 0.8 for 80 %")),
    "sparsity in per cent": ({"method": "gmp", "sparsity": 80}, ValueError, ("[0, 1)", "got 80;")),
    "sparsity below 0": ({"method": "gmp", "sparsity": -0.1}, ValueError, ("[0, 1)", "got -0.1;")),
    "sparsity NaN": ({"method": "gmp", "sparsity": float("nan")}, ValueError, ("[0, 1)", "got nan;")),
    "sparsity True": ({"method": "gmp", "sparsity": True}, ValueError, ("[0, 1)", "got True;")),
    "an unknown distribution": (
        {"method": "gmp", "sparsity": 0.5, "distribution": "er"},
        ValueError,
        ("uniform, erk", "'er'"),
    ),
    "a contradicted object": ({"method": GMP(sparsity=0.8), "sparsity": 0.9}, ValueError, ("0.8", "in one place")),
    "a keyword the object lacks": (
        {"method": STR(), "distribution": "erk"},
        ValueError,
        ("no such field", "in one place"),
    ),
    "no total_steps": ({"method": "gmp", "sparsity": 0.5}, ValueError, ("gmp: expected total_steps=", "pass total")),
    "no steps_per_epoch": (
        {"method": "autosparse", "total_steps": 10},
        ValueError,
        ("autosparse: expected steps_per_epoch=",),
    ),
    "total_steps 0": ({"total_steps": 0}, ValueError, ("total_steps", "at least 1", "got 0", "optimizer steps")),
    "a fraction of a step": ({"steps_per_epoch": 10.5}, ValueError, ("steps_per_epoch", "got 10.5")),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_is_refused_with_the_remedy_and_nothing_changed(case: str, mlp: Build, refused: Build) -> None:
    arguments, error, words = REFUSALS[case]
    model = mlp()
    with refused(model, error, "expected", "got", *words):
        ts.sparsify(model, **{"method": "str", **arguments})


def test_triton_without_a_gpu_is_an_error_and_not_a_fallback(
    mlp: Build, refused: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = mlp()
    with refused(model, RuntimeError, "expected a GPU", "use backend='auto' or 'torch'"):
        ts.sparsify(model, "str", backend="triton")


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
    layer = nn.Linear(4, 4)
    sparsifier = ts.sparsify(layer, "gmp", sparsity=0.5, total_steps=1)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    sparsifier.attach(optimizer)
    layer(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert int((layer.weight == 0).sum()) == 8
    again = ts.sparsify(nn.Linear(4, 4), "gmp", sparsity=0.5, total_steps=1)
    again.load_state_dict(sparsifier.state_dict())
    assert torch.equal(again.layers[""].mask, layer.mask)
    assert sparsifier.finalized_state_dict().keys() == {"weight", "bias"}


def test_a_copy_of_the_model_is_independent_of_it(mlp: Build) -> None:
    model = mlp()
    sparsifier = ts.sparsify(model, AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="constant"))
    twin, x = copy.deepcopy(model).eval(), torch.randn(3, 8)
    before = twin(x)
    sparsifier.layers["0"].alpha.zero_()
    sparsifier.layers["0"].threshold.data.fill_(9.0)
    sparsifier.finalize()
    assert torch.equal(twin(x), before)
    assert float(twin[0].alpha) == 0.5 and twin[0].threshold.item() == -2.0


def test_the_doctest_runs() -> None:
    results = doctest.testmod(importlib.import_module("tritonsparse.api"))
    assert results.attempted > 0 and results.failed == 0


def test_2_4_products_are_refused_by_name_where_there_are_none(mlp: Build) -> None:
    model = mlp()
    with pytest.raises(ValueError, match="'2:4' or '2:4:transposable' with backend='semi_structured', got 'unstr"):
        ts.sparsify(model, "gmp", sparsity=0.5, total_steps=5, backend="semi_structured")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"expected a GPU with 2:4 products.*operands are on cpu"):
            ts.sparsify(model, "gmp", sparsity=0.5, total_steps=5, pattern="2:4", backend="semi_structured")
    with pytest.raises(ValueError, match=r"'N:M:transposable' with M of at most 4 .* got '4:8:trans"):
        ts.sparsify(model, "gmp", sparsity=0.5, total_steps=5, pattern="4:8:transposable")
    assert type(model[0]) is nn.Linear
