"""The queue's training runs: Multi30k, WikiText-2 and Fashion-MNIST, by method, pattern and seed."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

from harness import ROOT
from queue_store import LAYERS, LONG, Entry, Record

PYTHON = sys.executable
RECIPE = ROOT / "train" / "recipes" / "multi30k.toml"
SPLITS = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
TEXTS = {"train": "train", "validation": "valid", "test": "test"}
SEEDS = (0, 1, 2)
# The methods that are told their sparsity, at about what AutoSparse's recipe reaches; updates every 100 of 4,000 steps.
AT_70: dict[str, dict[str, object]] = {
    "static": {"sparsity": 0.7},
    "gmp": {"sparsity": 0.7},
    "topkast": {"sparsity": 0.7, "backward_sparsity": 0.4},
    "powerprop": {"sparsity": 0.7},
    "swat": {"sparsity": 0.7},
    "acdc": {
        "sparsity": 0.7,
        "phases": {"starts": [[epoch, ("dense", "sparse")[epoch % 2]] for epoch in range(8)], "epochs": 9},
    },
    **{name: {"sparsity": 0.7, "update_every": 100} for name in ("rigl", "set", "snfs", "dsr", "mest")},
    "optg": {"sparsity": 0.7},
    "dst": {"penalty": 1e-5},
}
# The same on blocks of 32x32, at the same share of blocks; unstructured AutoSparse aimed at it is what they cost.
ON_BLOCKS = ("autosparse", "topkast", "acdc", "rigl")
# Fashion-MNIST beside AutoSparse, whose 80 % or so are the recipe's own; phases of AC/DC as long as the recipe's run.
FASHION: dict[str, dict[str, object]] = {
    "dense": {},
    "acdc": {
        "sparsity": 0.9,
        "phases": {"starts": [[0, "dense"], [1, "sparse"], [2, "dense"], [3, "sparse"]], "epochs": 6},
    },
    "rigl": {"sparsity": 0.8, "update_every": 100},
    "swat": {"sparsity": 0.8},
}
# What the programs measure, by keys of their results.
TRANSLATED = ("bleu", "bleu_line", "bleu_signature", "num_beams")
SEEN = ("top1", "top5", "eval_loss")
WRITTEN = ("perplexity", "perplexity_settings", "tokens_scored", "twins")
# Rows of a training history that a result keeps.
HISTORY = 60

TRAINING = (
    *LAYERS, "tritonsparse/clock.py", "tritonsparse/param_groups.py", "tritonsparse/schedules.py",
    "train/translation.py", "train/run/*.py", "train/text/*.py", "train/recipes/multi30k.toml",
    "eval/bleu.py", "eval/translate.py",
)  # fmt: skip
LANGUAGE = (
    *LAYERS, "tritonsparse/clock.py", "tritonsparse/models/transfo_xl/*.py", "train/language_modeling.py",
    "train/text/language_*.py", "train/text/segments.py", "train/text/memory.py", "train/run/loop.py",
    "train/recipes/wikitext2-small.toml", "eval/perplexity.py", "eval/windows.py",
)  # fmt: skip

IMAGES = (
    *LAYERS, "tritonsparse/clock.py", "tritonsparse/models/cifar_resnet/*.py",
    "train/image_classification.py", "train/images/*.py", "train/run/loop.py", "train/recipes/fashion-mnist-small.toml",
    "eval/accuracy.py", "eval/preprocessing.py",
)  # fmt: skip


def training_runs(data: Path | None, text: Path | None = None, images: Path | None = None) -> list[Entry]:
    """Every run; `data`, `text` and `images` are the folders of Multi30k, WikiText-2 and Fashion-MNIST."""
    return [
        *(_multi30k(method, seed, data) for seed in SEEDS for method in ("dense", "str", "autosparse")),
        *(_multi30k(method, seed, data) for seed in SEEDS for method in AT_70),
        *(_multi30k_70(method, seed, data, pattern) for seed in SEEDS
          for method, pattern in (*((method, "block:32") for method in ON_BLOCKS), ("autosparse", "unstructured"))),
        *(_wikitext2(method, seed, text) for seed in SEEDS for method in ("dense", "acdc")),
        *(_fashion(method, seed, images) for seed in SEEDS for method in ("autosparse", *FASHION)),
    ]  # fmt: skip


def _multi30k(method: str, seed: int, data: Path | None) -> Entry:
    """One run of the recipe; STR shares the recipe's thresholds."""
    fields = tomllib.loads(RECIPE.read_text(encoding="utf-8"))["method_args"]
    if method == "str":
        fields = {key: value for key, value in fields.items() if key.startswith("threshold")}
    elif method != "autosparse":
        fields = AT_70.get(method, {})
    command = _translation(method, fields, seed)
    name = f"multi30k {method} {seed}"
    return Entry(name, command, _training, TRAINING, 180, 120, "multi30k", f"{method}/{seed}", data, stage=LONG)


