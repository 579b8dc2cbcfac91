"""A run that was stopped, or killed, and resumed is the run that never stopped: bit for bit on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tritonsparse.train.run import checkpoints

SOFT = ("--method_args", '{"threshold_init": -3, "threshold_weight_decay": 0.01}')
GMP = ("--method=gmp", "--method_args", '{"sparsity": 0.8, "update_every": 2}')
# About five steps an epoch: checkpoints at 4 and 8 lie inside epochs, and inside windows of the record.
FIVE = ("--max_tokens_per_batch=1600", "--max_train_steps=10", "--checkpointing_steps=4", "--logging_steps=3")
# Ten steps an epoch, and checkpoints at 6 and 12.
TEN = ("--max_train_steps=15", "--checkpointing_steps=6", "--augmentation=crop_flip")
FALLING = ("--lr_scheduler_type=multistep", "--lr_milestones", "0.5", "1")
# Passes of 15 steps: memory, order, dropout and masks all go on.
PASSES = (
    "--method=gmp", "--sparsity=0.5", '--method_args={"update_every": 3}', "--max_train_steps=24",
    "--checkpointing_steps=10", "--gradient_accumulation_steps=2", "--optim=lamb",
)  # fmt: skip
ROLLED = ("--roll", "--steps_per_epoch=6", "--mixed_precision=bf16")
# name -> (program, options, options that only the resumed run has)
RUNS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "translation, autosparse": ("translation", (*SOFT, *FIVE), ()),
    "translation, gmp": ("translation", (*GMP, *FIVE), ()),
    "images, autosparse": ("images", (*SOFT, *TEN), ("--workers=2",)),
    "images, gmp": ("images", (*GMP, *TEN, *FALLING), ("--workers=2",)),
    "language, whole passes": ("language", PASSES, ()),
    "language, rolled, part epochs, bf16": ("language", (*PASSES, *ROLLED), ()),
}


def same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def clocks_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def same_run(one: Path, other: Path, checkpoint: str) -> None:
    """Master weights, thresholds and buffers, the optimizer's state, the method's, and the record."""
    one, other = one / checkpoint, other / checkpoint
    same_tensors(one / "model.safetensors", other / "model.safetensors")
    states = [torch.load(folder / "optimizer.bin")["state"] for folder in (one, other)]
    for number, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][number][key])), (number, key)
    method, its = ((folder / "tritonsparse_state.json").read_text() for folder in (one, other))
    assert method == its
    run, its_run = (checkpoints.read_run(folder) for folder in (one, other))
    assert clocks_apart(run["history"]) == clocks_apart(its_run["history"])
    assert run["scheduler"] == its_run["scheduler"] and run["meter"] == its_run["meter"]


def same_results(one: dict[str, Any], other: dict[str, Any]) -> None:
    measured = {"bleu", "bleu_line", "top1", "eval_loss", "perplexity"} & one.keys()
    for key in (*measured, "sparsity", "train_flops_fraction", "epoch_losses", "evaluations", "layers"):
        assert one[key] == other[key], key
    assert clocks_apart(one["history"]) == clocks_apart(other["history"])


@pytest.fixture(scope="module", params=RUNS)
def straight(request: Any, tmp_path_factory: Any) -> Any:
    """A run that was never stopped: program, folder, results and options, and what only a resumed run is told."""
    name, options, resumed = RUNS[request.param]
    program, folder = request.getfixturevalue(name), tmp_path_factory.mktemp("straight")
    return program, folder, program.train(folder, *options), options, resumed


only = pytest.mark.parametrize("straight", ["translation, autosparse"], indirect=True)


@pytest.mark.parametrize("which", [0, 1])
def test_a_run_resumed_inside_an_epoch_is_the_run_that_never_stopped(straight: Any, tmp_path: Path, which: int) -> None:
    program, folder, document, options, only_resumed = straight
    saved = checkpoints.checkpoint_folders(folder)
    per_epoch = document["evaluations"][0]["step"]
    assert len(saved) == 2 and all(int(path.name.removeprefix("step_")) % per_epoch for path in saved)
    shutil.copytree(saved[which], tmp_path / saved[which].name)
    resumed = program.train(tmp_path, *options, *only_resumed, "--resume_from_checkpoint", "latest")
    same_results(resumed, document)
    for name in ("model.safetensors", "tritonsparse.safetensors"):
        same_tensors(folder / name, tmp_path / name)
    if which == 0:
        same_run(folder, tmp_path, saved[1].name)
    if memory := list(saved[0].glob("memory_*")):
        # Of two chunks and two layers; without it, it would have been another run.
        tensors = load_file(memory[0])
        assert len(tensors) == 2 * 2 and all(tensor.shape == (8, 2, 16) for tensor in tensors.values())


@pytest.mark.parametrize("straight", ["language, rolled, part epochs, bf16"], indirect=True)
def test_writing_checkpoints_changes_nothing(straight: Any, tmp_path: Path) -> None:
    program, folder, document, options, _ = straight
    without = program.train(tmp_path, *(option for option in options if "checkpointing" not in option))
    assert without["perplexity"] == document["perplexity"]
    same_tensors(folder / "model.safetensors", tmp_path / "model.safetensors")


@only
def test_a_path_resumes_elsewhere_and_latest_without_a_checkpoint_starts_afresh(straight: Any, tmp_path: Path) -> None:
    program, folder, document, options, _ = straight
    other, afresh, before = tmp_path / "other", tmp_path / "afresh", sorted(folder.rglob("*"))
    # What is logged may differ.
    resumed = program.train(other, *options, f"--resume_from_checkpoint={folder / 'step_4'}", "--logging_steps=1")
    assert (resumed["bleu"], resumed["sparsity"]) == (document["bleu"], document["sparsity"])
    assert sorted(folder.rglob("*")) == before
    (afresh / ".unfinished-step_4").mkdir(parents=True)
    same_results(program.train(afresh, *options, "--resume_from_checkpoint=latest"), document)
    same_run(folder, afresh, "step_8")
    assert not (afresh / ".unfinished-step_4").exists()


def test_a_finished_run_resumes_to_its_own_results_and_an_epoch_at_its_end(translation: Any, tmp_path: Path) -> None:
    options = (*SOFT, "--max_tokens_per_batch=1600", "--num_train_epochs=2", "--checkpointing_steps=epoch")
    document = translation.train(tmp_path / "a", *options)
    shutil.copytree(tmp_path / "a" / "epoch_0", tmp_path / "b" / "epoch_0")
    for name in ("a", "b"):
        same_results(translation.train(tmp_path / name, *options, "--resume_from_checkpoint=latest"), document)
    same_run(tmp_path / "a", tmp_path / "b", "epoch_1")


@only
def test_a_run_goes_on_from_its_own_checkpoints_only_and_not_unasked(straight: Any) -> None:
    program, folder, _, base, _ = straight
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for options, words in (
        (["--vocab_size=190"], "run with vocab_size = 190, got 200"),
        (["--method=dense", "--method_args", "{}"], "run with method = 'dense', got"),
        (["--learning_rate=0.5"], "run with learning_rate = 0.5, got 0.01"),
        (["--seed=3"], "run with seed = 3, got 0"),
    ):
        line = program.refusal(folder, *base, *options, "--resume_from_checkpoint=latest")
        assert words in line and "repeat the arguments of that run or start afresh in another --output_dir" in line
    # A fresh run's checkpoints would be dropped by the limit, and averaged with the other's.
    line = program.refusal(folder, *base)
    assert "without checkpoints of an earlier run, got step_8" in line and "--resume_from_checkpoint latest" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


# The program in two children of one process that has computed nothing yet. The first is killed from outside once it has
# a checkpoint; the second resumes it and is killed while it writes its second: model written, optimizer not whole.
KILLED = """
import json, os, pathlib, signal, sys, time
from accelerate import Accelerator
from tritonsparse.train import translation
from tritonsparse.train.run import checkpoints
save, calls = Accelerator.save_state, []
def killed(self, folder):
    save(self, folder)
    calls.append(folder)
    if len(calls) == 2:
        (pathlib.Path(folder) / "optimizer.bin").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
