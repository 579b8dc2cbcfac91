"""Benchmark programs start on any machine, and the queue runs what is due, within its budget, and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(BENCHMARKS))

import bench_train_step  # noqa: E402
import gpu_queue  # noqa: E402
import harness  # noqa: E402
import queue_runner  # noqa: E402
from queue_runner import Entry, Record, Store, run_queue  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "name",
    [
        *("threshold", "masked_gemm", "conv", "whole_model", "packed", "train_step"),
        *("block", "block_step", "block_inference", "semi_structured"),
    ],
)
def test_smoke_prints_machine_table_and_json_and_writes_the_same(name: str, tmp_path: Path) -> None:
    run = program(f"bench_{name}", "--smoke", "--out", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("device ") and "median_ms" in lines[1]
    document = json.loads(lines[-1])
    assert {row["verdict"] for row in document["rows"]} == {"right"}
    assert all(row["median_ms"] > 0 for row in document["rows"])
    (written,) = tmp_path.glob(f"*/{name}.json")
    assert json.loads(written.read_text()) == document


@no_gpu
@pytest.mark.parametrize("name", ["bench_threshold", "gpu_queue"])
def test_without_a_gpu_programs_refuse_in_one_sentence(name: str, tmp_path: Path) -> None:
    run = program(name, "--out", str(tmp_path))
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(f"{name}: expected a GPU") and run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_case_beyond_its_bound_is_wrong_and_gets_no_time() -> None:
    def never() -> harness.Timing:
        raise AssertionError("a wrong case was timed")

    for error in (0.2, float("nan")):
        row = harness.gated({"case": "c"}, error, 0.1, never)
        assert row["verdict"] == "WRONG" and row["median_ms"] is None
        assert "WRONG" in harness.table([row], {"case": "", "median_ms": ".2f"})
    right = harness.gated({}, 0.1, 0.1, lambda: harness.Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 9.0]))
    # Sorted positions 0.5, 0.2 and 0.8 of 5: the third (2.5 rounds to even), the second and the fifth.
    assert (right["median_ms"], right["p20_ms"], right["p80_ms"]) == (3.0, 2.0, 5.0)


def test_a_variant_that_does_not_run_is_a_row_with_its_error() -> None:
    case = bench_train_step.Case("transformer-tiny", 64, 1, 4, "cpu", "no such compiler")
    rows = bench_train_step.bench(case, ("dense",), ("eager", "compile"), 1, 1)
    assert [row["verdict"] for row in rows] == ["right", "failed"]
    assert "no such compiler" in rows[1]["failure"] and "median_ms" not in rows[1]


def test_every_entry_names_sources_that_exist_and_a_record_of_its_own() -> None:
    entries = gpu_queue.entries(None)
    assert len({(entry.file, entry.key) for entry in entries}) == len(entries)
    assert len({entry.file for entry in entries}) <= 8
    assert all(entry.minimum <= entry.estimate and entry.hash() for entry in entries)
    runs = [entry for entry in entries if entry.file == "multi30k"]
    assert len(runs) == 3 * 21 and {entry.missing for entry in runs} == {"no data"}
    # The data's place is no part of what a result depends on.
    assert [entry.hash() for entry in runs] == [
        entry.hash() for entry in gpu_queue.entries(Path("/data")) if entry.file == "multi30k"
    ]


def test_training_commands_are_ones_the_program_takes() -> None:
    from tritonsparse.pattern import parse
    from tritonsparse.train import arguments, translation
    from tritonsparse.train.program import make_method

    for entry in gpu_queue.entries(Path("/data")):
        if entry.file == "multi30k":
            args = arguments.parse(translation.parser(), entry.command[3:])
            named, seed = entry.key.split("/")
            assert args.method == named.split()[0] and str(args.seed) == seed
            method = make_method("translation", args)
            assert method.name == args.method and isinstance(parse(args.pattern), method.patterns)
            if " " in named:
                assert named.split()[1:] == [args.pattern, "70"] and method.sparsity == 0.7


def test_language_commands_are_ones_the_program_takes() -> None:
    from tritonsparse.train import arguments, language_modeling
    from tritonsparse.train.program import make_method

    runs = [entry for entry in gpu_queue.entries(None, Path("/text")) if entry.file == "wikitext2"]
    assert len(runs) == 6 and {entry.missing for entry in runs} == {""}
    for entry in runs:
        args = arguments.parse(language_modeling.parser(), entry.command[3:])
        assert (args.method, str(args.seed)) == tuple(str(entry.key).split("/"))
        assert make_method("language_modeling", args).name == args.method and args.save_twins


def test_image_commands_are_ones_the_program_takes() -> None:
    from tritonsparse.train import arguments
    from tritonsparse.train.image_arguments import parser
    from tritonsparse.train.program import make_method

    runs = [entry for entry in gpu_queue.entries(None, None, Path("/images")) if entry.file == "fashion_mnist"]
    assert len(runs) == 15 and {entry.missing for entry in runs} == {""}
    for entry in runs:
        args = arguments.parse(parser("image_classification", None), entry.command[3:])
        assert (args.method, str(args.seed)) == tuple(str(entry.key).split("/"))
        method = make_method("image_classification", args)
        assert method.name == args.method
        # AC/DC refuses a run of another length than its phases.
        assert not hasattr(method, "phases") or method.phases.epochs == args.num_train_epochs


def test_a_training_result_is_compact(tmp_path: Path) -> None:
    row = {"loss": 1.0, "thresholds": {"a": 0.1}, "layer_sparsity": {"a": 0.123456}}
    keys = (
        "method", "method_fields", "bleu", "bleu_line", "bleu_signature", "split", "num_beams", "sparsity",
        "train_flops_fraction", "test_flops_fraction", "steps", "training_seconds", "epoch_losses",
        "evaluations", "environment",
    )  # fmt: skip
    document = {
        **dict.fromkeys(keys, 1),
        "arguments": {"seed": 3},
        "history": [{"step": step, **row} for step in range(601)],
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "all_results.json").write_text(json.dumps(document))
    result = gpu_queue._training(tmp_path, "")
    assert result["seed"] == 3 and result["layer_sparsity"] == {"a": 0.1235}
    assert len(result["history"]) <= gpu_queue.HISTORY + 1
    assert [result["history"][0], result["history"][-1]] == [
        {"step": 0, "loss": 1.0},
        {"step": 600, "loss": 1.0},
    ]


def test_test_reports_are_counted(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase name="a" time="1"/><testcase name="b" time="2"><failure message="no"/>'
        '</testcase><testcase name="c" time="0"><skipped message="why"/></testcase></testsuite></testsuites>'
    )
    result = gpu_queue._tests(tmp_path, "")
    assert result["passed"] == 1 and result["failed"] == {"b": "no"} and result["skipped"] == {"c": "why"}
    assert list(result["slowest"]) == ["b", "a", "c"]


@no_gpu
def test_dry_run_lists_entries_and_their_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = (entry for entry in gpu_queue.entries(None) if entry.name == "packed activations")
    queue = {"state": "done", "sources": entry.hash(), "seconds": 12.0}
    harness.write_json(tmp_path / "some-gpu" / f"{entry.file}.json", {entry.key: {"queue": queue}})
    assert gpu_queue.main(["--dry-run", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.split("some-gpu")[1].splitlines()
    assert [line.split()[:3] for line in lines if line.startswith(entry.name)] == [[*entry.name.split(), "done"]]
    assert any("multi30k dense 0" in line and "no data" in line for line in lines)


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


def read_result(work: Path, output: str) -> Record:
    return {"output": output.strip()}


def fake(name: str, code: str = "print('fine')", **changes: Any) -> Entry:
    """An entry that runs a line of Python and measures `benchmarks/harness.py`."""
    facts: dict[str, Any] = {
        "name": name, "command": (sys.executable, "-S", "-c", code), "collect": read_result,
        "sources": ("benchmarks/harness.py",), "estimate": 1, "minimum": 0, "file": name,
    }  # fmt: skip
    return Entry(**(facts | changes))


def run(entries: list[Entry], folder: Path, budget: float = 60.0) -> dict[str, str]:
    return run_queue(entries, Store(folder), budget, os.environ, say=lambda line: None)


def test_results_are_written_and_not_made_twice(tmp_path: Path) -> None:
    entry = fake("a")
    assert run([entry], tmp_path) == {"a": "ran"}
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["output"] == "fine" and record["queue"]["state"] == "done"
    assert run([entry], tmp_path) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_changed_sources_or_another_command_make_a_result_stale(tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text("1")
    entry = fake("a", sources=("*.py",))
    before = entry.hash(tmp_path)
    assert entry.hash(tmp_path) == before
    (tmp_path / "source.py").write_text("2")
    assert entry.hash(tmp_path) != before
    assert fake("a", "print(2)").hash() != fake("a").hash()
    with pytest.raises(ValueError, match=r"expected files for 'none\.py'.*correct the entry"):
        fake("a", sources=("none.py",)).hash(tmp_path)

    store = Store(tmp_path / "results")
    store.write(entry, {}, {"state": "done", "sources": "older"})
    assert store.state(fake("a")) == "stale" and store.due(fake("a"))


def test_a_failing_entry_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    failing = fake("bad", "import sys; print('it broke'); sys.exit(3)")
    assert run([failing, fake("good")], tmp_path) == {"bad": "failed", "good": "ran"}
    queue = json.loads((tmp_path / "bad.json").read_text())["queue"]
    assert queue["state"] == "failed" and queue["status"] == 3 and "it broke" in queue["output"]

    def unreadable(work: Path, output: str) -> Record:
        raise ValueError("no JSON")

    assert run([fake("odd", collect=unreadable)], tmp_path) == {"odd": "failed"}
    assert json.loads((tmp_path / "odd.json").read_text())["queue"]["reason"] == "ValueError: no JSON"


def test_a_failure_does_not_overwrite_an_earlier_result(tmp_path: Path) -> None:
    run([fake("a")], tmp_path)
    assert run([fake("a", "import sys; sys.exit(1)")], tmp_path) == {"a": "failed"}
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["output"] == "fine" and record["queue"]["state"] == "done"
    assert record["queue"]["last_attempt"]["state"] == "failed"
    assert Store(tmp_path).state(fake("a", "import sys; sys.exit(1)")) == "stale"


def test_the_budget_ends_an_entry_and_what_it_started(tmp_path: Path) -> None:
    sleep = "import subprocess, sys, time; time.sleep(60)"
    marker = tmp_path / "child"
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-S', '-c', '{sleep}'])\n"
        f"open({str(marker)!r}, 'w').write(str(child.pid))\nchild.wait()"
    )
    start = time.monotonic()
    outcomes = run([fake("slow", code), fake("later", minimum=0.5)], tmp_path, queue_runner.RESERVE + 2)
    assert time.monotonic() - start < 30
    assert outcomes == {"slow": "unfinished", "later": "left"}
    assert json.loads((tmp_path / "slow.json").read_text())["queue"]["state"] == "unfinished"
    assert not (tmp_path / "later.json").exists()
    status = Path(f"/proc/{marker.read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_an_entry_that_needs_more_than_is_left_is_not_started_but_a_shorter_one_is(tmp_path: Path) -> None:
    outcomes = run([fake("long", minimum=1e6), fake("short")], tmp_path)
    assert outcomes == {"long": "left", "short": "ran"}


def test_an_entry_without_its_data_is_left(tmp_path: Path) -> None:
    entry = fake("a", "print('{data}')", data=None)
    assert Store(tmp_path).state(entry) == "no data"
    assert run([entry], tmp_path) == {"a": "left"} and not list(tmp_path.iterdir())
    assert run([fake("a", "print('{data}')", data=tmp_path)], tmp_path) == {"a": "ran"}
    assert json.loads((tmp_path / "a.json").read_text())["output"] == str(tmp_path)


def test_keyed_entries_share_a_file_and_earlier_results_count(tmp_path: Path) -> None:
    keys = ("dense/0", "str/0", "dense/1")
    runs = [fake(key, file="runs", key=key) for key in keys]
    earlier, folder = tmp_path / "earlier", tmp_path / "new"
    assert run(runs[:1], earlier) == {"dense/0": "ran"}
    store = Store(folder, earlier)
    outcomes = run_queue(runs, store, 60.0, os.environ, say=lambda line: None)
    assert outcomes == {"str/0": "ran", "dense/1": "ran"}
    document = json.loads((folder / "runs.json").read_text())
    assert {method: sorted(seeds) for method, seeds in document.items()} == {"dense": ["0", "1"], "str": ["0"]}
    assert all(store.state(entry) == "done" for entry in runs)
