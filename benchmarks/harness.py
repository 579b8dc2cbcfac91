"""What the benchmarks share: the machine they ran on, timing, the error gate, tables and result files.

A benchmark prints the machine, a fixed-width table and, as its last line, one JSON document with the same
rows. The document is also written, whole or not at all, to `<out>/<device>/<name>.json`. A case whose result
disagrees with the reference prints WRONG and gets no time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Samples of a timing: enough for p20 and p80 to mean something; and of one by --quick.
SAMPLES, QUICK_SAMPLES = 50, 10

Row = dict[str, Any]


def device_name() -> str | None:
    """The GPU's name as a folder name ("nvidia-h200"), None without one."""
    if not torch.cuda.is_available():
        return None
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def environment() -> dict[str, str | None]:
    """GPU, driver, versions and, in a git checkout, the commit."""
    cuda = torch.cuda.is_available()
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "driver": _output(*driver) if cuda else None,
        "torch": str(torch.__version__),
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
    }


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip().partition("\n")[0] or None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ranked = sorted(samples)
        median, p20, p80 = (ranked[round(q * (len(ranked) - 1))] for q in (0.5, 0.2, 0.8))
        return cls(median, p20, p80)


def sample(calls: Sequence[Callable[[], object]], count: int) -> list[float]:
    """Milliseconds of `count` calls, taken from `calls` in turn; device time on a GPU. No warm-up."""
    if not torch.cuda.is_available():
        times = []
        for number in range(count):
            start = time.perf_counter()
            calls[number % len(calls)]()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for number, (start_event, end_event) in enumerate(events):
        start_event.record()
        calls[number % len(calls)]()
        end_event.record()
    torch.cuda.synchronize()
    return [start_event.elapsed_time(end_event) for start_event, end_event in events]


def measure(calls: Sequence[Callable[[], object]], *, graph: bool = False, samples: int = SAMPLES) -> Timing:
    """Time of one call, warmed up.

    Args:
        calls: the same work on as many sets of inputs as `input_sets` says, so that none is found in the L2.
        graph: on a GPU, time replays of a CUDA graph that holds every call once, divided by their number:
            what the device needs, without what Python and launches need.
        samples: how many samples the quantiles are of.
    """
    for call in calls:
        call()
    if not torch.cuda.is_available():
        return Timing.of(sample(calls, samples))
    share = 1
    if graph:
        calls, share = [captured(calls)], len(calls)
    sample(calls, max(3, samples // 5))
    return Timing.of([milliseconds / share for milliseconds in sample(calls, samples)])


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A CUDA graph of all calls, once each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Held, so that no call writes into memory that the one before left in the L2.
        held = [call() for call in calls]

    def replay(_held: object = held) -> None:
        graph.replay()

    return replay


def input_sets(nbytes: int) -> int:
    """How many sets of `nbytes` bytes are three times the L2; at least two, at most 256."""
    if not torch.cuda.is_available():
        return 1
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(256, math.ceil(3 * l2 / nbytes)))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN where either holds one."""
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    return difference / scale if scale else difference


def gated(row: Row, error: float, bound: float, time: Callable[[], Timing]) -> Row:
    """`row` with its error and, where the error is within `bound`, the time; "WRONG" otherwise (NaN too)."""
    right = error <= bound
    timing = time() if right else None
    return {
        **row,
        "error": error,
        "bound": bound,
        "verdict": "right" if right else "WRONG",
        "median_ms": timing and timing.median,
        "p20_ms": timing and timing.p20,
        "p80_ms": timing and timing.p80,
    }


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Fixed-width text; `columns` maps keys to format specifications, values missing or None print as "-"."""

    def cell(row: Row, key: str, spec: str) -> str:
        value = row.get(key)
        if value is None:
            return str(row["verdict"]) if key == "median_ms" and row.get("verdict") == "WRONG" else "-"
        return format(value, spec)

    lines = [list(columns)] + [[cell(row, key, spec) for key, spec in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [not spec for spec in columns.values()]
    return "\n".join(
        "  ".join(
            word.ljust(width) if text else word.rjust(width)
            for word, width, text in zip(line, widths, texts, strict=True)
        ).rstrip()
        for line in lines
    )


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write the file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two tiny cases, on any machine")
    parser.add_argument("--quick", action="store_true", help="few cases, those that decide, and few samples")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose label matches, * and ? as in file names")
    parser.add_argument("--out", type=Path, default=None, help=f"folder of results, {RESULTS} by default")
    parser.add_argument("--rows", type=Path, default=None, help="file that rows are appended to as they are made")
    return parser


def refuse_without_gpu(program: str) -> None:
    """Exit with status 2 and one sentence where there is no GPU."""
    if not torch.cuda.is_available():
        print(f"{program}: expected a GPU that torch sees, got none; pass --smoke", file=sys.stderr)
        raise SystemExit(2)


def announce() -> None:
    """The first line of a benchmark's output: the machine."""
    print("  ".join(f"{key} {value}" for key, value in environment().items() if value), flush=True)


def publish(
    name: str, rows: Sequence[Row], columns: Mapping[str, str], out: Path | None, **facts: Any
) -> dict[str, Any]:
    """Print the table and the JSON line; write the document where `out`, or a GPU, says it is to be kept."""
    document = {"name": name, "environment": environment(), **facts, "rows": list(rows)}
    print(table(rows, columns))
    device = device_name()
    if out is not None or device is not None:
        write_json((out or RESULTS) / (device or "cpu") / f"{name}.json", document)
    print(json.dumps(document), flush=True)
    return document
