"""The queue of GPU work: tests, benchmarks and training runs, most valuable first, until a budget is spent.

    make gpu BUDGET=500 OUT=results               on a machine with a GPU; needs no network
    python benchmarks/gpu_queue.py --budget 500 [--out DIR] [--dry-run]

Runs every entry below that has no result yet, or one of other sources than today's, and writes each result
as soon as it has it, to DIR/<device>/ (benchmarks/results/<device>/ by default; what lies there also counts
where DIR has nothing). The exit status is 1 where an entry failed, 2 where there is no GPU. Multi30k is read
from the folder $TRITONSPARSE_DATA or data/multi30k (train.en.gz, train.de.gz, val.*, test_2016_flickr.*), WikiText-2
from $TRITONSPARSE_DATA/wikitext-2 or data/wikitext-2 (train.txt.gz, valid.txt.gz, test.txt.gz), Fashion-MNIST from
$TRITONSPARSE_DATA/fashion-mnist or data/fashion-mnist (the four IDX files).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

START = time.monotonic()
sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
try:
    from harness import RESULTS, ROOT, device_name, environment, table
    from queue_runner import Entry, Record, Store, run_queue
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    print(f"gpu_queue: expected a Python that has torch, got {sys.executable}; set PYTHON", file=sys.stderr)
    raise SystemExit(2) from None

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

KERNELS = ("kernels/*.py",)
LAYERS = (
    *KERNELS, "tritonsparse/layers.py", "tritonsparse/sparsifier.py", "tritonsparse/block_index.py",
    "tritonsparse/methods/*.py",
)  # fmt: skip
TRAINING = (
    *LAYERS, "tritonsparse/clock.py", "tritonsparse/param_groups.py", "tritonsparse/schedules.py",
    "train/*.py", "train/recipes/multi30k.toml", "eval/bleu.py", "eval/translate.py",
)  # fmt: skip
LANGUAGE = (
    *LAYERS, "tritonsparse/clock.py", "tritonsparse/models/transfo_xl/*.py", "train/language_*.py", "train/segments.py",
    "train/memory.py", "train/loop.py", "train/recipes/wikitext2-small.toml", "eval/perplexity.py", "eval/windows.py",
)  # fmt: skip

IMAGES = (
    *LAYERS, "tritonsparse/conv.py", "tritonsparse/clock.py", "tritonsparse/models/cifar_resnet/*.py",
    "train/image_*.py", "train/loop.py", "train/recipes/fashion-mnist-small.toml", "eval/accuracy.py",
    "eval/preprocessing.py",
)  # fmt: skip


def entries(data: Path | None, text: Path | None = None, images: Path | None = None) -> list[Entry]:
    """The queue; `data`, `text` and `images` are the folders of Multi30k, WikiText-2 and Fashion-MNIST.

    Estimates are guesses until a result's `seconds` says better.
    """
    step = ("benchmarks/bench_train_step.py", "benchmarks/harness.py", "train/presets.py", *LAYERS)
    return [
        *(_gpu_tests(path) for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))),
        _kernel_bench("threshold", "threshold", 120, 60),
        Entry("train step", _bench("train_step"), _last_line, step, 150, 90, "train_step"),
        _kernel_bench("block", "block", 240, 150),
        _kernel_bench("block step", "block_step", 240, 150, sources=LAYERS),
        _kernel_bench("block inference", "block_inference", 120, 60),
        _kernel_bench("whole model", "whole_model", 90, 60),
        _kernel_bench("masked gemm", "masked_gemm", 240, 120),
        _kernel_bench("2:4", "semi_structured", 60, 40),
        _kernel_bench("packed activations", "packed", 60, 40),
        *(_kernel_bench(f"{op}, {model}, {batch}", "conv", 150, 60, f"--model={model}", f"--batch={batch}",
                        f"--op={op}", key=f"{op}_{model}_{batch}")
          for model in ("resnet-50", "mobilenet-v1") for batch in (32, 256)
          for op in ("conv_forward", "conv_grad_input", "conv_grad_weight")),
        *(_multi30k(method, seed, data) for seed in SEEDS for method in ("dense", "str", "autosparse")),
        *(_multi30k(method, seed, data) for seed in SEEDS for method in AT_70),
        *(_multi30k_70(method, seed, data, pattern) for seed in SEEDS
          for method, pattern in (*((method, "block:32") for method in ON_BLOCKS), ("autosparse", "unstructured"))),
        *(_wikitext2(method, seed, text) for seed in SEEDS for method in ("dense", "acdc")),
        *(_fashion(method, seed, images) for seed in SEEDS for method in ("autosparse", *FASHION)),
        Entry("train step, transfoxl-large", _bench("transfo_xl"), _last_line,
              ("benchmarks/bench_transfo_xl.py", "benchmarks/harness.py", "train/language_presets.py",
               "tritonsparse/models/transfo_xl/*.py", *LAYERS),
              150, 90, "train_step_transfoxl-large"),
        Entry("train step, big", _bench("train_step", "--preset=transformer-big"), _last_line, step,
              180, 120, "train_step_transformer-big"),
    ]  # fmt: skip


def _gpu_tests(path: Path) -> Entry:
    """The tests of one file, by themselves: compiling kernels takes most of their time, and a budget may end."""
    report = "--junit-xml={work}/report.xml"
    command = (PYTHON, "-m", "pytest", "-m", "gpu", f"tests/gpu/{path.name}", "-q", "-p", "no:cacheprovider", report)
    sources = (*LAYERS, "train/presets.py", "tests/gpu/conftest.py", f"tests/gpu/{path.name}")
    name = path.stem.removeprefix("test_").removesuffix("_gpu")
    return Entry(f"gpu tests, {name}", command, _tests, sources, 90, 30, "gpu_tests", name)


def _bench(name: str, *options: str) -> tuple[str, ...]:
    return PYTHON, f"benchmarks/bench_{name}.py", "--out={work}", *options


def _kernel_bench(
    name: str,
    bench: str,
    estimate: float,
    minimum: float,
    *options: str,
    sources: tuple[str, ...] = KERNELS,
    key: str | None = None,
) -> Entry:
    """A benchmark that has the GPU to itself; its record stands under `key`, the benchmark's name by default."""
    files = (f"benchmarks/bench_{bench}.py", "benchmarks/harness.py", *sources)
    command = _bench(bench, *options)
    return Entry(name, command, _last_line, files, estimate, minimum, "kernels", key or bench, alone=True)