def _translation(method: str, fields: Mapping[str, object], seed: int) -> tuple[str, ...]:
    return (
        PYTHON, "-m", "tritonsparse.train.translation", "--recipe=multi30k", f"--method={method}",
        *(f"--{split}_file={{data}}/{stem}.en.gz" for split, stem in SPLITS.items()),
        f"--method_args={json.dumps(fields)}", f"--seed={seed}",
        "--mixed_precision=bf16", "--output_dir={work}/run",
    )  # fmt: skip


def _multi30k_70(method: str, seed: int, data: Path | None, pattern: str) -> Entry:
    """One run of the recipe told to reach 70 %: on blocks, or AutoSparse on elements."""
    if method == "autosparse":
        fields = tomllib.loads(RECIPE.read_text(encoding="utf-8"))["method_args"] | {"sparsity": 0.7}
        if pattern != "unstructured":
            # Blocks have no thresholds.
            fields = {key: value for key, value in fields.items() if not key.startswith("threshold")}
    else:
        fields = AT_70[method]
    command = (*_translation(method, fields, seed), f"--pattern={pattern}")
    name, key = f"multi30k {method} {pattern} 70 {seed}", f"{method} {pattern} 70/{seed}"
    return Entry(name, command, _training, TRAINING, 180, 120, "multi30k", key, data, stage=LONG)


def _wikitext2(method: str, seed: int, text: Path | None) -> Entry:
    """One run of the recipe, AC/DC at its sparsity or the dense baseline."""
    command = (
        PYTHON, "-m", "tritonsparse.train.language_modeling", "--recipe=wikitext2-small", f"--method={method}",
        *(f"--{split}_file={{data}}/{stem}.txt.gz" for split, stem in TEXTS.items()),
        f"--seed={seed}", "--mixed_precision=bf16", "--output_dir={work}/run",
    )  # fmt: skip
    name = f"wikitext2 {method} {seed}"
    return Entry(name, command, _training, LANGUAGE, 300, 150, "wikitext2", f"{method}/{seed}", text, stage=LONG)


def _fashion(method: str, seed: int, images: Path | None) -> Entry:
    """One run of the recipe, with its own AutoSparse or another method."""
    fields = () if method == "autosparse" else (f"--method_args={json.dumps(FASHION[method])}",)
    if method == "swat":
        # SWAT-U: the first convolution, 72 weights here, stays dense.
        fields = (*fields, "--exclude", "conv")
    command = (
        PYTHON, "-m", "tritonsparse.train.image_classification", "--recipe=fashion-mnist-small", f"--method={method}",
        "--data_dir={data}", *fields, f"--seed={seed}", "--mixed_precision=bf16", "--output_dir={work}/run",
    )  # fmt: skip
    name = f"fashion-mnist {method} {seed}"
    return Entry(name, command, _training, IMAGES, 60, 40, "fashion_mnist", f"{method}/{seed}", images, stage=LONG)


def _training(work: Path, output: str) -> Record:
    """The run's `all_results.json` without what is bulky: some rows of history, final layer sparsities."""
    document = json.loads((work / "run" / "all_results.json").read_text(encoding="utf-8"))
    measured = next(keys for keys in (TRANSLATED, WRITTEN, SEEN) if keys[0] in document)
    kept = (
        "method", "method_fields", *measured, "split", "sparsity", "train_flops_fraction", "test_flops_fraction",
        "steps", "training_seconds", "epoch_losses", "evaluations", "environment",
    )  # fmt: skip
    history = document["history"]
    stride = -(-len(history) // HISTORY)
    rows = [*history[:-1:stride], *history[-1:]]
    bulky = ("layer_sparsity", "thresholds")
    return {
        "seed": document["arguments"]["seed"],
        **{key: document[key] for key in kept},
        "layer_sparsity": {name: round(value, 4) for name, value in history[-1]["layer_sparsity"].items()},
        "history": [{key: value for key, value in row.items() if key not in bulky} for row in rows],
    }
