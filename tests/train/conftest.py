"""Small runs of the translation program in this process, each with a fresh accelerate."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from tritonsparse.train import translation
from tritonsparse.train.run import results
from tritonsparse.train.text import corpora
from tritonsparse.train.text import translation_presets as presets
from tritonsparse.train.text.source import TextSource
from tritonsparse.train.text.subwords import train_tokenizer

# One layer each side, d_model 16: 5,120 weights in 16 linear layers.
SIZES = (1, 16, 2, 32, 0.1)
FROM_SCRATCH = ["--preset=transformer-tiny", "--vocab_size=200"]
SMALL = [
    "--max_train_samples=300", "--max_tokens_per_batch=400",
    "--max_eval_samples=3", "--max_test_samples=4", "--num_beams=1", "--num_warmup_steps=2", "--learning_rate=0.01",
    "--logging_steps=2",
]  # fmt: skip


def small(options: Sequence[str]) -> list[str]:
    """The options of a small run; a saved model has its own sizes."""
    saved = any(option.startswith("--model_name_or_path") for option in options)
    return [*SMALL, *options] if saved else [*FROM_SCRATCH, *SMALL, *options]


# Untrained models talk on to the limit; a short one keeps their evaluation cheap.
EXTRA_TOKENS = 5


@functools.cache
def embedded(*options: Any) -> dict[str, list[tuple[str, str]]]:
    """One corpus serves all runs that ask for the same."""
    return corpora.load_parallel(TextSource("embedded"), *options)


def _load(source: TextSource, *options: Any) -> dict[str, list[tuple[str, str]]]:
    return embedded(*options) if source == TextSource("embedded") else corpora.load_parallel(source, *options)


Train = Callable[..., dict[str, Any]]


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state a process, which would refuse the next run's mixed precision."""
    yield
    _reset()


@pytest.fixture(scope="module")
def small_program() -> Iterator[pytest.MonkeyPatch]:
    """The program with a tiny model and without what only costs time here."""
    patch = pytest.MonkeyPatch()
    search = translation.translate
    patch.setitem(presets.PRESETS, "transformer-tiny", SIZES)
    patch.setattr(translation, "load_parallel", _load)
    patch.setattr(
        translation,
        "translate",
        lambda *args, **options: search(*args, **{**options, "extra_tokens": EXTRA_TOKENS, "progress": False}),
    )
    yield patch
    patch.undo()


@pytest.fixture(scope="module")
def train(small_program: pytest.MonkeyPatch) -> Train:
    """`train(output_dir, *options, plots=False)` runs the program and returns its all_results.json."""

    def run(output_dir: Path, *options: str, plots: bool = False) -> dict[str, Any]:
        _reset()
        with pytest.MonkeyPatch.context() as patch:
            if not plots:
                patch.setattr(results, "plot", lambda *_: None)
            assert translation.main(small(["--output_dir", str(output_dir), *options])) == 0
        document: dict[str, Any] = json.loads((output_dir / "all_results.json").read_text(encoding="utf-8"))
        return document

    return run


@pytest.fixture(scope="session")
def corpus_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The options that name 300 + 3 + 5 pairs of the embedded corpus as local files, for runs in other processes."""
    pairs = embedded("en", "de", 300)
    folder = tmp_path_factory.mktemp("corpus")
    options = []
    for split, count in (("train", 300), ("validation", 3), ("test", 5)):
        rows = [json.dumps({"en": en, "de": de}) + "\n" for en, de in pairs[split][:count]]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
        options.append(f"--{split}_file={folder / split}.jsonl")
    return tuple(options)


@pytest.fixture(scope="session")
def saved_marian(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """`saved_marian(dropout)`: folder of a tiny Marian model and its tokenizer, for `--model_name_or_path`."""
    tokenizer = train_tokenizer(embedded("en", "de", 300)["train"], 200)

    def save(dropout: float) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("marian")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(presets.PRESETS, "transformer-tiny", SIZES)
            presets.build_model("transformer-tiny", tokenizer, dropout=dropout).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def refusal(small_program: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refusal(output_dir, *options)`: status 2, one error line, nothing new in the folder; returns the line."""

    def run(output_dir: Path, *options: str) -> str:
        _reset()
        before = sorted(output_dir.rglob("*"))
        capsys.readouterr()
        assert translation.main(small(["--output_dir", str(output_dir), *options])) == 2
        stderr = capsys.readouterr().err
        assert "Traceback" not in stderr
        lines = [line for line in stderr.splitlines() if "error" in line.lower()]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert [path for path in sorted(output_dir.rglob("*")) if path not in before] == []
        return lines[0]

    return run