def _multi30k(method: str, seed: int, data: Path | None) -> Entry:
    """One run of the recipe; STR shares the recipe's thresholds."""
    fields = tomllib.loads(RECIPE.read_text(encoding="utf-8"))["method_args"]
    if method == "str":
        fields = {key: value for key, value in fields.items() if key.startswith("threshold")}
    elif method != "autosparse":
        fields = AT_70.get(method, {})
    command = _translation(method, fields, seed)
    name = f"multi30k {method} {seed}"
    return Entry(name, command, _training, TRAINING, 180, 120, "multi30k", f"{method}/{seed}", data)


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
    name = f"multi30k {method} {pattern} 70 {seed}"
    return Entry(name, command, _training, TRAINING, 180, 120, "multi30k", f"{method} {pattern} 70/{seed}", data)


def _wikitext2(method: str, seed: int, text: Path | None) -> Entry:
    """One run of the recipe, AC/DC at its sparsity or the dense baseline."""
    command = (
        PYTHON, "-m", "tritonsparse.train.language_modeling", "--recipe=wikitext2-small", f"--method={method}",
        *(f"--{split}_file={{data}}/{stem}.txt.gz" for split, stem in TEXTS.items()),
        f"--seed={seed}", "--mixed_precision=bf16", "--output_dir={work}/run",
    )  # fmt: skip
    name = f"wikitext2 {method} {seed}"
    return Entry(name, command, _training, LANGUAGE, 300, 150, "wikitext2", f"{method}/{seed}", text)


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
    return Entry(name, command, _training, IMAGES, 60, 40, "fashion_mnist", f"{method}/{seed}", images)


def _last_line(work: Path, output: str) -> Record:
    """What a benchmark prints last."""
    result: Record = json.loads(output.strip().rpartition("\n")[2])
    return result


def _tests(work: Path, output: str) -> Record:
    """Counts, slowest tests, and what failed with its message."""
    cases = list(ElementTree.parse(work / "report.xml").iter("testcase"))
    failed = {
        str(case.get("name")): str(problem.get("message"))[:1000]
        for case in cases
        for problem in case
        if problem.tag in ("failure", "error")
    }
    skipped = {str(case.get("name")): str(why.get("message")) for case in cases for why in case.iter("skipped")}
    seconds = sorted(((float(case.get("time", 0)), str(case.get("name"))) for case in cases), reverse=True)
    return {
        "environment": environment(),
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": failed,
        "skipped": skipped,
        "slowest": {name: time for time, name in seconds[:5]},
    }


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


