"""The three programs at sizes that cost a second, run in this process, each run with a fresh accelerate."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from tritonsparse.train import image_classification, language_modeling
from tritonsparse.train import translation as translation_program
from tritonsparse.train.images.models import IMAGE_MODELS
from tritonsparse.train.run import results
from tritonsparse.train.text import corpora, language_presets, translation_presets
from tritonsparse.train.text.source import TextSource
from tritonsparse.train.text.subwords import train_tokenizer

# One layer each side, d_model 16: 5,120 weights in 16 linear layers.
MARIAN = (1, 16, 2, 32, 0.1)
TRANSFO_XL = language_presets.Sizes(2, 16, 2, 8, 32, 1, 0.1, 0.0, 0.1, (12,), 8)
SEARCH = translation_program.translate
build = functools.partial(translation_presets.build_model, max_positions=128)


# Who refuses: expected what, got what; what to do.
FORM = re.compile(r"error: [\w .]+: expected .+, got .+; .+")


def contents(folder: Path) -> dict[Path, bytes | None] | None:
    """What lies under a folder; None where it is not there."""
    files = {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
    return files if folder.exists() else None


def reset() -> None:
    """accelerate keeps one state a process, which would refuse the next run's mixed precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    reset()


@dataclass(frozen=True)
class Program:
    """options: of every run. from_scratch: of runs without a saved model. sizes: (table, preset, its small size)."""

    module: ModuleType
    options: tuple[str, ...]
    from_scratch: tuple[str, ...]
    sizes: tuple[tuple[dict[str, Any], str, Any], ...]

    @contextlib.contextmanager
    def small(self, plots: bool = False) -> Iterator[pytest.MonkeyPatch]:
        """A fresh accelerate, the small sizes, and nothing that only costs time here."""
        reset()
        with pytest.MonkeyPatch.context() as patch:
            for table, preset, size in self.sizes:
                patch.setitem(table, preset, size)
            patch.setattr(translation_program, "load_parallel", load)
            patch.setattr(translation_program, "translate", translate)
            patch.setattr(translation_program, "build_model", build)
            if not plots:
                patch.setattr(results, "plot", lambda *_: None)
                patch.setattr(language_modeling, "plot_twins", lambda *_, **__: None)
            yield patch

    def words(self, folder: Path, *options: str) -> list[str]:
        """The command line; a saved model has its own sizes."""
        saved = any(option.startswith("--model_name_or_path") for option in options)
        return [f"--output_dir={folder}", *self.options, *(() if saved else self.from_scratch), *options]

    def finished(self, folder: Path, *options: str, plots: bool = False) -> SimpleNamespace:
        """A run that ended: its `folder`, all_results.json as `document`, the program's `run`, and what went `out`."""
        finish, runs, out = self.module.finish, [], io.StringIO()
        with self.small(plots) as patch, contextlib.redirect_stdout(out):
            patch.setattr(self.module, "finish", lambda run: (runs.append(run), finish(run)))
            assert self.module.main(self.words(folder, *options)) == 0
        document = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        return SimpleNamespace(folder=folder, document=document, run=runs[0], out=out.getvalue())

    def train(self, folder: Path, *options: str) -> dict[str, Any]:
        return dict(self.finished(folder, *options).document)

    def refusal(self, folder: Path, *options: str) -> str:
        """The one error line of a run that ends with status 2 and leaves the folder as it was, byte for byte."""
        before, err = contents(folder), io.StringIO()
        with self.small(), contextlib.redirect_stderr(err):
            assert self.module.main(self.words(folder, *options)) == 2
        assert "Traceback" not in err.getvalue()
        (line,) = [line for line in err.getvalue().splitlines() if "error" in line.lower()]
        assert FORM.fullmatch(line), line
        assert contents(folder) == before
        return line


