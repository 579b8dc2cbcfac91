"""Checkpoints: whole or not there, found again, refused by another model, averaged as masters."""

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
from tritonsparse.methods import ACDC, METHODS, Phases
from tritonsparse.train.run import checkpoints
from tritonsparse.train.run.program import average


@pytest.fixture
def accelerator() -> Accelerator:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(3, 2))
    return accelerator


def save(accelerator: Accelerator, folder: Path, step: int, keep: int | None = None, **run: Any) -> Path:
    return checkpoints.save(accelerator, folder, f"step_{step}", {"step": step, **run}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def handmade(folder: Path, tensors: dict[str, Tensor], **configuration: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "run.json").write_text(json.dumps({"step": 1, "configuration": configuration}), encoding="utf-8")
    return folder


def test_a_checkpoint_holds_the_model_and_the_run(accelerator: Accelerator, tmp_path: Path) -> None:
    folder = save(accelerator, tmp_path, 4, history=[{"loss": 0.1}])
    assert names(tmp_path) == ["step_4"]
    assert checkpoints.read_run(folder) == {"step": 4, "history": [{"loss": 0.1}]}
    assert set(load_file(folder / "model.safetensors")) == {"weight", "bias"}


def test_a_write_that_fails_leaves_no_folder_of_that_name_and_the_next_start_clears_up(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(accelerator, tmp_path, 1)

    def fail(self: Accelerator, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", fail)
    with pytest.raises(OSError, match="No space left"):
        save(accelerator, tmp_path, 2)
    assert names(tmp_path) == [".unfinished-step_2", "step_1"]
    assert checkpoints.find("latest", tmp_path) == tmp_path / "step_1"
    with caplog.at_level(logging.WARNING):
        checkpoints.clear_unfinished(tmp_path)
    assert "removing the unfinished checkpoint .unfinished-step_2" in caplog.text
    assert names(tmp_path) == ["step_1"]


def test_a_second_write_of_a_step_replaces_the_first_even_over_an_unfinished_one(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    (tmp_path / ".unfinished-step_1").mkdir()
    (tmp_path / ".unfinished-step_1" / "left.over").touch()
    save(accelerator, tmp_path, 1, number=1)
    folder = save(accelerator, tmp_path, 1, number=2)
    assert checkpoints.read_run(folder)["number"] == 2
    assert names(tmp_path) == ["step_1"]
    assert not (folder / "left.over").exists()


def test_only_the_newest_are_kept_counted_by_step_not_by_name(accelerator: Accelerator, tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(accelerator, tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_10", "step_11"]
    assert [path.name for path in checkpoints.checkpoint_folders(tmp_path)] == ["step_10", "step_11"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_removal_that_is_killed_leaves_no_checkpoint_in_part(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The old step 1 dropped by the limit, or step 2 written again: killed while files go, one at a time."""
    save(accelerator, tmp_path, 1)
    save(accelerator, tmp_path, 2)
    remove = shutil.rmtree

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if not Path(folder).exists():
            return
        (Path(folder) / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(accelerator, tmp_path, 3 if step == 1 else 2, keep=2)
    monkeypatch.setattr(shutil, "rmtree", remove)
    whole = checkpoints.checkpoint_folders(tmp_path)
    assert tmp_path / f"step_{step}" not in whole
    assert whole
    assert all((folder / "model.safetensors").is_file() for folder in whole)
    checkpoints.clear_unfinished(tmp_path)
    assert names(tmp_path) == [folder.name for folder in whole]


def test_latest_is_the_highest_step_and_none_where_there_is_none(accelerator: Accelerator, tmp_path: Path) -> None:
    assert checkpoints.find("latest", tmp_path / "not yet there") is None
    assert checkpoints.find("latest", tmp_path) is None
    for step in (9, 10):
        save(accelerator, tmp_path, step)
    (tmp_path / "step_11").mkdir()  # no run.json: not ours, or not finished
    (tmp_path / "my_12").mkdir()
    assert checkpoints.find("latest", tmp_path) == tmp_path / "step_10"


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"with run.json\), got .*step_9; name a step_N or epoch_N folder"):
        checkpoints.find(str(tmp_path / "step_9"), tmp_path)


def test_epoch_folders_are_checkpoints_too(tmp_path: Path) -> None:
    folder = handmade(tmp_path / "epoch_0", {"a": torch.ones(1)})
    assert checkpoints.find("latest", tmp_path) == folder


def test_a_checkpoint_of_another_configuration_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    folder = handmade(tmp_path / "step_1", model.state_dict(), method="str", seed=0)
    checkpoints.refuse_other_model(folder, model, {"method": "str", "seed": 0})
    with pytest.raises(ValueError, match=r"run with method = 'gmp', got 'str' in step_1; repeat the arguments"):
        checkpoints.refuse_other_model(folder, model, {"method": "gmp", "seed": 1})
    with pytest.raises(ValueError, match=r"run with new_option = 1, got None in step_1"):
        checkpoints.refuse_other_model(folder, model, {"new_option": 1})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, r"\(weight: \[2, 3\]\), got \[2, 4\] in step_1"),
        ({"decoder.weight": torch.ones(2, 3)}, r"\(decoder.weight: no such tensor\), got \[2, 3\] in step_1"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_tensor(
    tmp_path: Path, other: dict[str, Tensor], words: str
) -> None:
    model = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        checkpoints.refuse_other_model(handmade(tmp_path / "step_1", other), model, {})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_averaging_is_the_mean_of_masters_and_thresholds(tmp_path: Path) -> None:
    first = {"w": torch.tensor([1.0, -3.0, 0.1]), "t": torch.tensor([-4.0]), "count": torch.tensor([7])}
    second = {"w": torch.tensor([3.0, -5.0, 0.2]), "t": torch.tensor([-6.0]), "count": torch.tensor([9])}
    third = {"w": torch.tensor([5.0, -1.0, 0.3]), "t": torch.tensor([-8.0]), "count": torch.tensor([11])}
    folders = [handmade(tmp_path / f"step_{n}", part) for n, part in enumerate((first, second, third))]
    mean = checkpoints.average_weights(folders)
    torch.testing.assert_close(mean["w"], torch.tensor([3.0, -3.0, 0.2]), rtol=0, atol=1e-7)
    assert mean["t"].tolist() == [-6.0]
    assert (mean["w"].dtype, mean["t"].dtype) == (torch.float32, torch.float32)
    # Counters and the like have no mean: the last checkpoint's.
    assert mean["count"].tolist() == [11]


def test_of_a_method_in_phases_the_last_phase_alone_is_averaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Two steps an epoch: sparse from 4 to 6, dense to 8, sparse to 12.
    phases = Phases([(0, "dense"), (2, "sparse"), (3, "dense"), (4, "sparse")], 6)
    model = nn.Linear(2, 1, bias=False)
    sparsifier = ts.sparsify(model, ACDC(sparsity=0.5, phases=phases), total_steps=12, steps_per_epoch=2)
    for step in (4, 6, 8, 10, 12):
        folder = handmade(tmp_path / f"step_{step}", {"weight": torch.full((1, 2), float(step))})
        (folder / "run.json").write_text(json.dumps({"step": step}), encoding="utf-8")
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


def test_averaging_one_checkpoint_gives_its_bits_back(tmp_path: Path) -> None:
    weights = {"w": torch.randn(50)}
    assert torch.equal(checkpoints.average_weights([handmade(tmp_path / "step_1", weights)])["w"], weights["w"])