def data_folder() -> Path | None:
    """Where Multi30k lies, None if nowhere."""
    given = os.environ.get("TRITONSPARSE_DATA")
    places = [Path(given), Path(given) / "multi30k"] if given else [ROOT / "data" / "multi30k"]
    return next((place.resolve() for place in places if (place / "train.en.gz").is_file()), None)


def text_folder() -> Path | None:
    """Where WikiText-2 lies, None if nowhere."""
    given = os.environ.get("TRITONSPARSE_DATA")
    place = (Path(given) if given else ROOT / "data") / "wikitext-2"
    return place.resolve() if (place / "train.txt.gz").is_file() else None


def image_folder() -> Path | None:
    """Where Fashion-MNIST lies, None if nowhere."""
    given = os.environ.get("TRITONSPARSE_DATA")
    place = (Path(given) if given else ROOT / "data") / "fashion-mnist"
    return place.resolve() if (place / "train-images-idx3-ubyte.gz").is_file() else None


def python_environment(scratch: Path) -> tuple[dict[str, str], str]:
    """Variables under which PYTHON imports this checkout as `tritonsparse`, and how that came about."""
    variables = os.environ | {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    variables.setdefault("OMP_NUM_THREADS", "2")
    if _imports_this_checkout(variables):
        return variables, "tritonsparse is installed"
    install = (
        PYTHON,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-e",
        str(ROOT),
    )
    run = subprocess.run(install, env=variables, capture_output=True, text=True)
    if run.returncode == 0 and _imports_this_checkout(variables):
        return variables, "tritonsparse was installed by pip"
    # The packages of pyproject.toml as links, found through PYTHONPATH.
    package = scratch / "tritonsparse"
    package.mkdir()
    for path in (ROOT / "tritonsparse").iterdir():
        (package / path.name).symlink_to(path)
    for room in ("kernels", "eval", "train"):
        (package / room).symlink_to(ROOT / room)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(scratch), variables.get("PYTHONPATH"))))
    reason = (run.stderr.strip().splitlines() or ["pip installed something else"])[-1]
    return variables, f"tritonsparse is linked in {scratch}: pip could not install it ({reason})"


def _imports_this_checkout(variables: dict[str, str]) -> bool:
    check = "import tritonsparse.kernels as k, pathlib; print(pathlib.Path(k.__file__).resolve().parent)"
    run = subprocess.run((PYTHON, "-c", check), env=variables, cwd=ROOT, capture_output=True, text=True)
    return run.returncode == 0 and run.stdout.strip() == str(ROOT / "kernels")


def summary(queue: Sequence[Entry], store: Store, outcomes: dict[str, str]) -> str:
    """One line an entry: its state now, what this run made of it, how long it took or may take."""
    rows = []
    for entry in queue:
        took = store.record(entry).get("queue", {}).get("seconds")
        row = {"entry": entry.name, "state": store.state(entry), "this run": outcomes.get(entry.name)}
        rows.append({**row, "seconds": took, "estimate": entry.estimate})
    return table(rows, {"entry": "", "state": "", "this run": "", "seconds": ".0f", "estimate": ".0f"})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=500.0, help="seconds, everything included")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results, by device")
    parser.add_argument("--dry-run", action="store_true", help="list entries and their state")
    args = parser.parse_args(argv)
    queue, device = entries(data_folder(), text_folder(), image_folder()), device_name()
    if args.dry_run:
        known = sorted({path.name for path in (*args.out.glob("*/"), *RESULTS.glob("*/"))})
        for name in [device] if device else known or ["no device"]:
            print(f"{name}\n{summary(queue, Store(args.out / name, RESULTS / name), {})}\n")
        return 0
    if device is None:
        print("gpu_queue: expected a GPU that torch sees, got none; --dry-run lists entries", file=sys.stderr)
        return 2
    # Entries run in sessions of their own: whoever ends this program ends them through it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    store = Store(args.out.resolve() / device, RESULTS / device)
    with tempfile.TemporaryDirectory(prefix="tritonsparse-") as scratch:
        variables, how = python_environment(Path(scratch))
        print("  ".join(f"{key} {value}" for key, value in environment().items() if value))
        print(how, flush=True)
        left = args.budget - (time.monotonic() - START)
        outcomes = run_queue(queue, store, left, variables, lambda line: print(line, flush=True))
    print(summary(queue, store, outcomes))
    return int("failed" in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