@functools.cache
def embedded(*options: Any) -> dict[str, list[tuple[str, str]]]:
    """One corpus, with small held-out splits, serves all runs that ask for the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "DEFAULT_SIZES", {"train": 400, "validation": 8, "test": 8})
        return corpora.load_parallel(TextSource("embedded"), *options)


LOAD = corpora.load_parallel


def load(source: TextSource, *options: Any) -> dict[str, list[tuple[str, str]]]:
    return embedded(*options) if source == TextSource("embedded") else LOAD(source, *options)


def translate(*arguments: Any, **options: Any) -> list[str]:
    """Untrained models talk on to the limit; a short one keeps their evaluation cheap."""
    return SEARCH(*arguments, **{**options, "extra_tokens": 5, "progress": False})


@pytest.fixture(scope="session")
def translation() -> Program:
    options = (
        "--max_train_samples=300", "--max_tokens_per_batch=400", "--max_eval_samples=3", "--max_test_samples=4",
        "--num_beams=1", "--num_warmup_steps=2", "--learning_rate=0.01", "--logging_steps=2",
    )  # fmt: skip
    sizes = ((translation_presets.PRESETS, "transformer-tiny", MARIAN),)
    return Program(translation_program, options, ("--preset=transformer-tiny", "--vocab_size=200"), sizes)


@pytest.fixture(scope="session")
def images() -> Program:
    """A preset of 2,420 weights in 8 sparse layers."""

    def tiny(**options: Any) -> CifarResNetForImageClassification:
        return CifarResNetForImageClassification(CifarResNetConfig(depth=8, widths=[4, 8, 8], **options))

    options = ("--max_train_samples=300", "--max_test_samples=60", "--batch_size=32", "--logging_steps=2")
    scratch = ("--preset=tiny", "--learning_rate=0.1")
    return Program(image_classification, options, scratch, ((IMAGE_MODELS, "tiny", tiny),))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: Any) -> dict[str, Path]:
    """Files of words for language models, by split; 4 columns of train have about 110 tokens."""
    folder, words = tmp_path_factory.mktemp("text"), [f"w{number}" for number in range(25)]
    for seed, (split, count) in enumerate({"train": 66, "validation": 15, "test": 20}.items()):
        draw = random.Random(seed)
        lines = [draw.choices(words, weights=range(25, 0, -1), k=draw.randint(0, 12)) for _ in range(count)]
        (folder / split).write_text("".join(" ".join(line) + "\n" for line in lines), encoding="utf-8")
    return {split: folder / split for split in ("train", "validation", "test")}


@pytest.fixture(scope="session")
def language(texts: dict[str, Path]) -> Program:
    files = tuple(f"--{split}_file={path}" for split, path in texts.items())
    options = (*files, "--batch_size=4", "--eval_batch_size=2", "--logging_steps=5", "--learning_rate=0.01")
    gpt2 = (language_presets.GPT2, "gpt2-tiny", (1, 16, 2, 16))
    sizes = ((language_presets.TRANSFO_XL, "transfoxl-tiny", TRANSFO_XL), gpt2)
    return Program(language_modeling, options, ("--preset=transfoxl-tiny",), sizes)


@pytest.fixture
def program(request: Any) -> Any:
    """The program of a parameter's name."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def corpus_files(tmp_path_factory: Any) -> tuple[str, ...]:
    """The options that name 300 + 3 + 5 pairs of the embedded corpus as local files, for runs in other processes."""
    pairs, folder = embedded("en", "de", 300), tmp_path_factory.mktemp("corpus")
    for split, count in {"train": 300, "validation": 3, "test": 5}.items():
        rows = [json.dumps({"en": en, "de": de}) + "\n" for en, de in pairs[split][:count]]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    return tuple(f"--{split}_file={folder / split}.jsonl" for split in ("train", "validation", "test"))


@pytest.fixture(scope="session")
def saved_marian(tmp_path_factory: Any) -> Callable[[float], Path]:
    """`saved_marian(dropout)`: folder of a tiny Marian model and its tokenizer, for `--model_name_or_path`."""
    tokenizer = train_tokenizer(embedded("en", "de", 300)["train"], 200)

    @functools.cache
    def save(dropout: float) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("marian")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(translation_presets.PRESETS, "transformer-tiny", MARIAN)
            build("transformer-tiny", tokenizer, dropout=dropout).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def launched() -> Callable[..., str]:
    """`launched(*arguments)` runs Python, each process on one core, and returns what was printed."""

    def run(*arguments: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
