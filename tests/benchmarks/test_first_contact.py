"""The first call on a GPU, without one: rows survive what breaks a case, a step or the program, and it ends in time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import first_contact
import first_contact_kernels
import first_contact_summary
import first_contact_timing
import pytest
import torch
from first_contact import Step
from first_contact_child import Context
from first_contact_timing import EXACT, Bound, Case, Provider, compare
from row_log import RowLog, read_rows

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
Main = Callable[..., int]
# A step whose cases do what their names say, on a machine without a GPU and in a process that is spared real imports.
BREAKING = """
import os, sys, time
from types import SimpleNamespace
sys.modules["__main__"].LEAST_PATIENCE = float(os.environ.get("PATIENCE", "1"))
sys.modules |= {
    "torch": SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)), "triton": None,
    "harness": SimpleNamespace(environment=lambda: {"device": "d"}),
    "targets": SimpleNamespace(UnknownCard=KeyError, targets_for=lambda device: {}),
}

def raises(add):
    raise ValueError("on purpose")

def dies(add):
    os._exit(9)

def hangs(add):
    time.sleep(1000)

def run(context):
    context.case("fine", 0.1, lambda add: add({"verdict": "right"}))
    for name in os.environ["BREAKING"].split():
        context.case(name, 0.1, globals()[name])
    context.case("long", 1e6, lambda add: add({"verdict": "right"}))
    context.case("last", 0.1, lambda add: add({"verdict": "right"}))
