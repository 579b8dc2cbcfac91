"""docs/results.md: what the files say, for every kind of training run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import doc_marks
import doc_results

# What any file holds; each of FILES changes some of it.
RUN = {
    "sparsity": 0.0, "train_flops_fraction": 0.5, "test_flops_fraction": 0.25, "training_seconds": 90.0,
    "split": "test", "evaluations": [{}, {}],
    "environment": {"cpu_threads": 1, "threads": 1, "commit": "abc", "torch": "2.13.0"},
    "arguments": {"recipe": "r", "test_file": "t.gz"}, "block_sparsity": 0.0, "layers": [{"sparsity": 0.0}],
    "epoch_losses": [3.0, 2.5], "num_beams": 4, "bleu_signature": "sig",
}  # fmt: skip
ACDC = {"sparsity": 0.7, "block_sparsity": 0.75, "layers": [{"sparsity": 0.5}, {"sparsity": 0.9}]}
IMAGES = {"recipe": "r", "preset": "resnet20", "augmentation": "crop", "max_train_samples": 20000}
ALIKE = {"agreement": 0.9321, "cross_entropy": 0.25, "entropy": 0.125, "predictions": 10000}
EPOCHS = [dict.fromkeys(("top1", "corrupted_as_true", "corrupted_as_labelled"), share) for share in (0.123, 0.875)]
STOCK = {"batch_size": 1, "model": "dense", "median": 0.006, "verdict": "ok"}
OURS = {**STOCK, "model": "compressed rows", "median": 0.004, "speedup": 1.5, "layers": [{"used": True}]}
WRONG = {"batch_size": 64, "model": "compressed rows", "verdict": "WRONG", "layers": [{"used": False}]}
CORRUPTED = {**IMAGES, "method": "acdc", "num_train_epochs": 2, "corrupted_samples": 40, "max_train_samples": None}
FILES: dict[str, dict[str, Any]] = {
    "blocks/acdc/all_results.json": {"bleu": 31.657, **ACDC, "arguments": {**RUN["arguments"], "pattern": "block:16"}},
    "blocks/dense/all_results.json": {"bleu": 30.0},
    "images/acdc/all_results.json": {"top1": 0.8765, "sparsity": 0.8, "arguments": IMAGES},
    "images/dense/all_results.json": {"top1": 0.75, "arguments": IMAGES},
    "images/cost.png": {},
    "images/twins.json": {"top1": 0.87, "twin": {"top1": 0.88, **ALIKE}},
    "images/memorization.json": {"runs": {"plain": {"dense": EPOCHS}}, "arguments": CORRUPTED},
    "words/acdc/all_results.json": {"perplexity": 123.456, "sparsity": 0.8},
    "words/twins.json": ALIKE,
    "inference/resnet.json": {"sparsity": 0.9, "rows": [STOCK, OURS, {**STOCK, "batch_size": 64}, WRONG]},
}
# What stands under each heading, all in this order.
SAID = {
    doc_results.TRAINING: [],
    "**blocks on some-cpu**": [
        "| run | sparsity | of blocks | of its layers | training loss | BLEU |",
        "| dense | 0.0% | 0.0% | 0% to 0% | 2.500 | 30.00 |", "| acdc | 70.0% | 75.0% | 50% to 90% | 2.500 | 31.66 |",
        "t.gz, 4 beams, sig; one seed; `accelerate launch -m tritonsparse.train.translation --", doc_results.BLOCKS,
    ],
    "**images on some-cpu**": [
        "| top-1 |", "| dense | 0.0% | 75.00% |", "| acdc | 80.0% | 87.65% | 50.0% of dense | 25.0% of dense | 2 | 2 |",
        "resnet20, 20,000 training images, augmentation 'crop'", "train.image_classification --recipe r`",
        "top-1 88.00% beside 87.00%; they agree on 93.21% of 10,000 predictions",
        "![images: cost](../benchmarks/results/some-cpu/images/cost.png)",
    ],
    "**words on some-cpu**": ["| perplexity |", "| acdc | 80.0% | 123.46 |", "train.language_modeling --", "93.21%"],
    "**images, labels corrupted, on some-cpu**": [
        "| dense | plain | 87.5% | 87.5% | 87.5% |", "all training images, 40 of them",
        "(../benchmarks/results/some-cpu/images/memorization.png)", doc_results.INFERENCE,
    ],
    "**Inference on some-cpu**": [
        "| resnet | 90.0% | 1 | 6.00 ms | 4.00 ms | 1.50 | 1 of 1 | `abc` |", "| 64 | 6.00 ms | WRONG |  | 0 of 1 |",
    ],
}  # fmt: skip


def test_every_file_is_said_under_its_heading_and_the_page_says_what_its_files_say(tmp_path: Path) -> None:
    assert doc_results.main(["--check"]) == 0
    results = tmp_path / "benchmarks" / "results"
    for name, document in FILES.items():
        path = results / "some-cpu" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**RUN, **document}), encoding="utf-8")
    text = doc_results.tables(results)
    assert "12.3%" not in text and text.count("![") == 2
    for part in (part for heading, parts in SAID.items() for part in (heading, *parts)):
        _, found, text = text.partition(part)
        assert found, part


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"doc_results: expected <!-- results: written .* put them back"):
        doc_marks.updated("no marks", "", "doc_results")
