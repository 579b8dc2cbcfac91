"""Runs that end otherwise: damaged checkpoints, Ctrl-C, SIGTERM, a full disk, a plot that fails: one line each."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tritonsparse.train import language_modeling
from tritonsparse.train.run import checkpoints, results
from tritonsparse.train.run.loop import Loop

# Of the language model every kind of file: memory of the segments, masks, moments, and random states.
RUN = ("--method=gmp", "--sparsity=0.5", "--max_train_steps=8", "--checkpointing_steps=2", "--save_twins")


@pytest.fixture(scope="module")
def saved(language: Any, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("saved")
    language.train(folder, *RUN)
    return folder


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbled(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [Path.unlink, truncated, garbled, lambda path: path.write_bytes(b"")])
def test_a_checkpoint_with_a_damaged_file_is_refused_by_the_file_s_name(
    language: Any, saved: Path, tmp_path: Path, damage: Callable[[Path], Any], monkeypatch: Any
) -> None:
    # Nothing is loaded, and no data is read.
    monkeypatch.setattr(language_modeling, "_prepare", lambda *_: pytest.fail("went on"))
    monkeypatch.setattr(Loop, "resume", lambda *_: pytest.fail("loaded"))
    names = {path.name for path in (saved / "step_8").iterdir()}
    assert names == {
        "model.safetensors", "optimizer.bin", "random_states_0.pkl", "tritonsparse_state.json", "memory_0.safetensors",
        "tritonsparse_state.safetensors", "run.json",
    }  # fmt: skip
    for name in sorted(names):
        out = tmp_path / name
        shutil.copytree(saved / "step_8", out / "step_8")
        shutil.copytree(saved / "step_6", out / "step_6")
        damage(out / "step_8" / name)
        # "latest" does not go back to an older one in silence either.
        line = language.refusal(out, *RUN, "--resume_from_checkpoint=latest")
        assert f"resume: expected {out / 'step_8' / name} as it was written, got " in line
        named = language.refusal(out, *RUN, f"--resume_from_checkpoint={out / 'step_8'}")
        assert named == line or name == "run.json"


def test_a_checkpoint_of_other_processes_or_precision_is_refused(language: Any, saved: Path, monkeypatch: Any) -> None:
    for key, value, words in (
        ("processes", 2, "processes = 1, got 2"),
        ("mixed_precision", "bf16", "None, got 'bf16'"),
    ):
        read = checkpoints.read_run

        def other(folder: Path, key: str = key, value: Any = value, read: Any = read) -> dict[str, Any]:
            run = read(folder)
            return run | {"configuration": run["configuration"] | {key: value}}

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "read_run", other)
            line = language.refusal(saved, *RUN, "--resume_from_checkpoint=latest")
        assert words in line and key in line


# Children of one process that has imported everything, each stopped by a real signal at another place.
STOPPED = """
import json, os, signal, sys
from tritonsparse.train import image_classification
from tritonsparse.train.run.loop import Loop
# A job in the background is started with Ctrl-C ignored, which its children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
step, measure, build = Loop._optimizer_step, image_classification.measure, image_classification.build
name = where = ""
def stop():
    os.kill(os.getpid(), getattr(signal, name))
def stepping(self, batches):
    if where == "training" and self.step == 5:
        stop()
    return step(self, batches)
def measuring(run, *rest):
    if where == "test" and (run.loop.settings.output_dir / "model.safetensors").exists():
        stop()
    return measure(run, *rest)
def building(*rest):
    if where == "start":
        stop()
    return build(*rest)
