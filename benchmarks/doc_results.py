"""Writes the tables of docs/results.md from the files under benchmarks/results, and from nowhere else.

    python benchmarks/doc_results.py            rewrite what stands between the two marks
    python benchmarks/doc_results.py --check    exit 1 where the page does not say what the files say

A training run lies in results/<device>/<corpus>/<run>/all_results.json, as the training program wrote it; the folder's
name is the row's, and pictures beside the runs stand under their table. results/<device>/<corpus>/twins.json is what
eval.accuracy (or eval.agreement) says of AC/DC's twins, memorization.json what train.memorization wrote,
results/<device>/inference/*.json what eval.speed did.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from doc_marks import rewrite

# Over the training runs: the page says above what is wrong with them.
TRAINING = "## Training runs: one seed, short, dense at a disadvantage"
INFERENCE = "## Inference on a CPU"
# What a run is measured by, by the key of its results: the column, how it is written, the program that trained it.
QUALITIES = {
    "bleu": ("BLEU", "{:.2f}", "translation"),
    "perplexity": ("perplexity", "{:.2f}", "language_modeling"),
    "top1": ("top-1", "{:.2%}", "image_classification"),
}
# What the columns of a corpus with block patterns are.
BLOCKS = (
    " Of blocks: the share that holds zeros alone; of its layers: the sparsity of the densest and of the sparsest; "
    "training loss: mean of the last epoch, with label smoothing."
)


def tables(results: Path) -> str:
    """Every table, in Markdown."""
    parts = [TRAINING]
    for corpus in sorted({path.parent.parent for path in results.glob("*/*/*/all_results.json")}):
        runs = [
            {"run": path.name, **json.loads((path / "all_results.json").read_text(encoding="utf-8"))}
            for path in sorted(corpus.iterdir())
            if (path / "all_results.json").is_file()
        ]
        parts.append(_training_table(f"{corpus.name} on {corpus.parent.name}", runs))
        twins = corpus / "twins.json"
        if twins.is_file():
            parts.append(_twins(json.loads(twins.read_text(encoding="utf-8"))))
        parts += [
            f"![{corpus.name}: {picture.stem}]({_link(picture, results)})"
            for picture in sorted(corpus.glob("*.png"))
            if picture.stem != "memorization"
        ]
    for path in sorted(results.glob("*/*/memorization.json")):
        corpus, document = path.parent, json.loads(path.read_text(encoding="utf-8"))
        parts.append(_memorization_table(f"{corpus.name}, labels corrupted, on {corpus.parent.name}", document))
        picture = _link(path.with_suffix(".png"), results)
        parts.append(f"![{corpus.name}: accuracy on corrupted images by epoch]({picture})")
    folders = sorted({path.parent for path in results.glob("*/inference/*.json")})
    parts += [INFERENCE] if folders else []
    for folder in folders:
        documents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
        parts.append(_inference_table(f"Inference on {folder.parent.name}", documents))
    return "\n\n".join(parts)


def _link(picture: Path, results: Path) -> str:
    """As a page in docs/ reaches it."""
    return f"../{picture.relative_to(results.parent.parent).as_posix()}"


def _training_table(title: str, runs: Sequence[dict[str, Any]]) -> str:
    key = next(key for key in QUALITIES if key in runs[0])
    quality, form, program = QUALITIES[key]
    blocks = any(str(run["arguments"].get("pattern", "")).startswith("block") for run in runs)
    columns = (
        "run",
        "sparsity",
        *(("of blocks", "of its layers", "training loss") if blocks else ()),
        quality,
        "training MACs",
        "inference MACs",
        "epochs",
        "minutes",
        "threads",
        "commit",
    )
    lines = [*_head(title, columns)]
    for run in sorted(runs, key=lambda run: run["sparsity"]):
        environment = run["environment"]
        cells = (
            run["run"],
            f"{run['sparsity']:.1%}",
            *(_of_blocks(run) if blocks else ()),
            form.format(run[key]),
            f"{_training_cost(run):.1%} of dense",
            f"{run['test_flops_fraction']:.1%} of dense",
            len(run["evaluations"]),
            f"{run['training_seconds'] / 60:.0f}",
            environment["cpu_threads"],
            f"`{environment['commit']}`",
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    first, counted = runs[0], "linear and convolution" if key == "top1" else "linear"
    lines += [
        "",
        f"{_measured(first)}; one seed; "
        f"`accelerate launch -m tritonsparse.train.{program} --recipe {first['arguments']['recipe']}` with the "
        f"arguments in each run's `all_results.json`; torch {first['environment']['torch']}. "
        f"Multiply-adds are of all {counted} layers: of inference by what is not zero, of training by what every "
        f"step's view keeps."
        f"{BLOCKS if blocks else ''}",
    ]
    return "\n".join(lines)


def _training_cost(run: dict[str, Any]) -> float:
    """Over dense; runs with an earlier meter are recounted (recount_training.py)."""
    recounted = run.get("train_flops_recounted")
    return float(run["train_flops_fraction"] if recounted is None else recounted["fraction"])


def _of_blocks(run: dict[str, Any]) -> tuple[str, str, str]:
    """The share of blocks that are zeros, the least and the most of a layer's weights, and the last epoch's loss."""
    layers = [layer["sparsity"] for layer in run["layers"]]
    return f"{run['block_sparsity']:.1%}", f"{min(layers):.0%} to {max(layers):.0%}", f"{run['epoch_losses'][-1]:.3f}"


def _measured(run: dict[str, Any]) -> str:
    """On what, and how, a run's quality was measured."""
    where = str(run["arguments"].get("test_file") or run["split"])
    if "bleu" in run:
        return f"{where}, {run['num_beams']} beams, {run['bleu_signature']}"
    if "perplexity" in run:
        return where
    given = run["arguments"]
    return f"{where} split, {given['preset']}, {_images(given)}, augmentation {given['augmentation']!r}"


