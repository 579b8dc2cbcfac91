"""A run that was stopped, or killed, and resumed is the run that never stopped: bit for bit on a CPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tritonsparse.train import translation
from tritonsparse.train.run import checkpoints

Train = Callable[..., dict[str, Any]]
SOFT = ("--method_args", '{"threshold_init": -3, "threshold_weight_decay": 0.01}')
GMP = ("--method=gmp", "--method_args", '{"sparsity": 0.8, "update_every": 2}')
# About five steps an epoch: checkpoints at 4 and 8 lie inside epochs, and inside windows of the record.
LENGTH = ("--max_tokens_per_batch=1600", "--max_train_steps=10", "--checkpointing_steps=4", "--logging_steps=3")

# The program in a process that is killed while it writes its second checkpoint: model written, optimizer not whole.
KILLED_WRITING = """
import os, pathlib, signal, sys
from accelerate import Accelerator
from tritonsparse.train import translation
save, calls = Accelerator.save_state, []
def killed(self, folder):
    save(self, folder)
    calls.append(folder)
    if len(calls) == 2:
        (pathlib.Path(folder) / "optimizer.bin").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
Accelerator.save_state = killed
translation.main(sys.argv[1:])
"""


def clocks_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def assert_same_run(one: Path, other: Path, checkpoint: str) -> None:
    """Master weights, thresholds and buffers, the optimizer's state, the method's, and the record."""
    first, second = (load_file(folder / checkpoint / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    states = [torch.load(folder / checkpoint / "optimizer.bin")["state"] for folder in (one, other)]
    for number, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][number][key])), (number, key)
    assert (one / checkpoint / "tritonsparse_state.json").read_text() == (
        other / checkpoint / "tritonsparse_state.json"
    ).read_text()
    runs = [checkpoints.read_run(folder / checkpoint) for folder in (one, other)]
    assert clocks_apart(runs[0]["history"]) == clocks_apart(runs[1]["history"])
    assert runs[0]["scheduler"] == runs[1]["scheduler"]
    assert runs[0]["meter"] == runs[1]["meter"]


def assert_same_results(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in ("bleu", "bleu_line", "sparsity", "train_flops_fraction", "epoch_losses", "evaluations", "layers"):
        assert one[key] == other[key], key
    assert clocks_apart(one["history"]) == clocks_apart(other["history"])


@pytest.fixture(scope="module", params=[SOFT, GMP], ids=["autosparse", "gmp"])
def straight(
    request: pytest.FixtureRequest, train: Train, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], tuple[str, ...]]:
    """A run that was never stopped: its folder, results and options."""
    folder, options = tmp_path_factory.mktemp("straight"), (*request.param, *LENGTH)
    return folder, train(folder, *options), options


def test_the_checkpoints_lie_inside_epochs(straight: Any) -> None:
    _, document, _ = straight
    per_epoch = document["evaluations"][0]["step"]
    assert 4 % per_epoch and 8 % per_epoch and per_epoch < 10


@pytest.mark.parametrize("checkpoint", ["step_4", "step_8"])
def test_a_run_resumed_inside_an_epoch_is_the_run_that_never_stopped(
    train: Train, straight: Any, tmp_path: Path, checkpoint: str
) -> None:
    folder, document, options = straight
    shutil.copytree(folder / checkpoint, tmp_path / checkpoint)
    resumed = train(tmp_path, *options, "--resume_from_checkpoint", "latest")
    assert_same_results(resumed, document)
    first, second = (load_file(path / "tritonsparse.safetensors") for path in (folder, tmp_path))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    if checkpoint == "step_4":
        assert_same_run(folder, tmp_path, "step_8")


def test_a_path_resumes_into_another_folder_and_logging_may_differ(train: Train, straight: Any, tmp_path: Path) -> None:
    folder, document, options = straight
    before = sorted(folder.rglob("*"))
    resumed = train(tmp_path, *options, "--resume_from_checkpoint", str(folder / "step_4"), "--logging_steps=1")
    assert (resumed["bleu"], resumed["sparsity"]) == (document["bleu"], document["sparsity"])
    assert sorted(folder.rglob("*")) == before


def test_a_finished_run_resumes_to_its_own_results(train: Train, tmp_path: Path) -> None:
    options = (*SOFT, "--max_train_steps=4", "--checkpointing_steps=2")
    document = train(tmp_path, *options)
    assert_same_results(train(tmp_path, *options, "--resume_from_checkpoint", "latest"), document)


def test_epoch_checkpoints_resume_at_the_epoch(train: Train, tmp_path: Path) -> None:
    options = (*SOFT, "--max_tokens_per_batch=1600", "--num_train_epochs=2", "--checkpointing_steps=epoch")
    document = train(tmp_path / "a", *options)
    shutil.copytree(tmp_path / "a" / "epoch_0", tmp_path / "b" / "epoch_0")
    assert_same_results(train(tmp_path / "b", *options, "--resume_from_checkpoint", "latest"), document)
    assert_same_run(tmp_path / "a", tmp_path / "b", "epoch_1")


def test_latest_without_a_checkpoint_starts_afresh_and_clears_up(train: Train, straight: Any, tmp_path: Path) -> None:
    folder, document, options = straight
    (tmp_path / ".unfinished-step_4").mkdir()
    assert_same_results(train(tmp_path, *options, "--resume_from_checkpoint", "latest"), document)
    assert_same_run(folder, tmp_path, "step_8")
    assert not (tmp_path / ".unfinished-step_4").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--vocab_size=190",), "run with vocab_size = 190, got 200"),
        (("--method=dense", "--method_args", "{}"), "run with method = 'dense', got"),
        (("--learning_rate=0.5",), "run with learning_rate = 0.5, got 0.01"),
        (("--seed=3",), "run with seed = 3, got 0"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(
    straight: Any, refusal: Callable[..., str], options: tuple[str, ...], words: str
) -> None:
    folder, _, base = straight
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    line = refusal(folder, *base, *options, "--resume_from_checkpoint", "latest")
    assert words in line
    assert "repeat the arguments of that run or start afresh in another --output_dir" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_a_fresh_run_into_the_checkpoints_of_another_is_refused(straight: Any, refusal: Callable[..., str]) -> None:
    """Its own checkpoints would be dropped by the limit, and averaged with the other's."""
    folder, _, options = straight
    line = refusal(folder, *options)
    assert "without checkpoints of an earlier run, got step_8" in line
    assert "--resume_from_checkpoint latest" in line


