"""Checkpoints: whole or not there, found again, refused by another model, averaged as masters; the twins of a run."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.methods import ACDC, METHODS, Dense, Phases
from tritonsparse.train.run import checkpoints
from tritonsparse.train.run.program import average
from tritonsparse.train.run.twins import Twins, kept


@pytest.fixture
def accelerator() -> Accelerator:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(3, 2))
    return accelerator


def save(accelerator: Accelerator, folder: Path, step: int, keep: int | None = None, **run: Any) -> Path:
    return checkpoints.save(accelerator, folder, f"step_{step}", {"step": step, **run}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def handmade(folder: Path, tensors: dict[str, Tensor], step: int = 1, **configuration: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "run.json").write_text(json.dumps({"step": step, "configuration": configuration}), encoding="utf-8")
    return folder


def test_a_failed_write_leaves_no_checkpoint(accelerator: Any, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    def fail(self: Accelerator, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half of")
        raise OSError("No space left on device")

    save(accelerator, tmp_path, 1)
    monkeypatch.setattr(Accelerator, "save_state", fail)
    with pytest.raises(
        OSError, match=r"step_2, got No space left on device; .* were free; whole in .*: step_1; go on with --resume"
    ):
        save(accelerator, tmp_path, 2)
    # Half a checkpoint would keep the disk full.
    assert names(tmp_path) == ["step_1"]
    assert checkpoints.find("latest", tmp_path) == tmp_path / "step_1"
    (tmp_path / ".unfinished-step_2").mkdir()
    checkpoints.clear_unfinished(tmp_path)
    assert "removing the unfinished checkpoint .unfinished-step_2" in caplog.text
    assert names(tmp_path) == ["step_1"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_killed_removal_leaves_none_in_part(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: Any, step: int
) -> None:
    """The old step 1 dropped by the limit, or step 2 written again: killed while files go, one at a time."""

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if Path(folder).exists():
            (Path(folder) / "model.safetensors").unlink()
            raise KeyboardInterrupt

    save(accelerator, tmp_path, 1)
    save(accelerator, tmp_path, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        save(accelerator, tmp_path, 3 if step == 1 else 2, keep=2)
    whole = checkpoints.checkpoint_folders(tmp_path)
    assert whole and tmp_path / f"step_{step}" not in whole
    assert all((folder / "model.safetensors").is_file() for folder in whole)
    checkpoints.clear_unfinished(tmp_path)
    assert names(tmp_path) == [folder.name for folder in whole]


def test_the_newest_are_kept_whole_and_found_by_step(accelerator: Accelerator, tmp_path: Path) -> None:
    assert checkpoints.find("latest", tmp_path / "not yet there") is None
    assert checkpoints.find("latest", tmp_path) is None
    epoch = handmade(tmp_path / "epoch_0", {"a": torch.ones(1)})
    assert checkpoints.find("latest", tmp_path) == epoch
    for step in (8, 9, 10, 11):
        save(accelerator, tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_10", "step_11"]
    assert [path.name for path in checkpoints.checkpoint_folders(tmp_path)] == ["step_10", "step_11"]
    (tmp_path / "step_12").mkdir()  # no run.json: not ours, or not finished
    (tmp_path / "my_13").mkdir()
    assert checkpoints.find("latest", tmp_path) == tmp_path / "step_11"
    with pytest.raises(ValueError, match=r"with run.json\), got .*step_12.*; name a step_N or epoch_N folder"):
        checkpoints.find(str(tmp_path / "step_12"), tmp_path)
    # One that was finished and has lost it is not passed over.
    (tmp_path / "step_12" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"resume: expected .*step_12/run.json as it was written, got No such file"):
        checkpoints.find("latest", tmp_path)
    shutil.rmtree(tmp_path / "step_12")
    # A checkpoint replaces its namesake.
    again = tmp_path / "again"
    save(accelerator, again, 4, history=[])
    (again / ".unfinished-step_4").mkdir()
    (again / ".unfinished-step_4" / "left.over").touch()
    folder = save(accelerator, again, 4, history=[{"loss": 0.1}])
    assert names(again) == ["step_4"] and not (folder / "left.over").exists()
    assert checkpoints.read_run(folder) == {"step": 4, "history": [{"loss": 0.1}]}
    assert set(load_file(folder / "model.safetensors")) == {"weight", "bias"}


def test_a_checkpoint_of_another_run_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    model, one = nn.Linear(3, 2), torch.ones(2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folder = handmade(tmp_path / "step_1", model.state_dict(), method="str", seed=0)
    wide = handmade(tmp_path / "step_2", {"weight": torch.ones(2, 4), "bias": one})
    other = handmade(tmp_path / "step_3", {"decoder.weight": torch.ones(2, 3)})
    checkpoints.refuse_other_model(folder, model, {"method": "str", "seed": 0})
    for where, configuration, words in (
        (folder, {"method": "gmp", "seed": 1}, r"run with method = 'gmp', got 'str' in step_1; repeat the arguments"),
        (folder, {"new_option": 1}, r"run with new_option = 1, got None in step_1"),
        (wide, {}, r"\(weight: \[2, 3\]\), got \[2, 4\] in step_2"),
        (other, {}, r"\(decoder.weight: no such tensor\), got \[2, 3\] in step_3"),
    ):
        with pytest.raises(ValueError, match=words):
            checkpoints.refuse_other_model(where, model, configuration)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_field_that_an_older_version_had_not_counts_as_its_default(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    fields = ACDC(sparsity=0.5).to_dict()
    older = {name: value for name, value in fields.items() if name != "distribution"}
    folder = handmade(tmp_path / "step_1", model.state_dict(), method="acdc", method_fields=older)
    checkpoints.refuse_other_model(folder, model, {"method": "acdc", "method_fields": fields})
    for changed in ({"distribution": "erk"}, {"scope": "uniform"}):
        with pytest.raises(ValueError, match="run with method_fields = "):
            checkpoints.refuse_other_model(folder, model, {"method": "acdc", "method_fields": fields | changed})


def test_averaging_is_the_mean_of_masters_and_thresholds(tmp_path: Path) -> None:
    saved = (([1.0, -3.0, 0.1], -4.0, 7), ([3.0, -5.0, 0.2], -6.0, 9), ([5.0, -1.0, 0.3], -8.0, 11))
    folders = [
        handmade(tmp_path / f"step_{n}", {"w": torch.tensor(w), "t": torch.tensor([t]), "count": torch.tensor([count])})
        for n, (w, t, count) in enumerate(saved)
    ]
    mean = checkpoints.average_weights(folders)
    torch.testing.assert_close(mean["w"], torch.tensor([3.0, -3.0, 0.2]), rtol=0, atol=1e-7)
    assert mean["t"].tolist() == [-6.0]
    assert (mean["w"].dtype, mean["t"].dtype) == (torch.float32, torch.float32)
    # Counters and the like have no mean: the last checkpoint's.
    assert mean["count"].tolist() == [11]
    # One checkpoint gives its bits back.
    weights = {"w": torch.randn(50)}
    assert torch.equal(checkpoints.average_weights([handmade(tmp_path / "one", weights)])["w"], weights["w"])


def test_of_a_method_in_phases_the_last_phase_alone_is_averaged(tmp_path: Path, caplog: Any) -> None:
    # Two steps an epoch: sparse from 4 to 6, dense to 8, sparse to 12.
    phases = Phases([(0, "dense"), (2, "sparse"), (3, "dense"), (4, "sparse")], 6)
    model = nn.Linear(2, 1, bias=False)
    sparsifier = ts.sparsify(model, ACDC(sparsity=0.5, phases=phases), total_steps=12, steps_per_epoch=2)
    for step in (4, 6, 8, 10, 12):
        handmade(tmp_path / f"step_{step}", {"weight": torch.full((1, 2), float(step))}, step)
    loop: Any = SimpleNamespace(settings=SimpleNamespace(output_dir=tmp_path), sparsifier=sparsifier)
    sparsifier.clock.step = 12
    args = argparse.Namespace(average_checkpoints=4)
    with caplog.at_level(logging.WARNING):
        assert average(args, loop) == ["step_10", "step_12"]
    assert model.weight.tolist() == [[11.0, 11.0]]
    assert "left out of the average: ['step_6', 'step_8']" in caplog.text and "began at step 8" in caplog.text
    # A phase that has no checkpoint of its own: nothing is averaged, and the weights stay.
    sparsifier.clock.step = 7
    for step in (8, 10, 12):
        shutil.rmtree(tmp_path / f"step_{step}")
    assert average(args, loop) == [] and model.weight.tolist() == [[11.0, 11.0]]
    # A method without phases has one.
    assert METHODS["gmp"](sparsity=0.5).phase_began(sparsifier.clock) == 0


def test_the_best_dense_and_the_sparsest_then_best_sparse_model_are_kept(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), nn.Sequential(nn.Linear(8, 8))
    sparsifier = ts.sparsify(model, "gmp", sparsity=0.5, pattern="2:4", total_steps=4)
    accelerator.prepare(model)
    sparsifier.register(accelerator)
    twins = Twins(lambda numbers: numbers["quality"], lambda folder: folder.mkdir())
    gmp = {"method": "gmp", "sparsity": 0.5, "pattern": "2:4", "seed": 3, "method_fields": {}}
    evaluations: list[dict[str, Any]] = []
    # (phase, sparsity, quality), and the epochs of the dense and the sparse model that are kept then
    for epoch, (phase, sparsity, quality, found) in enumerate([
        ("dense", 0.0, 5.0, [0]),
        ("sparse", 0.5, 9.0, [0, 1]),
        ("dense", 0.01, 4.0, [0, 1]),  # worse, and a few weights that never woke do not make it better
        ("sparse", 0.8, 6.0, [0, 3]),  # sparser goes before better
        ("sparse", 0.8, 6.0, [0, 3]),  # no better than what is kept
        ("dense", 0.0, 5.5, [5, 3]),
        ("sparse", 0.8, 7.0, [5, 6]),
    ]):  # fmt: skip
        evaluations.append({"epoch": epoch, "phase": phase, "sparsity": sparsity, "quality": quality})
        record = {"step": epoch + 1, "configuration": gmp, "evaluations": evaluations}
        twins.keep(accelerator, sparsifier, tmp_path, record)
        now = kept(tmp_path)
        assert [now[phase]["epoch"] for phase in ("dense", "sparse") if phase in now] == found
    # No step or epoch folder: the limit on checkpoints does not count them, and "latest" is never one of them.
    assert checkpoints.checkpoint_folders(tmp_path) == []
    # The dense one is a checkpoint of a dense run.
    dense = {"method": "dense", "sparsity": None, "pattern": "unstructured", "method_fields": Dense().to_dict()}
    assert checkpoints.read_run(tmp_path / "best_dense")["configuration"] == gmp | dense
    assert checkpoints.read_run(tmp_path / "best_sparse")["configuration"] == gmp
    other = ts.sparsify(nn.Sequential(nn.Linear(8, 8)), "dense", total_steps=4)
    saved = json.loads((tmp_path / "best_dense" / "tritonsparse_state.json").read_text())
    tensors = load_file(tmp_path / "best_dense" / "tritonsparse_state.safetensors")
    other.load_state_dict({**saved, "tensors": tensors})
    assert other.layers["0"].kind == "dense" and tensors == {}