def _images(arguments: dict[str, Any]) -> str:
    most = arguments["max_train_samples"]
    return "all training images" if most is None else f"{most:,} training images"


def _twins(found: dict[str, Any]) -> str:
    twin = found.get("twin", found)
    top1 = f"top-1 {twin['top1']:.2%} beside {found['top1']:.2%}; " if "top1" in found else ""
    return (
        f"AC/DC's dense twin beside the sparse model: {top1}they agree on {twin['agreement']:.2%} of "
        f"{twin['predictions']:,} predictions (cross-entropy {twin['cross_entropy']:.3f} nats, the dense twin's own "
        f"entropy {twin['entropy']:.3f})."
    )


def _memorization_table(title: str, document: dict[str, Any]) -> str:
    """The last epoch of every run."""
    lines = [*_head(title, ("run", "training", "test top-1", "corrupted as they are", "corrupted as labelled"))]
    for how, group in document["runs"].items():
        for label, evaluations in group.items():
            last = evaluations[-1]
            numbers = (f"{last[key]:.1%}" for key in ("top1", "corrupted_as_true", "corrupted_as_labelled"))
            lines.append(f"| {' | '.join((label, how, *numbers))} |")
    given, environment = document["arguments"], document["environment"]
    lines += [
        "",
        f"{_images(given)}, {given['corrupted_samples']} of them with a wrong label; {given['num_train_epochs']} "
        f"epochs of {given['preset']}, {given['method']}; augmentation is {given['augmentation']!r}; one seed; "
        f"`accelerate launch -m tritonsparse.train.memorization` with the arguments in `memorization.json`; torch "
        f"{environment['torch']}, commit `{environment['commit']}`.",
    ]
    return "\n".join(lines)


def _inference_table(title: str, documents: dict[str, dict[str, Any]]) -> str:
    """Dense beside compressed rows, each from one run of eval.speed."""
    columns = (
        "model", "zeros", "batch", "dense", "compressed rows", "times dense's speed", "layers compressed", "commit",
    )  # fmt: skip
    lines = [*_head(title, columns)]
    for name, document in documents.items():
        rows = {(row["batch_size"], row["model"]): row for row in document["rows"]}
        for batch, model in rows:
            if model != "compressed rows":
                continue
            dense, ours = rows[batch, "dense"], rows[batch, model]
            used = sum(layer["used"] for layer in ours["layers"])
            cells = (
                name,
                f"{document['sparsity']:.1%}",
                batch,
                f"{1e3 * dense['median']:.2f} ms",
                f"{1e3 * ours['median']:.2f} ms" if ours["verdict"] == "ok" else "WRONG",
                f"{ours['speedup']:.2f}" if ours["verdict"] == "ok" else "",
                f"{used} of {len(ours['layers'])}",
                f"`{document['environment']['commit']}`",
            )
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    environments = [document["environment"] for document in documents.values()]
    lines += [
        "",
        f"Medians of forwards taken in turn, `python -m tritonsparse.eval.speed`; "
        f"{environments[0]['threads']} thread(s); torch {environments[0]['torch']}. Zeros are of all matrices, "
        f"embeddings included. A layer is compressed where that is measured faster; where none is, it is near 1.",
    ]
    return "\n".join(lines)


def _head(title: str, columns: Sequence[str]) -> tuple[str, ...]:
    return f"**{title}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return rewrite(argv, __doc__, tables, "doc_results", "results.md")


if __name__ == "__main__":
    sys.exit(main())
