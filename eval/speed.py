"""Latency and throughput of models side by side, in one run, on any device.

    python -m tritonsparse.eval.speed --model runs/resnet20 --batch_sizes 1 64 --threads 1
    python -m tritonsparse.eval.speed --model runs/sparse --dense runs/dense --device cuda

On a CPU a model with zeros runs a second time with compressed rows where they are measured faster (`csr.py`), as
AC/DC's appendix B.4 looks at latency at batch 1 and 64. On a GPU unstructured zeros are multiplied like other numbers,
and the line shows it. Speed depends on where zeros are, hardly on which weights they were: `--prune 0.9` sets the
smallest nine tenths of every matrix of any checkpoint to 0 first. Runs alternate between the models, so that all meet
the same neighbours on the machine; a model whose outputs are not the dense run's prints WRONG and no time.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tritonsparse as ts

from .checkpoints import load_beside, load_pretrained
from .command_line import COUNT, DEVICE, TEXT, THREADS, Parser, one_line, one_of, real
from .csr import use_csr
from .machine import commit, processor
from .output_files import refuse_unwritable, write_whole
from .preprocessing import Preprocessing

__all__ = ["Timing", "load_any", "main", "measure", "pruned", "relative_error"]

# Sums in another order in float32 and a few dozen layers.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Timing:
    """One model at one batch size: seconds a forward (median, 20th and 80th percentile of `runs`), samples a second."""

    median: float
    p20: float
    p80: float
    throughput: float
    runs: int


@torch.no_grad()
def measure(
    models: Mapping[str, Callable[[], object]],
    *,
    batch_size: int,
    runs: int = 20,
    warmup: int = 3,
    synchronise: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time callables in turn.

    Args:
        models: label -> one forward.
        batch_size: samples in a forward, for the throughput.
        runs: timed forwards of each, after `warmup` others.
        synchronise: waits for the device; None on a CPU.

    Returns:
        label -> Timing.

    Raises:
        ValueError: no run asked for.
    """
    if runs < 1 or warmup < 0:
        raise ValueError(f"measure: expected at least 1 run and 0 for warming up, got {runs} and {warmup}; raise them")
    wait = synchronise or (lambda: None)
    times: dict[str, list[float]] = {label: [] for label in models}
    for number in range(warmup + runs):
        for label, forward in models.items():
            wait()
            start = time.perf_counter()
            forward()
            wait()
            if number >= warmup:
                times[label].append(time.perf_counter() - start)
    result = {}
    for label, seconds in times.items():
        seconds.sort()
        median, p20, p80 = (seconds[min(runs - 1, int(share * runs))] for share in (0.5, 0.2, 0.8))
        result[label] = Timing(median, p20, p80, batch_size / median, runs)
    return result


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the difference over that of `theirs`."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def load_any(folder: str) -> nn.Module:
    """A saved transformers model, in float32, of the class that its configuration names; this package's included."""
    import transformers

    import tritonsparse.models.cifar_resnet
    import tritonsparse.models.transfo_xl

    load = functools.partial(transformers.AutoConfig.from_pretrained, folder)
    config = load_beside("load_any", folder, "a configuration", load)
    name = (config.architectures or ["AutoModel"])[0]
    for module in (transformers, tritonsparse.models.cifar_resnet, tritonsparse.models.transfo_xl):
        if hasattr(module, name):
            model: nn.Module = load_pretrained("load_any", getattr(module, name), folder, "a checkpoint")
            return model.eval()
    raise ValueError(f"load_any: expected a class of transformers or of this package, got {name} in {folder}")


def make_inputs(model: Any, folder: str, batch_size: int, length: int, device: str) -> dict[str, Tensor]:
    """Random inputs of a model's kind: images of its preprocessor's size, or `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", 224)
        preprocessing = Preprocessing.find(folder)
        if preprocessing is not None:
            size = preprocessing.shape or size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, generator=generator).to(device)}
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions > 0:
        raise ValueError(
            f"make_inputs: expected --length of at most the model's {positions} positions, got {length}; lower it"
        )
    tokens = torch.randint(config.vocab_size, (batch_size, length), generator=generator).to(device)
    inputs = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    return inputs


def parser() -> Parser:
    """The options; `main` reads them."""
    result = Parser("eval.speed", __doc__)
    add = result.add_argument
    add("--model", type=TEXT, required=True, help="a checkpoint folder, with zeros")
    add("--dense", type=TEXT, default=None, help="a checkpoint to compare with; the same model, run densely, if not")
    add(
        "--prune", type=real(0.0, 1.0, open_below=True, open_above=True), default=None,
        help="sparsity in (0, 1) that each matrix of --model is first pruned to",
    )  # fmt: skip
    add("--batch_sizes", nargs="+", type=COUNT, default=[1, 64])
    add("--length", type=COUNT, default=128, help="tokens of a sequence, for language models")
    add("--device", type=DEVICE, default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", type=one_of(dtypes), default="float32", help=f"one of: {', '.join(dtypes)}")
    add("--threads", type=THREADS, default=None, help="of the CPU; torch's own number if not given")
    add("--runs", type=COUNT, default=20)
    add("--output", type=TEXT, default=None, help="a JSON file for the result")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: a table, and the same as JSON in the last line; status 2 and one sentence for bad input."""
    return one_line(lambda: _report(parser().parse_args(argv)))