"""


@pytest.fixture
def breaking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """Runs the program with steps "a" and "b", of the module above; the names of cases that break it come with them."""
    (tmp_path / "breaking.py").write_text(BREAKING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(first_contact, "START", time.monotonic())

    def main(names: str, *options: str, budget: float = 3600.0, least: float = 0.0) -> int:
        monkeypatch.setenv("BREAKING", names)
        steps = (Step("a", "breaking", "kernels", 0, 3600), Step("b", "breaking", "blocks", least, 3600))
        monkeypatch.setattr(first_contact, "STEPS", steps)
        return first_contact.main(["--out", str(tmp_path / "out"), "--budget", str(budget), *options])

    return main


def verdicts(path: Path) -> dict[str, str]:
    return {row["case"]: row["verdict"] for row in read_rows(path)}


def test_what_breaks_a_case_loses_that_case(breaking: Main, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert breaking("raises dies hangs", "--smoke") == 1
    expected = {"fine": "right", "raises": "failed", "dies": "crashed", "hangs": "hung"}
    for name in ("kernels", "blocks"):
        assert verdicts(tmp_path / "out" / f"{name}.jsonl") == {**expected, "long": "skipped", "last": "right"}
    document = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert document["steps"] == {"a": "done", "b": "done"} and len(document["bad"]) == 6
    assert document["skipped"] == ["a: long", "b: long"]
    printed = capfd.readouterr().out
    assert "on purpose" in printed and "hung: a, hangs" in printed and "skipped for time: 2 cases" in printed


def test_it_ends_within_its_budget_or_without_a_gpu(breaking: Main, tmp_path: Path, capfd: Any) -> None:
    # A case that would hang for ever, and a step that would need more than there is.
    assert breaking("", "--smoke", budget=600.0, least=1000.0) == 0
    rows = read_rows(tmp_path / "out" / "run.jsonl")
    assert [row["state"] for row in rows if "step" in row] == ["done", "skipped"]
    assert verdicts(tmp_path / "out" / "kernels.jsonl") == {"fine": "right", "long": "skipped", "last": "right"}
    assert breaking("") == 2
    assert "expected a GPU that torch sees, got none" in capfd.readouterr().out


def test_a_hanging_step_ends_with_the_budget(breaking: Main, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATIENCE", "3600")
    breaking("hangs", "--smoke", budget=first_contact.RESERVE + 4)
    states = {row["step"]: row["state"] for row in read_rows(tmp_path / "out" / "run.jsonl") if "step" in row}
    assert states["a"] == "hung" and (tmp_path / "out" / "summary.json").is_file()


def test_a_kill_keeps_the_rows_and_a_later_run_works(tmp_path: Path, started: Any) -> None:
    (tmp_path / "breaking.py").write_text(BREAKING)
    code = (
        f"import sys; sys.path.append({str(BENCHMARKS)!r})\n"
        "import first_contact as f\n"
        "f.STEPS = (f.Step('a', 'breaking', 'kernels', 0, 3600),)\n"
        f"sys.exit(f.main(['--out', {str(tmp_path / 'out')!r}, '--smoke', '--budget', '3600']))"
    )
    environment = {"PYTHONPATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    rows = tmp_path / "out" / "kernels.jsonl"
    # Its patience of a second is over once; then it is started again behind the case.
    hanging = environment | {"BREAKING": "hangs hangs"}
    killed = started("-c", code, env=hanging, ready=lambda: bool(read_rows(rows)))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    first = read_rows(rows)
    assert first[0]["case"] == "fine" and first[0]["verdict"] == "right"
    with rows.open("a") as file:
        file.write('{"run": "cut sho')
    assert started("-c", code, env=environment | {"BREAKING": ""}, ready=lambda: True).wait() == 0
    later = [row for row in read_rows(rows) if row["run"] != first[0]["run"]]
    assert [row["case"] for row in later] == ["fine", "long", "last"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["run"] == later[0]["run"]


def context(folder: Path) -> Context:
    return Context("step", RowLog(folder / "blocks.jsonl"), "run", smoke=True)


def test_a_wrong_case_is_wrong_and_gets_no_time(tmp_path: Path) -> None:
    right = torch.ones(8, 8, dtype=torch.float64)
    one_off = right.clone()
    one_off[3, 3] = 1.01

    def broken() -> torch.Tensor:
        raise RuntimeError("does not compile")

    loose = Bound(1e-2, 1e-4)
    calls: dict[str, tuple[Callable[[], Any], Bound]] = {
        "dense": (right.clone, EXACT), "ours": (right.clone, EXACT),
        # Within the bound on all, beyond that on one.
        "one element off": (lambda: one_off, loose), "unwritten": (lambda: torch.empty(8, 8), loose),
        "broken": (broken, loose),
    }  # fmt: skip
    providers = [
        Provider(name, [call], lambda: (right,), bound, ratios=((name, "T1", 1.0),))
        for name, (call, bound) in calls.items()
    ]
    rows: list[dict[str, Any]] = []
    compare(context(tmp_path), Case("case", 1, {"op": "o"}, lambda: providers), rows.append)
    found = {row["provider"]: row for row in rows}
    wrong = {"one element off": "WRONG", "unwritten": "WRONG", "broken": "failed"}
    assert {name: row["verdict"] for name, row in found.items()} == {"dense": "right", "ours": "right", **wrong}
    for name in wrong:
        assert not {"median_ms", "ratios"} & set(found[name])
    assert found["ours"]["median_ms"] > 0 and found["ours"]["ratios"][0]["target"] == "T1"
    # Every row can be written: JSON has no NaN.
    assert all(json.loads(json.dumps(row, allow_nan=False)) for row in rows)


def test_a_wrong_cut_off_is_told_by_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = first_contact_kernels.topk_cutoff

    def off_by_one(tensors: Any, kept: int, **given: Any) -> Any:
        return real(tensors, kept - 1, **given)

    for cutoff, verdict in ((real, "right"), (off_by_one, "WRONG")):
        monkeypatch.setattr(first_contact_kernels, "topk_cutoff", cutoff)
        rows: list[dict[str, Any]] = []
        (case,) = first_contact_kernels.topk(True)
        compare(context(tmp_path), case, rows.append)
        assert {row["verdict"] for row in rows if row["provider"] != "read"} == {verdict}


def test_figures_of_several_rows_are_made_and_judged_by_the_cards_targets(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "blocks.jsonl")
    for density, ms in ((1.0, 1.25), (0.5, 0.5), (0.1, 0.1)):
        for op in ("forward", "grad_input", "grad_weight"):
            facts = {"run": "r", "step": "blocks", "case": f"{op} {density}", "op": op, "block": 128}
            times = {"provider": "ours", "verdict": "right", "median_ms": ms, "beside_ms": 1.0}
            log.append({**facts, **times, "density": density})
    targets = {"T9@50": [1.5, 1.8, 1.9], "T9@90": [5.5, 11.0, 12.0], "T12@128": [20.0, 10.0, 5.0]}
    RowLog(tmp_path / "run.jsonl").append({"run": "r", "environment": {"device": "d"}, "targets": targets})
    assert first_contact_summary.summarize(tmp_path, "r") == 0
    figures = {each["target"]: each for each in json.loads((tmp_path / "summary.json").read_text())["figures"]}
    assert figures["T9@50"]["value"] == pytest.approx(2.0) and figures["T9@50"]["met"] is True
    assert figures["T9@90"]["value"] == pytest.approx(10.0) and figures["T9@90"]["met"] is False
    # Time is 0.5 + 0.75 (d - 0.5) / 0.5 between the two: 1 at d = 0.8333. Less is better.
    assert figures["T12@128"]["value"] == pytest.approx(100 / 6) and figures["T12@128"]["met"] is False
    # Bounds of products are those of the arithmetic.
    bound = Bound.of_product(4096, torch.float32)
    # Twice 5.2e-6, which tensor cores were seen to make; the roundings of float32 beside it are small.
    assert 1.0e-5 < bound.rms < 1.2e-5 < bound.worst < 2.0e-4
    assert Bound.of_product(4096, torch.bfloat16).rms == pytest.approx(2**-8, rel=0.01)


def test_steps_are_listed_and_misuse_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert first_contact.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    files = {f"{step.file}.jsonl" for step in first_contact.STEPS} | {"run.jsonl", "summary.json"}
    assert len(files) <= 8
    for options, words in (
        *((["--budget", budget], "a --budget of seconds above 0") for budget in ("nan", "0", "-5", "inf")),
        (["--out", __file__ + "/out"], "a folder for --out"),
        (["--only", "nothing"], "a step among ceilings"),
    ):
        assert first_contact.main(["--out", str(tmp_path), *options]) == 2
        assert f"first_contact: expected {words}" in capsys.readouterr().err


def smoke_elsewhere(tmp_path: Path, *arguments: str) -> tuple[Path, list[dict[str, Any]]]:
    """The smoke form in a copy of the tree as it is on a GPU machine: no .git, no `datasets`, triton 3.6 if at hand."""
    tree, blocked, out = tmp_path / "tree", tmp_path / "blocked", tmp_path / "out"
    for name in ("tritonsparse", "kernels", "eval", "train", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(
        "import importlib.machinery as m\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = classmethod(\n"
        "    lambda cls, name, *more: None if name.partition('.')[0] == 'datasets' else find(name, *more))\n"
    )
    triton = os.environ.get("TRITONSPARSE_TRITON36", "")
    path = os.pathsep.join(filter(None, (str(blocked), triton)))
    program = [sys.executable, str(tree / "benchmarks" / "first_contact.py"), "--smoke", "--budget", "3600"]
    command, environment = [*program, "--out", str(out), *arguments], {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    run = subprocess.run(command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    notes = read_rows(out / "run.jsonl")
    (machine,) = (row for row in notes if "environment" in row)
    assert machine["package"] == str((tree / "tritonsparse").resolve()) and machine["environment"]["commit"] is None
    if triton:
        assert machine["environment"]["triton"] == "3.6.0"
    assert len(list(out.iterdir())) <= 8
    return out, notes


def test_the_smoke_form_runs_in_a_tree_without_git(tmp_path: Path) -> None:
    out, notes = smoke_elsewhere(tmp_path, "--only", "ceilings", "--only", "blocks")
    assert {row["step"]: row["state"] for row in notes if "step" in row} == {"ceilings": "done", "blocks": "done"}
    rows = read_rows(out / "blocks.jsonl")
    assert {row["verdict"] for row in rows} == {"right"} and all(row["median_ms"] > 0 for row in rows)
    # The interpreter of triton 3.6 does not run beside today's numpy.
    code = "torch reference" if "TRITONSPARSE_TRITON36" in os.environ else "triton, interpreted"
    assert {row["backend"] for row in rows if row["provider"] == "ours"} == {code}


@pytest.mark.long
def test_every_step_has_a_smoke_form(tmp_path: Path) -> None:
    out, notes = smoke_elsewhere(tmp_path)
    states = {row["step"]: row["state"] for row in notes if "step" in row}
    assert states == {step.name: "done" for step in first_contact.STEPS}
    rows = first_contact_summary.rows_of(out, notes[0]["run"])
    assert {row["verdict"] for row in rows if "verdict" in row} == {"right"}
    assert {row["step"] for row in rows} == set(states)
    (collected,) = (row["collected"] for row in rows if "collected" in row)
    assert collected > 500 and any(row.get("outcome") == "passed" for row in rows)
    # One compiled graph serves all layers of a kind, cached views or not.
    assert {row["provider"]: row["graphs"] for row in rows if row["step"] == "train_step"} == {
        "dense": 2, "autosparse": 2, "cached": 2,
    }  # fmt: skip
    assert first_contact_timing.how() in ("torch reference", "triton")