Loop._optimizer_step, image_classification.measure, image_classification.build = stepping, measuring, building
for case in sys.argv[2:]:
    name, where = case.split()
    child = os.fork()
    if child == 0:
        out = os.path.join(sys.argv[1], where)
        sys.stderr = open(out + ".txt", "w")
        os.dup2(sys.stderr.fileno(), 2)
        status = image_classification.main([*json.loads(os.environ["OPTIONS"]), "--output_dir", out])
        sys.stderr.flush()
        os._exit(status)
    print(where, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
DIGITS = (
    "--preset=resnet8-narrow", "--max_train_samples=64", "--max_test_samples=20", "--batch_size=8",
    "--max_train_steps=8", "--checkpointing_steps=2", "--checkpoints_total_limit=2", "--method=dense",
)  # fmt: skip
WHERE = {
    "training": (
        "SIGINT",
        130,
        "stopped by Ctrl-C; whole in {out}: step_2, step_4; go on with --resume",
    ),
    "test": ("SIGTERM", 143, "stopped by SIGTERM; the trained weights are saved in {out}"),
    "start": ("SIGINT", 130, "stopped by Ctrl-C; before the first step"),
}


def test_a_signal_ends_a_program_with_one_line_and_the_status_of_shells(tmp_path: Path) -> None:
    cases = [f"{name} {where}" for where, (name, _, _) in WHERE.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPTIONS": json.dumps(DIGITS)}
    command = [sys.executable, "-c", STOPPED, str(tmp_path), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.splitlines() == [f"{where} {status}" for where, (_, status, _) in WHERE.items()], done.stderr
    for where, (_, _, words) in WHERE.items():
        out, err = tmp_path / where, (tmp_path / f"{where}.txt").read_text(encoding="utf-8")
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert lines == [err.splitlines()[-1]] and "Traceback" not in err, err
        assert f"image_classification: {words.format(out=out)}" in lines[0]
    assert not (tmp_path / "start").exists()
    assert load_file(tmp_path / "test" / "model.safetensors")
    assert not (tmp_path / "test" / "all_results.json").exists()


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """`small_files(size)`: no file of this process may grow beyond it, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal that goes with it, and writes fail.
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failing(program: Any, folder: Path, capsys: Any, *options: str) -> str:
    """The one line of a run that ends with status 1."""
    with program.small():
        assert program.module.main(program.words(folder, *options)) == 1
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return str(line)


IMAGE_RUN = ("--max_train_steps=6", "--checkpointing_steps=2", "--method=gmp", "--sparsity=0.5")


def test_a_full_disk_at_a_checkpoint_leaves_the_earlier_ones_whole(
    images: Any, tmp_path: Path, capsys: Any, small_files: Any, monkeypatch: Any
) -> None:
    save, folder = checkpoints.save, tmp_path / "out"

    def filling(*arguments: Any) -> Path:
        if arguments[2] == "step_6":
            small_files(2000)
        return save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", filling)
        line = failing(images, folder, capsys, *IMAGE_RUN)
    small_files(resource.RLIM_INFINITY)
    assert line.startswith(f"error: checkpoint: expected to write {folder / 'step_6'}, got ")
    assert line.endswith(f"; whole in {folder}: step_2, step_4; go on with --resume_from_checkpoint latest")
    assert sorted(path.name for path in folder.iterdir()) == ["step_2", "step_4"]
    # When there is room again, it is the run that never met a full disk.
    resumed = images.train(folder, *IMAGE_RUN, "--resume_from_checkpoint=latest")
    never = images.train(tmp_path / "never", *IMAGE_RUN)
    assert (resumed["eval_loss"], resumed["sparsity"]) == (never["eval_loss"], never["sparsity"])
    first, second = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "never"))
    assert all(torch.equal(first[key], second[key]) for key in second)


def test_a_full_disk_at_the_end_says_what_there_is_to_go_on_from(
    images: Any, tmp_path: Path, capsys: Any, small_files: Any, monkeypatch: Any
) -> None:
    run = Loop.run
    monkeypatch.setattr(Loop, "run", lambda loop: (run(loop), small_files(2000)))
    line = failing(images, tmp_path, capsys, *IMAGE_RUN)
    assert line.startswith(f"error: checkpoint: expected to write {tmp_path}, got ")
    assert f"whole in {tmp_path}: step_2, step_4, step_6" in line
    # A disk that is full already is found out before the first step.
    assert "expected --output_dir as a folder that can be written" in images.refusal(tmp_path / "none", *IMAGE_RUN)
    small_files(resource.RLIM_INFINITY)
    line = failing(images, tmp_path / "none", capsys, "--max_train_steps=1")
    assert line.endswith(f"no checkpoint is in {tmp_path / 'none'}")


def gone(*_: Any, **__: Any) -> None:
    raise OSError(30, "Read-only file system", "training.png")


@pytest.mark.parametrize("program", ["translation", "language", "images"], indirect=True)
def test_what_fails_after_training_says_that_the_weights_are_saved(
    program: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    words = program.words(tmp_path, "--max_train_steps=1", "--method=dense")
    with program.small() as patch:
        patch.setattr(results, "plot", gone)
        assert program.module.main(words) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(
        "error: [Errno 30] Read-only file system: 'training.png'; the trained weight"
    )
    assert f"saved in {tmp_path}" in err and "Traceback" not in err
    assert load_file(tmp_path / "model.safetensors") and (tmp_path / "all_results.json").is_file()
    # A fault of this package's is to be seen, where somebody looks for it.
    monkeypatch.setenv("TRITONSPARSE_TRACEBACK", "1")
    with program.small() as patch, pytest.raises(OSError, match="Read-only"):
        patch.setattr(results, "plot", gone)
        program.module.main(words)


def test_processes_that_do_not_find_each_other_are_refused(images: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun, on a machine without a GPU and without ACCELERATE_USE_CPU
    line = images.refusal(tmp_path / "out", "--max_train_steps=1")
    assert "the 2 processes of this launch to find each other, got 1; on a CPU, start them by torchrun" in line


def test_a_launch_that_starts_fewer_processes_than_asked_for_is_said(
    images: Any, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    # As `accelerate launch --cpu --num_processes 2` leaves them.
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    images.train(tmp_path, "--max_train_steps=1", "--method=dense")
    assert "one process is here, although the launch looks like one of several" in caplog.text