def _report(args: argparse.Namespace) -> int:
    if args.output is not None:
        refuse_unwritable("speed", "--output", args.output)
    document = compare(args)
    _show(document)
    print(json.dumps(document))
    if args.output is not None:
        write_whole(args.output, json.dumps(document, indent=1))
    return 1 if any(row["verdict"] == "WRONG" for row in document["rows"]) else 0


@torch.no_grad()
def compare(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of one comparison, and on what they were measured."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    sparse = load_any(args.model)
    if args.prune is not None:
        sparse = pruned(sparse, args.prune)
    sparse = sparse.to(args.device, dtype)
    dense = sparse if args.dense is None else load_any(args.dense).to(args.device, dtype)
    zeros = [weight for weight in sparse.parameters() if weight.dim() >= 2]
    sparsity = 1.0 - sum(int(torch.count_nonzero(weight)) for weight in zeros) / sum(map(torch.numel, zeros))
    synchronise = torch.cuda.synchronize if args.device.startswith("cuda") else None
    rows: list[dict[str, Any]] = []
    for batch_size in args.batch_sizes:
        inputs = make_inputs(sparse, args.model, batch_size, args.length, args.device)
        if args.dtype != "float32" and "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        models: dict[str, nn.Module] = {"dense": dense}
        if args.dense is not None:
            models["with zeros"] = sparse
        layers: list[dict[str, Any]] = []
        if args.device == "cpu" and args.dtype == "float32":
            models["compressed rows"], timings = use_csr(sparse, inputs)
            layers = [asdict(timing) for timing in timings]
        expected = sparse(**inputs).logits
        # Another checkpoint's outputs are its own.
        errors = {
            label: 0.0 if model is dense else relative_error(model(**inputs).logits, expected)
            for label, model in models.items()
        }
        right = {label: model for label, model in models.items() if errors[label] <= TOLERANCE}
        forwards: dict[str, Callable[[], object]] = {
            label: functools.partial(model, **inputs) for label, model in right.items()
        }
        found = measure(forwards, batch_size=batch_size, runs=args.runs, synchronise=synchronise)
        for label in models:
            row: dict[str, Any] = {"batch_size": batch_size, "model": label, "error": errors[label], "verdict": "WRONG"}
            if label in found:
                ratio = found["dense"].median / found[label].median
                row |= {**asdict(found[label]), "speedup": ratio, "verdict": "ok"}
            if label == "compressed rows":
                row["layers"] = layers
            rows.append(row)
    environment = {
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    return {
        "model": Path(args.model).name, "sparsity": sparsity, "pruned_to": args.prune, "dtype": args.dtype,
        "length": args.length, "environment": environment, "rows": rows,
    }  # fmt: skip


def pruned(model: nn.Module, sparsity: float) -> nn.Module:
    """`model` with the smallest weights of each linear layer and convolution set to 0, in place."""
    ts.sparsify(model, ts.methods.Static(sparsity=sparsity, criterion="magnitude")).finalize()
    return model.eval()


def _show(document: dict[str, Any]) -> None:
    environment = document["environment"]
    print(
        f"{document['model']}, {document['sparsity']:.1%} zeros, on {environment['device']}, "
        f"{environment['threads']} thread(s), torch {environment['torch']}"
    )
    print(
        f"{'batch':>6}  {'model':<16}{'ms':>10}{'p20':>10}{'p80':>10}{'samples/s':>12}{'x dense':>9}  layers compressed"
    )
    for row in document["rows"]:
        start = f"{row['batch_size']:>6}  {row['model']:<16}"
        if row["verdict"] == "WRONG":
            print(f"{start}  WRONG: error {row['error']:.1e}")
            continue
        layers = row.get("layers")
        used = "" if layers is None else f"{sum(layer['used'] for layer in layers)} of {len(layers)} tried"
        times = "".join(f"{1e3 * row[key]:>10.2f}" for key in ("median", "p20", "p80"))
        print(f"{start}{times}{row['throughput']:>12.1f}{row['speedup']:>9.2f}  {used}")


if __name__ == "__main__":
    sys.exit(main())