def test_kill_9_in_mid_run_and_in_mid_checkpoint_ends_in_the_weights_of_the_run_never_killed(
    saved_marian: Callable[[float], Path], corpus_files: tuple[str, ...], tmp_path: Path
) -> None:
    options = [
        "--model_name_or_path", str(saved_marian(0.1)), *corpus_files, *SOFT, "--num_beams=1",
        "--max_tokens_per_batch=800", "--max_train_steps=30", "--num_warmup_steps=2", "--learning_rate=0.01",
        "--checkpointing_steps=2", "--checkpoints_total_limit=3",
    ]  # fmt: skip
    killed, never = tmp_path / "killed", tmp_path / "never"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    resume = [*options, "--output_dir", str(killed), "--resume_from_checkpoint", "latest"]

    program = [sys.executable, "-m", "tritonsparse.train.translation", *resume]
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(program, env=environment, stdout=log, stderr=log)
        while process.poll() is None and not checkpoints.checkpoint_folders(killed):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text(encoding="utf-8")
    first = checkpoints.checkpoint_folders(killed)[-1].name
    assert not (killed / "all_results.json").exists()

    again = subprocess.run(
        [sys.executable, "-c", KILLED_WRITING, *resume], env=environment, capture_output=True, text=True
    )
    assert again.returncode == -signal.SIGKILL, again.stderr
    second = checkpoints.checkpoint_folders(killed)[-1].name
    assert int(second.split("_")[1]) == int(first.split("_")[1]) + 2
    assert [path.name for path in killed.glob(".unfinished-*")] == [f".unfinished-step_{int(second.split('_')[1]) + 2}"]

    assert translation.main(resume) == 0
    assert translation.main([*options, "--output_dir", str(never)]) == 0
    assert_same_run(never, killed, "step_30")
    assert list(killed.glob(".unfinished-*")) == []
    assert {path.name for path in never.iterdir()} == {path.name for path in killed.iterdir()}