output, found = pathlib.Path(sys.argv[1]), []
for kills_itself in (False, True):
    child = os.fork()
    if child == 0:
        if kills_itself:
            Accelerator.save_state = killed
        translation.main([*sys.argv[2:], "--output_dir", str(output)])
        os._exit(0)
    ended = (0, 0)
    while not kills_itself and not checkpoints.checkpoint_folders(output) and ended == (0, 0):
        time.sleep(0.005)
        ended = os.waitpid(child, os.WNOHANG)
    if not kills_itself:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    found.append([path.name for path in (checkpoints.checkpoint_folders(output)[-1], *output.glob(".unfinished-*"))])
    assert not (output / "all_results.json").exists()
print(json.dumps(found))
"""


def test_kill_9_in_mid_run_and_in_mid_checkpoint_ends_in_the_weights_of_the_run_never_killed(
    saved_marian: Callable[[float], Path], corpus_files: tuple[str, ...], translation: Any, tmp_path: Path
) -> None:
    options = [
        f"--model_name_or_path={saved_marian(0.1)}", *corpus_files, *SOFT, "--num_beams=1",
        "--max_tokens_per_batch=800", "--max_train_steps=30", "--num_warmup_steps=2", "--learning_rate=0.01",
        "--checkpointing_steps=2", "--checkpoints_total_limit=3",
    ]  # fmt: skip
    killed, never, resume = tmp_path / "killed", tmp_path / "never", "--resume_from_checkpoint=latest"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, str(killed), *options, resume]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    written = int(second[0].removeprefix("step_"))
    assert written == int(first[0].removeprefix("step_")) + 2
    assert second[1:] == [f".unfinished-step_{written + 2}"]
    with translation.small():
        assert translation.module.main([*options, resume, f"--output_dir={killed}"]) == 0
        assert translation.module.main([*options, f"--output_dir={never}"]) == 0
    same_run(never, killed, "step_30")
    assert list(killed.glob(".unfinished-*")) == []
    assert {path.name for path in never.iterdir()} == {path.name for path in killed.iterdir()}
