"""Two processes under torchrun are one process that accumulates two batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tritonsparse.train import translation
from tritonsparse.train.run import checkpoints

# The program; each translation begins with its source, and each rank leaves its master weights.
WORKER = """
import os, sys, torch
from tritonsparse.train import translation
finish, search, rank = translation.finish, translation.translate, os.environ["RANK"]
def marked(model, tokenizer, sources, **options):
    return [f"{s} | {text}" for s, text in zip(sources, search(model, tokenizer, sources, **options))]
def dump(run):
    finish(run)
    torch.save(run.loop.sparsifier.model.state_dict(), os.path.join(sys.argv[1], f"rank{rank}.pt"))
translation.finish, translation.translate = dump, marked
sys.exit(translation.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def options(saved_marian: Callable[[float], Path], corpus_files: tuple[str, ...]) -> list[str]:
    # No dropout: ranks draw their own. Three and five sentences: neither set divides by two. A large epsilon: Adam
    # would not notice gradients of the wrong scale.
    return [
        "--model_name_or_path", str(saved_marian(0.0)), *corpus_files, "--max_tokens_per_batch=400",
        "--max_train_steps=6", "--num_warmup_steps=2", "--learning_rate=0.1", "--num_beams=1", "--logging_steps=1",
        "--adam_epsilon=0.1",
        "--method_args", '{"threshold_init": -3}', "--checkpointing_steps=3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pair(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that two processes wrote, and what they printed."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    program = [str(folder / "worker.py"), str(folder), *options, "--output_dir", str(folder / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *program], env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def alone(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert translation.main([*options, "--gradient_accumulation_steps=2", "--output_dir", str(folder)]) == 0
    return folder


def results(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return document


def test_the_losses_are_those_of_one_process_with_accumulation(pair: Any, alone: Path) -> None:
    ours, theirs = results(pair[0] / "out"), results(alone)
    assert ours["environment"]["processes"] == 2
    assert [row["step"] for row in ours["history"]] == [1, 2, 3, 4, 5, 6]
    losses = [row["loss"] for row in theirs["history"]]
    assert [row["loss"] for row in ours["history"]] == pytest.approx(losses, rel=1e-4)
    assert ours["sparsity"] == pytest.approx(theirs["sparsity"], abs=1e-3)


def test_both_ranks_end_with_identical_weights_and_thresholds(pair: Any) -> None:
    first, second = (torch.load(pair[0] / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert any(key.endswith("threshold") for key in first)
    saved = load_file(pair[0] / "out" / "step_6" / "model.safetensors")
    assert [key for key in saved if not torch.equal(saved[key], first[key])] == []


def test_an_odd_evaluation_set_is_translated_once_and_in_order(
    pair: Any, alone: Path, corpus_files: tuple[str, ...]
) -> None:
    folder, out = pair
    ours, theirs = results(folder / "out"), results(alone)
    # Five test sentences over two ranks: 3 + 2, no duplicate that fills the shorter share.
    sources = [json.loads(line)["en"] for line in Path(corpus_files[-1].partition("=")[2]).read_text().splitlines()]
    printed = [line.removeprefix("  translation ") for line in out.splitlines() if line.startswith("  translation ")]
    assert [line.split(" | ")[0] for line in printed] == sources
    reference_words = [document["bleu_line"].split("ref_len = ")[1] for document in (ours, theirs)]
    assert reference_words[0] == reference_words[1]


def test_one_process_writes_and_prints(pair: Any) -> None:
    folder, out = pair
    assert out.count("BLEU on test") == 1
    assert [path.name for path in checkpoints.checkpoint_folders(folder / "out")] == ["step_3", "step_6"]
    assert {path.name for path in (folder / "out" / "step_6").iterdir()} >= {
        "model.safetensors", "optimizer.bin", "run.json", "random_states_0.pkl", "random_states_1.pkl",
        "tritonsparse_state.json",
    }  # fmt: skip
    assert not list((folder / "out").glob(".unfinished*"))


def test_a_checkpoint_of_two_processes_is_refused_by_one(
    pair: Any, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its random states and its batches are of two ranks: it could not go on bit for bit."""
    folder, _ = pair
    resume = ["--resume_from_checkpoint", str(folder / "out" / "step_3"), "--output_dir", str(tmp_path)]
    assert translation.main([*options, "--gradient_accumulation_steps=2", *resume]) == 2
    assert "expected a checkpoint of a run with" in capsys.readouterr().err
