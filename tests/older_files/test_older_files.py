"""Files that the package wrote at commit 2a1f126 load today, give what they gave, and train on as they did.

`make_files.py` made them with the package of that commit. Whoever changes what is written keeps reading these.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import tritonsparse as ts
from tritonsparse.train import language_modeling

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("make_files", HERE / "make_files.py")
assert _spec is not None and _spec.loader is not None
make_files = importlib.util.module_from_spec(_spec)
sys.modules["make_files"] = make_files  # its dataclass looks its module up
_spec.loader.exec_module(make_files)

# The files come from one CPU under one version of torch. There the numbers are equal bit for bit. Elsewhere sums of
# products are added in another order, and exp and tanh are approximated otherwise: some 1e-7 of the largest term, which
# a few steps carry on. Emulated older CPUs stayed well within this; one step moves weights by 1e-3 to 1e-1.
RTOL, ATOL = 1e-5, 2e-6


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): each for key, each in tensors.items() if key.startswith(f"{name}/")}


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Floating-point numbers to rounding; masks, counts and steps exactly."""
    assert expected and expected.keys() <= actual.keys()
    for key, wanted in expected.items():
        rtol, atol = (RTOL, ATOL) if wanted.is_floating_point() else (0.0, 0.0)
        with torch.no_grad():
            torch.testing.assert_close(
                actual[key], wanted, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
            )


def assert_goes_on(model: nn.Module, sparsifier: ts.Sparsifier, optimizer: Any, expected: Mapping[str, Tensor]) -> None:
    found = make_files.go_on(model, sparsifier, optimizer, expected["batches"])
    assert_equal(found["saved"], part(expected, "saved"))
    assert_equal({"losses": found["losses"]}, {"losses": expected["losses"]})
    assert_equal(found["reached"], part(expected, "reached"))


@pytest.mark.parametrize("name", make_files.STATES)
def test_a_state_trains_on_as_it_did(name: str) -> None:
    case = make_files.STATES[name]
    saved = torch.load(HERE / "states" / f"{name}.pt", weights_only=True)
    model, sparsifier = make_files.begin(case)
    optimizer = make_files.attach(case, sparsifier)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    sparsifier.load_state_dict(saved["sparsifier"])
    assert_goes_on(model, sparsifier, optimizer, load_file(HERE / "states" / f"{name}.safetensors"))


AUTO_CLASSES = {"bert_autosparse": AutoModelForMaskedLM, "gpt2_topkast": AutoModelForCausalLM}


@pytest.mark.parametrize("name", make_files.PRETRAINED)
def test_a_saved_model_is_an_ordinary_checkpoint(name: str) -> None:
    expected = load_file(HERE / "pretrained" / f"{name}.safetensors")
    model = AUTO_CLASSES[name].from_pretrained(HERE / "pretrained" / name).eval()
    outputs, _ = make_files.outputs_and_loss(model, expected["batches"][0])
    assert_equal({"outputs": outputs}, {"outputs": expected["saved/outputs"]})


@pytest.mark.parametrize("name", make_files.PRETRAINED)
def test_a_saved_model_trains_on_from_its_sidecar(name: str) -> None:
    model, sparsifier = ts.load(HERE / "pretrained" / name, AUTO_CLASSES[name])
    case = make_files.PRETRAINED[name]
    assert sparsifier.method == ts.methods.METHODS[case.method](**case.fields)
    optimizer = make_files.attach(case, sparsifier)
    assert_goes_on(model, sparsifier, optimizer, load_file(HERE / "pretrained" / f"{name}.safetensors"))


@pytest.mark.parametrize("name", make_files.BSR)
def test_a_model_of_packed_blocks_loads_and_trains(name: str) -> None:
    expected = load_file(HERE / "bsr" / f"{name}.safetensors")
    model = ts.load_bsr(HERE / "bsr" / name, AutoModelForCausalLM if name == "gpt2" else make_files.pixels())
    found = make_files.outputs_around_a_step(model, expected["batch"])
    assert_equal(found, part(expected, "expected"))


@pytest.mark.parametrize("name", make_files.PICKLED)
def test_a_pickled_model_gives_the_same_outputs_and_gradients(name: str) -> None:
    expected = load_file(HERE / "pickled" / f"{name}.safetensors")
    model = torch.load(HERE / "pickled" / f"{name}.pt", weights_only=False)
    assert_equal(make_files.outputs_and_gradients(model, expected["batch"]), part(expected, "expected"))


# What a run's record says of the machine and of the clock, and in words.
OF_THE_RUN = ("environment", "training_seconds", "tokens_per_second", "perplexity_line", "backend", "backend_reason")


def assert_holds(actual: Any, expected: Any, path: str = "") -> None:
    """All that a JSON document says is in another, numbers to rounding; keys of `OF_THE_RUN` with any value."""
    if isinstance(expected, dict):
        assert expected.keys() <= actual.keys(), path
        for key, wanted in expected.items():
            if key not in OF_THE_RUN:
                assert_holds(actual[key], wanted, f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), path
        for each, wanted in zip(actual, expected, strict=True):
            assert_holds(each, wanted, f"{path}[]")
    else:
        assert actual == (pytest.approx(expected, rel=RTOL) if isinstance(expected, float) else expected), path


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps one state a process, which would refuse another run's settings; the files are a CPU's."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    reset()


def test_a_run_of_the_program_goes_on_and_reports_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> None:
    program, run = HERE / "program", tmp_path / "run"
    shutil.copytree(program, tmp_path, dirs_exist_ok=True)
    run.mkdir()
    (tmp_path / "step_7").rename(run / "step_7")
    monkeypatch.chdir(tmp_path)
    assert language_modeling.main([*make_files.PROGRAM, "--resume_from_checkpoint=latest"]) == 0
    before, after = (json.loads((each / "all_results.json").read_text("utf-8")) for each in (program, run))
    assert_holds(after, before)
    assert before["environment"].keys() <= after["environment"].keys()
    # It went on, and did not start again: what came before the checkpoint is the old record, with its speed.
    assert [row["step"] for row in before["history"][:2]] == [4, 7]
    assert after["history"][:2] == before["history"][:2]
    assert_equal(load_file(run / "model.safetensors"), load_file(program / "model.safetensors"))
