"""What the queue of GPU work holds: commands that programs take, records of their own, results that are compact."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_queue
import harness
import pytest
import queue_entries
import queue_store
import queue_training
import torch
from queue_store import Store

from tritonsparse.pattern import parse
from tritonsparse.train.images import arguments as image_arguments
from tritonsparse.train.run import arguments
from tritonsparse.train.run.program import make_method
from tritonsparse.train.text import language_arguments, translation_arguments

ROOT = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def test_every_entry_names_sources_that_exist_and_a_record_of_its_own() -> None:
    entries = queue_entries.entries(None)
    hashes = {(entry.file, entry.key): entry.hash() for entry in entries}
    assert len(hashes) == len(entries) and all(hashes.values())
    assert len({entry.file for entry in entries}) <= 8
    assert all(entry.minimum <= entry.estimate for entry in entries)
    runs = [entry for entry in entries if entry.file == "multi30k"]
    assert len(runs) == 3 * 21 and {entry.missing for entry in runs} == {"no data"}
    # The data's place is no part of what a result depends on.
    placed = [entry for entry in queue_entries.entries(Path("/data")) if entry.file == "multi30k"]
    assert len(placed) == len(runs) and all(entry.hash() == hashes[entry.file, entry.key] for entry in placed)


@pytest.mark.parametrize(
    ("task", "file", "count", "parser"),
    [
        ("translation", "multi30k", 63, translation_arguments.parser),
        ("language_modeling", "wikitext2", 6, language_arguments.parser),
        ("image_classification", "fashion_mnist", 15, lambda: image_arguments.parser("image_classification", None)),
    ],
)
def test_training_commands_are_taken(task: str, file: str, count: int, parser: Callable[[], Any]) -> None:
    entries = queue_entries.entries(Path("/data"), Path("/text"), Path("/images"))
    runs = [entry for entry in entries if entry.file == file]
    assert len(runs) == count and {entry.missing for entry in runs} == {""}
    for entry in runs:
        args = arguments.parse(parser(), entry.command[3:])
        named, seed = str(entry.key).split("/")
        method = make_method(task, args)
        assert method.name == args.method == named.split()[0] and str(args.seed) == seed
        if file == "multi30k":
            assert isinstance(parse(args.pattern), method.patterns)
        if " " in named:
            assert named.split()[1:] == [args.pattern, "70"] and method.sparsity == 0.7
        # Twins are for language models alone.
        assert file != "wikitext2" or args.save_twins
        # AC/DC refuses a run of another length than its phases.
        assert file != "fashion_mnist" or not hasattr(method, "phases") or method.phases.epochs == args.num_train_epochs


def test_a_training_result_is_compact(tmp_path: Path) -> None:
    row = {"loss": 1.0, "thresholds": {"a": 0.1}, "layer_sparsity": {"a": 0.123456}}
    keys = (
        "method", "method_fields", "bleu", "bleu_line", "bleu_signature", "split", "num_beams", "sparsity",
        "train_flops_fraction", "test_flops_fraction", "steps", "training_seconds", "epoch_losses",
        "evaluations", "environment",
    )  # fmt: skip
    history = [{"step": step, **row} for step in range(601)]
    document = {**dict.fromkeys(keys, 1), "arguments": {"seed": 3}, "history": history}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "all_results.json").write_text(json.dumps(document))
    result = queue_training._training(tmp_path, "")
    assert result["seed"] == 3 and result["layer_sparsity"] == {"a": 0.1235}
    assert len(result["history"]) <= queue_training.HISTORY + 1
    assert [result["history"][0], result["history"][-1]] == [{"step": 0, "loss": 1.0}, {"step": 600, "loss": 1.0}]


def test_commands_of_benchmarks_are_ones_the_programs_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option that a program does not know ends it before it asks for a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for entry in queue_entries.entries(None):
        if entry.stage != queue_store.LONG:
            program = importlib.import_module(Path(entry.command[1]).stem)
            with pytest.raises(SystemExit):
                program.main([word.replace("{work}", "out").replace("{rows}", "rows") for word in entry.command[2:]])
            assert "expected a GPU that torch sees" in capsys.readouterr().err, entry.name


def test_quick_forms_come_before_tests_and_full_forms_and_training_last(tmp_path: Path) -> None:
    entries = queue_entries.entries(Path("/data"))
    stages = [entry.stage for entry in Store(tmp_path).order(reversed(entries))]
    assert stages == sorted(stages) and set(stages) == set(range(4))
    quick = {entry.command[1:-1] for entry in entries if entry.stage == queue_store.QUICK}
    full = {entry.command[1] for entry in entries if entry.stage == queue_store.FULL}
    assert {command[0] for command in quick} == full
    assert all(entry.command[-1] == "--quick" for entry in entries if entry.stage == queue_store.QUICK)


def test_what_an_entry_compiles_is_in_its_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = queue_entries.compile_counts()
    assert set(counts) <= {entry.name for entry in queue_entries.entries(None)}
    assert all(count >= 0 for count in counts.values())

    # What an entry compiles is in its estimate.
    def estimates() -> dict[str, float]:
        return {entry.name: entry.estimate for entry in queue_entries.entries(None)}

    monkeypatch.setattr(queue_entries, "compile_counts", dict)
    monkeypatch.setattr(queue_entries.os, "cpu_count", lambda: 16)
    none = estimates()
    monkeypatch.setattr(queue_entries, "compile_counts", lambda: {"block": 100, "gpu tests": 1400})
    counted = estimates()
    added = {name: counted[name] - none[name] for name in none if counted[name] != none[name]}
    # The tests' kernels are compiled by 14 processes; where nobody has counted them 50 s stand for it.
    assert added == {"block": pytest.approx(45), "gpu tests": pytest.approx(45 - 50)}


@no_gpu
def test_dry_run_lists_entries_and_their_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = (entry for entry in queue_entries.entries(None) if entry.name == "packed activations")
    queue = {"state": "done", "sources": entry.hash(), "seconds": 12.0}
    harness.write_json(tmp_path / "some-gpu" / f"{entry.file}.json", {entry.key: {"queue": queue}})
    assert gpu_queue.main(["--dry-run", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.split("some-gpu")[1].splitlines()
    (line,) = (line for line in lines if line.startswith(f"{entry.name} "))
    assert line.split()[-4:] == ["done", "-", "12", "12"]
    assert any("multi30k dense 0" in line and "no data" in line for line in lines)


@no_gpu
def test_the_queue_can_be_narrowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*options: str) -> list[str]:
        assert gpu_queue.main(["--dry-run", "--out", str(tmp_path), *options]) == 0
        rows = capsys.readouterr().out.split("expected\n")[1].split("\n\n")[0].splitlines()
        return [row.partition("  ")[0] for row in rows]

    assert set(listed("--quick")) == {f"{bench.name}, quick" for bench in queue_entries.QUICK_BENCHES}
    assert listed("--only", "block step*") == ["block step, quick", "block step"]
    with pytest.raises(SystemExit) as status:
        gpu_queue.main(["--dry-run", "--only", "nothing"])
    assert status.value.code == 2 and "gpu_queue: expected --only to match" in capsys.readouterr().err


def test_where_pip_cannot_install_the_packages_are_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An interpreter without this environment's packages, and without pip: -I -S.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(gpu_queue, "PYTHON", str(bare))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    variables, how = gpu_queue.python_environment(scratch)
    assert "is linked in" in how and variables["PYTHONPATH"].startswith(str(scratch))
    find = "from importlib.util import find_spec; print(find_spec('tritonsparse').origin)"
    run = subprocess.run([str(bare), "-c", find], env=variables, capture_output=True, text=True, cwd=ROOT)
    assert Path(run.stdout.strip()).resolve() == ROOT / "tritonsparse" / "__init__.py"
    assert (scratch / "tritonsparse" / "kernels").resolve() == ROOT / "kernels"
