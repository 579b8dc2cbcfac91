"""Thousands of argument lists, most wrong somewhere: each is served, or refused in one line with nothing written.

A list is a program's own small one with one to three options changed, drawn from words in range, at its borders, out of
it, of another type, empty, huge, and paths of every kind. What is refused by what an option takes is known beforehand
(tests/train/test_command_lines.py); what options and data make of each other is the program's to say, in the same form.
A training that is accepted is prepared, not run; a run that is resumed may differ in nothing that matters.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import io
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tritonsparse.eval import speed
from tritonsparse.eval.preprocessing import Preprocessing
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel, Vocabulary
from tritonsparse.train import memorization
from tritonsparse.train.text.subwords import train_byte_tokenizer

pytestmark = pytest.mark.long

SEED = int(os.environ.get("TRITONSPARSE_SWEEP_SEED", "0"))
# Lists of each training program, and of each eval program.
TRAINING, EVALUATION = 1200, 150
HUGE = ("1000003", str(2**40), str(2**53))
METHODS = (
    "--method=gmp --sparsity=0.5", "--method=rigl --sparsity=0.9", "--method=acdc --sparsity=0.5", "--method=dense",
    "--method=str", "--method=set --sparsity=0.5", "--method=gmp", "--method=dense --sparsity=0.5",
    "--method=swat --sparsity=0.5", "--method=topkast --sparsity=0.6", "--method=dst", "--method=optg --sparsity=0.5",
    "--method=mest --sparsity=0.5", "--method=static --sparsity=0", "--method=powerprop --sparsity=0.5",
    "--method=snfs --sparsity=0.5", "--method=dsr --sparsity=0.3",
)  # fmt: skip
FIELDS = (
    "alpha", "update_every", "distribution", "stop_at", "drop_fraction", "phases", "strict", "penalty", "doublings",
    "threshold_init", "min_density", "refresh_every", "slack", "auto_tune", "beta", "mutation", "unknown",
)  # fmt: skip
JSON = ("0", "1", "-1", "0.5", "2.5", "1e99", "NaN", "Infinity", "true", "null", '"x"', '""', "[]", "[0.5]", "{}")
PATHS = (
    "{here}/folder", "{here}/file", "{here}/none", "{here}/file/below", "{here}/äöü x", "/proc/none",
    "{here}/" + "n" * 300, "{here}/bad.json", "nobody/nothing", ".", "embedded",
)  # fmt: skip
# Options that say something about each other.
PAIRS = (
    "--average_checkpoints=2 --checkpointing_steps=1", "--average_checkpoints=9 --checkpointing_steps=epoch",
    "--checkpoints_total_limit=1 --average_checkpoints=2 --checkpointing_steps=1", "--save_twins",
    "--num_train_epochs=1 --max_train_steps=2", "--nesterov --momentum=0", "--warmup_epochs=1 --num_warmup_steps=1",
    "--image_size=8 --eval_resize=4", "--image_size=4 --augmentation=imagenet", "--lr_scheduler_type=multistep",
    "--lr_scheduler_type=multistep --lr_milestones 1 2", "--lr_scheduler_type=multistep --lr_milestones 2 1",
    "--source_lang=de --target_lang=en", "--source_lang=en --target_lang=en", "--mem_len=0 --test_same_length",
    "--min_learning_rate=0.5 --learning_rate=0.1", "--min_learning_rate=0 --learning_rate=0", "--with_tracking",
    "--pattern=block:4 --backend=block", "--pattern=2:4 --backend=semi_structured", "--backend=triton", "--roll",
    "--include * --exclude *", "--include no_such_*", "--exclude no_such_*", "--learning_rate=0", "--report_to=wandb",
    "--record_reference_losses={here}/none/losses.json --method=dense", "--auto_tune={here}/bad.json",
    "--preset=gpt2-tiny --vocab_size=300 --block_size=8", "--preset=gpt2-tiny --vocab_size=300 --eval_stride=99",
    "--gradient_accumulation_steps=2", "--resume_from_checkpoint=latest",
    "--dataset_name=embedded --train_file={here}/file",
    "--max_source_length=1000 --max_tokens_per_batch=400", "--mixed_precision=fp16", "--mixed_precision=bf16",
)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder with one of every kind of path, and no network."""
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(importlib.import_module(module), "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("some words\nand more\n", encoding="utf-8")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    return tmp_path


@pytest.fixture
def tables() -> Any:
    """KINDS and the like of tests/train/test_command_lines.py, and `contents` and `reset` of its conftest."""
    programs = importlib.import_module("sweep_conftest")
    module = importlib.import_module("sweep_test_command_lines")
    return SimpleNamespace(**vars(module), contents=programs.contents, reset=programs.reset)


def drawn(draw: random.Random, program: str, tables: Any, here: Path) -> tuple[list[str], set[str]]:
    """Words to add to a program's own, and the options of which one at least gets what it never takes."""
    kinds, words, wrong = tables.kinds_of(program), [], set()
    training = "method" in kinds
    for _ in range(draw.choice((1, 1, 2, 3))):
        how = draw.random()
        if training and how < 0.12:
            words += draw.choice(METHODS).split()
        elif training and how < 0.22:
            words.append(f'--method_args={{"{draw.choice(FIELDS)}": {draw.choice(JSON)}}}')
        elif training and how < 0.34:
            words += draw.choice(PAIRS).format(here=here).split()
        else:
            option = draw.choice(sorted(kinds.keys() - {"output_dir", "report_to"}))
            kind = kinds[option]
            good, bad = tables.KINDS[kind]
            words = [word for word in words if not word.startswith(f"--{option}=")]
            wrong.discard(option)
            if draw.random() < 0.4:
                words.append(f"--{option}={draw.choice(bad)}")
                wrong.add(option)
                continue
            if kind == "text":
                words.append(f"--{option}={draw.choice(PATHS).format(here=here)}")
            else:
                more = HUGE if kind in ("count", "natural", "two") and option not in ("runs", "batch_sizes") else ()
                # Of memory and time, not of range.
                good = ("1", "7", "16") if kind == "pixels" else good
                words.append(f"--{option}={draw.choice((*good, *more, '2', '3') if more else good)}")
    # An option that is drawn twice counts by its last word.
    return words, {option for option in wrong if any(word.startswith(f"--{option}=") for word in words)}


class Sweep:
    """Counts, and what went wrong: all of it, so that one run finds everything."""

    def __init__(self, tables: Any) -> None:
        self.tables, self.counts, self.faults = tables, collections.Counter[str](), list[str]()

    def refused(self, words: list[str], err: str, wrong: set[str]) -> None:
        lines = [line for line in err.replace("\r", "\n").splitlines(keepends=True) if line.startswith("error: ")]
        if len(lines) != 1 or "Traceback" in err or not self.tables.FORM.fullmatch(lines[0]):
            self.faults.append(f"not one sentence: {words} -> {lines or err[-300:]}")
        elif wrong and not any(option in lines[0] for option in wrong) and "--recipe" not in " ".join(words):
            self.counts["refused for another reason first"] += 1
        self.counts["refused"] += 1

    def served(self, words: list[str], wrong: set[str]) -> None:
        if wrong:
            self.faults.append(f"taken, although {wrong} is never so: {words}")
        self.counts["served"] += 1

    def end(self, name: str, capsys: Any) -> None:
        with capsys.disabled():
            print(f"\n{name}: {sum(self.counts[key] for key in ('refused', 'served'))} lists, {dict(self.counts)}")
            for fault in self.faults:
                print(f"  {fault}")
        assert not self.faults and self.counts["refused"] and self.counts["served"]


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        yield err


@pytest.mark.parametrize("name", ["translation", "language_modeling", "image_classification", "memorization"])
def test_training_is_prepared_or_refused(name: str, request: Any, here: Path, tables: Any, capsys: Any) -> None:
    fixture = {"language_modeling": "language", "translation": "translation"}.get(name, "images")
    program = request.getfixturevalue(fixture)
    module = memorization if name == "memorization" else program.module
    own = ("--corrupted_samples=20", "--augmentation=crop", "--sparsities", "0") if name == "memorization" else ()
    draw, sweep = random.Random(f"{name}/{SEED}"), Sweep(tables)
    checkpoint, length = here / "used", "--max_train_steps=2"
    if name != "memorization":
        program.train(checkpoint, length, "--method=dense", "--checkpointing_steps=1")
    for number in range(TRAINING if name != "memorization" else TRAINING // 4):
        words, wrong = drawn(draw, name, tables, here)
        resumes = number % 10 == 0 and name != "memorization"
        out = here / "run"
        if resumes:
            shutil.copytree(checkpoint / "step_1", out / "step_1")
            words = ["--method=dense", "--checkpointing_steps=1", "--resume_from_checkpoint=latest", *words]
        if not any(word.startswith(("--num_train_epochs", "--max_train_steps")) for word in words):
            words = [length, *words]
        before = tables.contents(here)
        with program.small(), quiet() as err:
            words = program.words(out, *own, *words)
            ran: list[Any] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "finish", lambda run: None)
                patch.setattr("tritonsparse.train.run.loop.Loop.run", lambda loop, ran=ran: ran.append(loop))
                patch.setattr(memorization.Experiment, "run", lambda each, ran=ran: ran.append(each))
                try:
                    status = module.main(words)
                except BaseException as error:  # what a program must not raise
                    status = -1
                    sweep.faults.append(f"raised {type(error).__name__}: {error}: {words}")
        tables.reset()
        if status == 2:
            sweep.refused(words, err.getvalue(), wrong)
            if tables.contents(here) != before:
                sweep.faults.append(f"refused, but written to: {words}")
        elif status == 0:
            sweep.served(words, wrong)
            assert len(ran) == 1
        elif status != -1:
            sweep.faults.append(f"status {status}: {words}: {err.getvalue()[-300:]}")
        shutil.rmtree(out, ignore_errors=True)
    sweep.end(name, capsys)


@pytest.fixture
def models(here: Path, saved_marian: Any) -> dict[str, tuple[str, ...]]:
    """Program -> what it is given: tiny models, and texts of ten lines."""
    torch.manual_seed(0)
    lines = [f"w{number} w1 w2 w{number % 3}" for number in range(12)]
    (here / "text").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    vocabulary = Vocabulary.count(lines, 1)
    sizes = dict(cutoffs=[4, 6], d_model=8, d_embed=8, n_head=2, d_head=4, d_inner=8, div_val=1, n_layer=1, mem_len=4)
    TransfoXLLMHeadModel(TransfoXLConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(here / "xl")
    vocabulary.save(here / "xl" / "vocabulary.txt")
    tokenizer = train_byte_tokenizer(lines, 260)
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        here / "gpt"
    )
    tokenizer.save_pretrained(here / "gpt")
    labels = {"id2label": {n: str(n) for n in range(10)}, "label2id": {str(n): n for n in range(10)}}
    config = CifarResNetConfig(depth=8, widths=[2, 2, 2], num_channels=1, image_size=8, **labels)
    CifarResNetForImageClassification(config).save_pretrained(here / "images")
    Preprocessing((0.3,), (0.4,)).save(here / "images")
    run = here / "a_run"
    run.mkdir()
    history = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    (run / "all_results.json").write_text(json.dumps({"method": "gmp", "history": history}), encoding="utf-8")
    text, marian = f"{here}/text", saved_marian(0.1)
    (here / "short").write_text("w1 w2\nw3 w1\n", encoding="utf-8")
    return {
        "accuracy": (f"--model={here}/images", "--dataset_name=embedded", "--max_samples=8"),
        "agreement": (f"--first={here}/xl", f"--second={here}/xl", f"--text_file={text}", "--tgt_len=4"),
        "bleu": (f"--model={marian}", f"--source_file={here}/short", f"--reference_file={here}/short",
                 "--num_beams=1", "--extra_tokens=2"),
        "perplexity": (f"--model={here}/gpt", f"--text_file={text}", "--window=8"),
        "speed": (f"--model={here}/images", "--batch_sizes", "1", "--runs=1"),
        "onnx_export": (f"--model={here}/images", f"--output={here}/out/model.onnx"),
        "plots": (str(run), f"--output={here}/out"),
        "doctor": (f"--model_name_or_path={here}/gpt",),
        "layer_bench": ("--shape=8x8", "--tokens=4", "--runs=1", "--dtype=float32"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["accuracy", "agreement", "bleu", "perplexity", "speed", "onnx_export", "plots", "doctor", "layer_bench"],
)
def test_evaluation_is_done_or_refused(
    name: str, models: Any, here: Path, tables: Any, capsys: Any, monkeypatch: Any
) -> None:
    draw, sweep = random.Random(f"{name}/{SEED}"), Sweep(tables)
    monkeypatch.setattr(speed, "use_csr", lambda model, inputs: (model, []))
    if name == "onnx_export":
        # Seconds each; what they write is tested elsewhere.
        module = importlib.import_module("tritonsparse.eval.onnx_export")
        monkeypatch.setattr(module, "export_onnx", lambda *_: here / "file")
        monkeypatch.setattr(module, "round_trip", lambda *_: module.RoundTrip(0.0, 0, 0, 0))
    for _ in range(EVALUATION):
        added, wrong = drawn(draw, name, tables, here)
        # Of memory and time, not of range.
        added = [word for word in added if not word.endswith(HUGE) or "batch_size=" in word]
        words, before = [*models[name], *added], tables.contents(here)
        threads = torch.get_num_threads()
        with quiet() as err:
            try:
                status = tables.MAINS[name](words)
            except BaseException as error:
                status = -1
                sweep.faults.append(f"raised {type(error).__name__}: {error}: {words}")
        torch.set_num_threads(threads)
        if status == 2:
            sweep.refused(words, err.getvalue(), wrong)
            if tables.contents(here) != before:
                sweep.faults.append(f"refused, but written to: {words}")
        elif status in (0, 1):
            sweep.served(words, wrong)
        shutil.rmtree(here / "out", ignore_errors=True)
    sweep.end(name, capsys)
