"""Layers that version 0.1 pickled: their attributes are today's objects, and what is made anew is gone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_runs import assert_same, gradients
from torch import nn

import tritonsparse as ts
from tritonsparse.layers.backend import Backend
from tritonsparse.layers.older import from_older
from tritonsparse.pattern import NM, Block, Unstructured

# What version 0.1 wrote beside what nn.Module and the view hold.
OLD: dict[str, Any] = {
    "block": None, "n_of_m": None, "backend_choice": "auto", "backend": "torch", "backend_reason": "auto: no GPU",
    "sparse_grad_input": False, "activation_density": None, "activation_scope": "batch", "activation_slack": 1.25,
    "remembers_cutoff": False, "activation_cutoff": None, "row_masks": [], "overflows": 0, "last_cutoff": None,
    "last_overflow": None, "w_hat": None, "w_hat_versions": (), "defer": True, "block_index": None, "grad_index": None,
    "input_index": None, "block_flags": None, "index_versions": (),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "attribute", "expected"),
    [
        ({}, "pattern", Unstructured()),
        ({"block": (16, 32)}, "pattern", Block(16, 32)),
        ({"n_of_m": NM(2, 4, transposable=True)}, "pattern", NM(2, 4, transposable=True)),
        ({}, "backend", Backend("auto", "torch", "auto: no GPU")),
        (
            {"backend_choice": "fused", "backend": "triton", "backend_reason": "narrow", "sparse_grad_input": True},
            "backend",
            Backend("fused", "triton", "narrow", True),
        ),
        ({}, "sparse_input", None),
        ({}, "topology", None),
        ({}, "cache", None),
    ],
)
def test_an_old_attribute_is_found_in_todays(changed: dict[str, Any], attribute: str, expected: Any) -> None:
    state = from_older({**OLD, "kind": "soft", "training": True, **changed})
    assert state[attribute] == expected
    assert state.keys() == {"kind", "training", "pattern", "backend", "sparse_input", "topology", "cache"}


def test_a_packed_input_keeps_what_the_method_wrote_and_counted() -> None:
    cutoff, rows = torch.ones(1), torch.ones(2, dtype=torch.bool)
    old = {"activation_density": 0.25, "activation_scope": "sample", "activation_slack": 1.5, "remembers_cutoff": True}
    old |= {"activation_cutoff": cutoff, "row_masks": [rows], "overflows": 3}
    sparse = from_older({**OLD, **old})["sparse_input"]
    assert (sparse.density, sparse.scope, sparse.slack, sparse.remembers) == (0.25, "sample", 1.5, True)
    assert sparse.cutoff is cutoff and sparse.row_masks == [rows] and sparse.overflows == 3
    assert sparse.last_cutoff is None and sparse.last_overflow is None


def test_a_layer_of_then_computes_as_the_one_of_today_and_todays_state_is_left_as_it_is() -> None:
    layer = nn.Linear(8, 4)
    ts.sparsify(layer, "static", sparsity=0.5)
    state: Any = layer.__getstate__()
    assert from_older(state) is state
    twin = copy.copy(layer)
    twin.__dict__ = {}
    dropped = ("pattern", "backend", "sparse_input", "topology", "cache")
    twin.__setstate__({key: value for key, value in state.items() if key not in dropped} | OLD)
    assert_same(gradients(twin, torch.ones(3, 8)), gradients(layer, torch.ones(3, 8)))
    assert repr(twin) == repr(layer)
