"""What a run leaves behind: results whole or not there, plots, the summary, and the reference losses read back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from torch import nn

import tritonsparse as ts
from tritonsparse.report import as_rows
from tritonsparse.train import translation
from tritonsparse.train.run import results


@pytest.fixture
def sparsifier() -> ts.Sparsifier:
    return ts.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), "gmp", sparsity=0.5, total_steps=4)


def document(sparsifier: ts.Sparsifier) -> dict[str, Any]:
    rows = [
        {"step": step, "loss": 1 / step, "sparsity": 0.1 * step, "layer_sparsity": {"0": 0.1, "1": 0.2}}
        for step in (1, 2, 3)
    ]
    return {
        "history": rows, "layers": as_rows(sparsifier.report()), "train_flops_fraction": 0.75,
        "test_flops_fraction": 0.5, "split": "test", "num_beams": 4, "bleu": 12.345, "bleu_line": "BLEU|... = 12.3",
        "bleu_signature": "nrefs:1|tok:13a", "flops_convention": "autosparse",
    }  # fmt: skip


def dense_run(folder: Path, **fields: Any) -> str:
    path = folder / "all_results.json"
    path.write_text(json.dumps({"method": "dense", **fields}), encoding="utf-8")
    return str(path)


def test_results_are_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.write({"bleu": 1.0}, tmp_path / "all_results.json")
    with pytest.raises(TypeError):
        results.write({"bleu": object()}, tmp_path / "all_results.json")
    assert json.loads((tmp_path / "all_results.json").read_text(encoding="utf-8")) == {"bleu": 1.0}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        results.write({"bleu": 2.0}, tmp_path / "all_results.json")
    assert json.loads((tmp_path / "all_results.json").read_text(encoding="utf-8")) == {"bleu": 1.0}


def test_the_environment_says_on_what_and_with_what_the_run_was_made() -> None:
    found = results.environment(Accelerator(cpu=True))
    assert set(found) == {
        "device", "cpu_threads", "processes", "mixed_precision", "python", "torch", "transformers", "accelerate",
        "commit",
    }  # fmt: skip
    assert (found["processes"], found["mixed_precision"]) == (1, "no")
    assert found["device"]
    json.dumps(found)


def test_a_copy_outside_a_git_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ts, "__file__", str(tmp_path / "tritonsparse" / "__init__.py"))
    assert results.environment(Accelerator(cpu=True))["commit"] is None


def test_the_plots_are_png_files(tmp_path: Path, sparsifier: ts.Sparsifier) -> None:
    results.plot(document(sparsifier), tmp_path)
    for name in ("training.png", "layer_sparsity.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("count", "shown"),
    [(10, [0, 2, 4, 6, 8]), (5, [0, 1, 2, 3, 4]), (3, [0, 1, 2])],
)
def test_the_summary_shows_five_translations_spread_over_the_set(
    sparsifier: ts.Sparsifier, capsys: pytest.CaptureFixture[str], tmp_path: Path, count: int, shown: list[int]
) -> None:
    pairs = [(f"source-{number}.", f"reference-{number}.") for number in range(count)]
    hypotheses = [f"hypothesis-{number}." for number in range(count)]
    translation.show(document(sparsifier), sparsifier.report(), pairs, hypotheses, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    for kind in ("source", "reference", "hypothesis"):
        expected = [f"{kind}-{number}." for number in shown]
        assert [line.split()[-1] for line in lines if f" {kind}-" in line] == expected


def test_the_summary_has_bleu_its_signature_the_table_and_the_flops(
    sparsifier: ts.Sparsifier, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    translation.show(document(sparsifier), sparsifier.report(), [("a", "b")], ["c"], tmp_path)
    out = capsys.readouterr().out
    assert str(sparsifier.report()) in out
    assert "BLEU on test (4 beams): 12.35" in out or "BLEU on test (4 beams): 12.34" in out
    assert "signature: nrefs:1|tok:13a" in out
    assert "FLOPs by the convention 'autosparse' (linear and convolution layers): " in out
    assert "training 75.0% of dense (25.0% saved), inference 50.0% of dense (50.0% saved)" in out
    assert str(tmp_path) in out


@pytest.mark.parametrize(("epochs", "read"), [(1, 1), (4, 1), (10, 1), (11, 2), (44, 5)])
def test_reference_losses_are_those_of_the_first_tenth_of_the_epochs(tmp_path: Path, epochs: int, read: int) -> None:
    losses = [1.0 / (1 + epoch) for epoch in range(epochs)]
    assert results.read_epoch_losses(dense_run(tmp_path, epoch_losses=losses)) == losses[:read]


def test_reference_losses_that_are_not_there_are_refused(tmp_path: Path) -> None:
    expected = r"auto_tune: expected all_results.json of a run with --method dense, got .*; run the dense model first"
    with pytest.raises(ValueError, match=expected):
        results.read_epoch_losses(str(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match=expected):
        results.read_epoch_losses(dense_run(tmp_path, bleu=1.0))
    (tmp_path / "no.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=expected):
        results.read_epoch_losses(str(tmp_path / "no.json"))
    with pytest.raises(ValueError, match=r"a run with --method dense, got one of 'gmp'"):
        results.read_epoch_losses(dense_run(tmp_path, method="gmp", epoch_losses=[1.0]))
    with pytest.raises(ValueError, match=r"got none; the dense run ended within an epoch"):
        results.read_epoch_losses(dense_run(tmp_path, epoch_losses=[]))
