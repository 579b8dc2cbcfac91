"""Forty and more architectures of transformers are sparsified, trained, saved and loaded without us."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers


def _breadth() -> ModuleType:
    spec = importlib.util.spec_from_file_location("breadth", Path(__file__).with_name("breadth.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules["breadth"] = module
    spec.loader.exec_module(module)
    return module


breadth = _breadth()
HERE = [architecture for architecture in breadth.ARCHITECTURES if hasattr(transformers, architecture.model)]
# What lies mostly in weights that are listed as staying dense, and the reason that says so.
BELOW = {
    "MixtralForCausalLM": "stacked weights of MixtralExperts",
    "Qwen2MoeForCausalLM": "stacked weights of Qwen2MoeExperts",
    "OlmoeForCausalLM": "stacked weights of OlmoeExperts",
}


@pytest.mark.parametrize("architecture", HERE, ids=lambda architecture: architecture.model)
def test_an_architecture_lives_a_sparse_life(architecture: object) -> None:
    life = breadth.live(architecture)
    assert life.difference == 0.0, "stock classes must compute what the sparse model did"
    assert abs(life.zeros / life.covered - 0.5) < 0.01
    if life.model in BELOW:
        assert BELOW[life.model] in life.reasons
    else:
        assert life.coverage >= 0.8, dict(life.reasons)


def test_the_sweep_is_as_broad_as_promised() -> None:
    assert len(HERE) >= 40 and len([each for each in HERE if each.model not in BELOW]) >= 35
