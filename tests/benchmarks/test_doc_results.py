"""README.md's tables: what the files say, for every kind of training run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import readme_marks  # noqa: E402
import readme_results  # noqa: E402

SHARED = {
    "train_flops_fraction": 0.5, "test_flops_fraction": 0.25, "training_seconds": 90.0, "evaluations": [{}, {}],
    "split": "test", "environment": {"cpu_threads": 1, "commit": "abc", "torch": "2.13.0"},
}  # fmt: skip
IMAGES = {"recipe": "r", "preset": "resnet20", "augmentation": "crop", "max_train_samples": 20000}
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "top1": (
        {"top1": 0.8765, "arguments": IMAGES},
        "| 87.65% |",
    ),
    "perplexity": ({"perplexity": 123.456, "arguments": {"recipe": "r", "test_file": "t.gz"}}, "| 123.46 |"),
    "bleu": (
        {"bleu": 31.657, "num_beams": 4, "bleu_signature": "sig", "arguments": {"recipe": "r", "test_file": "t.gz"}},
        "| 31.66 |",
    ),
}


def test_the_readme_says_what_the_files_say() -> None:
    assert readme_results.main(["--check"]) == 0


@pytest.mark.parametrize("key", RUNS)
def test_a_run_of_every_program_has_its_row(key: str, tmp_path: Path) -> None:
    own, cell = RUNS[key]
    for name, sparsity in (("sparse", 0.8), ("dense", 0.0)):
        folder = tmp_path / "some-cpu" / "corpus" / name
        folder.mkdir(parents=True)
        document = {**SHARED, **own, "method": name, "sparsity": sparsity}
        (folder / "all_results.json").write_text(json.dumps(document), encoding="utf-8")
    text = readme_results.tables(tmp_path)
    rows = [line for line in text.splitlines() if cell in line]
    assert [row.split(" | ")[1] for row in rows] == ["0.0%", "80.0%"]
    assert "**corpus on some-cpu**" in text and "--recipe r" in text
    assert f"| {readme_results.QUALITIES[key][0]} |" in text


def test_runs_on_blocks_say_what_became_of_blocks_and_layers(tmp_path: Path) -> None:
    own, _ = RUNS["bleu"]
    for name, pattern, pruned in (("acdc", "block:16", (0.5, 0.9)), ("dense", "unstructured", (0.0, 0.0))):
        run = {**SHARED, **own, "arguments": {**own["arguments"], "pattern": pattern}, "sparsity": sum(pruned) / 2}
        run |= {"block_sparsity": run["sparsity"], "epoch_losses": [3.0, 2.5]}
        run["layers"] = [{"sparsity": share} for share in pruned]
        write(tmp_path / "some-cpu" / "corpus" / name / "all_results.json", run)
    text = readme_results.tables(tmp_path)
    assert "| run | sparsity | of blocks | of its layers | training loss | BLEU |" in text
    assert "| acdc | 70.0% | 70.0% | 50% to 90% | 2.500 | 31.66 |" in text
    assert "| dense | 0.0% | 0.0% | 0% to 0% | 2.500 | 31.66 |" in text and readme_results.BLOCKS in text


def write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_pictures_and_twins_stand_under_their_corpus_s_table(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    corpus = results / "some-cpu" / "images"
    own, _ = RUNS["top1"]
    write(corpus / "dense" / "all_results.json", {**SHARED, **own, "sparsity": 0.0})
    write(results / "some-cpu" / "text" / "dense" / "all_results.json", {**SHARED, **RUNS["bleu"][0], "sparsity": 0.0})
    (corpus / "cost.png").touch()
    alike = {"agreement": 0.9321, "cross_entropy": 0.25, "entropy": 0.125, "predictions": 10000}
    write(corpus / "twins.json", {"top1": 0.87, "twin": {"top1": 0.88, **alike}})
    write(results / "some-cpu" / "text" / "twins.json", alike)
    images, text = readme_results.tables(results).split("**text on some-cpu**")
    assert "![images: cost](benchmarks/results/some-cpu/images/cost.png)" in images
    assert "top-1 88.00% beside 87.00%; they agree on 93.21% of 10,000 predictions" in images
    assert "AC/DC's dense twin beside the sparse model: they agree on 93.21%" in text and "![" not in text
    assert "resnet20, 20,000 training images, augmentation 'crop'" in images


def test_a_memorisation_experiment_is_shown_by_its_last_epochs(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    epochs = [
        {"top1": 0.1, "corrupted_as_true": 0.1, "corrupted_as_labelled": 0.1},
        {"top1": 0.875, "corrupted_as_true": 0.25, "corrupted_as_labelled": 0.625},
    ]
    arguments = {**IMAGES, "method": "acdc", "num_train_epochs": 2, "corrupted_samples": 40, "max_train_samples": None}
    document = {"runs": {"without augmentation": {"dense": epochs}}, "arguments": arguments, **SHARED}
    write(results / "some-cpu" / "digits" / "memorization.json", document)
    text = readme_results.tables(results)
    assert "| dense | without augmentation | 87.5% | 25.0% | 62.5% |" in text and "10.0%" not in text
    assert "(benchmarks/results/some-cpu/digits/memorization.png)" in text and "all training images, 40 of them" in text


def test_inference_is_shown_with_its_ratio_and_wrong_outputs_without_time(tmp_path: Path) -> None:
    dense = {"batch_size": 1, "model": "dense", "median": 0.006, "speedup": 1.0, "verdict": "ok"}
    ours = {**dense, "model": "compressed rows", "median": 0.004, "speedup": 1.5, "layers": [{"used": True}]}
    wrong = {"batch_size": 64, "model": "compressed rows", "verdict": "WRONG", "layers": [{"used": False}]}
    document = {"sparsity": 0.9, "rows": [dense, ours, {**dense, "batch_size": 64}, wrong], **SHARED}
    document["environment"] = {"threads": 1, "torch": "2.13.0", "commit": "abc"}
    write(tmp_path / "some-cpu" / "inference" / "resnet.json", document)
    text = readme_results.tables(tmp_path)
    assert "| resnet | 90.0% | 1 | 6.00 ms | 4.00 ms | 1.50 | 1 of 1 | `abc` |" in text
    assert "| resnet | 90.0% | 64 | 6.00 ms | WRONG |  | 0 of 1 | `abc` |" in text


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="put them back"):
        readme_marks.updated("no marks", "", readme_results.MARKS, "readme_results")
