"""Two processes as torchrun starts them are one process that accumulates two batches, for every program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tritonsparse.train import image_classification, language_modeling, translation
from tritonsparse.train.run import checkpoints
from tritonsparse.train.text import language_presets

SIZES = (1, 16, 2, 8, 32, 1, 0.0, 0.0, 0.1, (12,), 8)
# Three programs in the same two processes, which a third leaves after its imports as torchrun would start them. Each
# translation begins with its source, and each rank leaves its master weights. Their connection is kept for the next.
WORKER = f"""
import json, os, sacrebleu, sklearn.datasets, socket, sys, torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tritonsparse.train import language_modeling, memorization, translation
from tritonsparse.train.run import results
from tritonsparse.train.text import language_presets
results.plot = language_modeling.plot_twins = memorization.plot_memorization = lambda *_, **__: None
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
other, shared = os.fork(), {{"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}}
finish, search, rank = translation.finish, translation.translate, "0" if other else "1"
os.environ.update(shared | {{"LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}})
def marked(model, tokenizer, sources, **options):
    return [f"{{s}} | {{text}}" for s, text in zip(sources, search(model, tokenizer, sources, **options))]
def dump(run):
    finish(run)
    torch.save(run.loop.sparsifier.model.state_dict(), os.path.join(sys.argv[1], f"rank{{rank}}.pt"))
translation.finish, translation.translate = dump, marked
end, Accelerator.end_training = Accelerator.end_training, lambda self: None
language_presets.TRANSFO_XL["transfoxl-tiny"] = language_presets.Sizes(*{SIZES!r})
programs = {{"translation": translation, "language": language_modeling, "memorization": memorization}}
for name, program in programs.items():
    if program is memorization:
        Accelerator.end_training = end
    options = json.load(open(os.path.join(sys.argv[1], f"{{name}}.json")))
    assert program.main([*options, "--output_dir", os.path.join(sys.argv[1], name)]) == 0
    AcceleratorState._reset_state()
    GradientState._reset_state()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0)
"""


@pytest.fixture(scope="module")
def translating(saved_marian: Callable[[float], Path], corpus_files: tuple[str, ...]) -> list[str]:
    # No dropout: ranks draw their own. Three and five sentences: neither set divides by two. A large epsilon: Adam
    # would not notice gradients of the wrong scale.
    return [
        "--model_name_or_path", str(saved_marian(0.0)), *corpus_files, "--max_tokens_per_batch=400",
        "--max_train_steps=6", "--num_warmup_steps=2", "--learning_rate=0.1", "--num_beams=1", "--logging_steps=1",
        "--adam_epsilon=0.1", "--method_args", '{"threshold_init": -3}', "--checkpointing_steps=3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def modelling(tmp_path_factory: Any) -> list[str]:
    # Every split the same text, so that no word is unknown.
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"w{number % 17} w{number % 5} w{number % 11}\n" for number in range(60)))
    return [
        "--preset=transfoxl-tiny", "--batch_size=4", "--max_train_steps=9", "--method=gmp", "--sparsity=0.5",
        *(f"--{split}_file={path}" for split in ("train", "validation", "test")), '--method_args={"update_every": 2}',
        "--eval_batch_size=2", "--logging_steps=1", "--adam_epsilon=0.1", "--learning_rate=0.1",
        "--checkpointing_steps=4", "--roll",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pair(translating: list[str], modelling: list[str], launched: Any, tmp_path_factory: Any) -> tuple[Path, str]:
    """The folder in which two processes wrote `translation`, `language` and `memorization`, and what they printed."""
    folder = tmp_path_factory.mktemp("pair")
    for name, options in {"translation": translating, "language": modelling, "memorization": REMEMBERING}.items():
        (folder / f"{name}.json").write_text(json.dumps(options), encoding="utf-8")
    return folder, launched("-c", WORKER, str(folder))


@pytest.fixture(scope="module")
def alone(translating: list[str], tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert translation.main([*translating, "--gradient_accumulation_steps=2", "--output_dir", str(folder)]) == 0
    return folder


def results(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return document


def same_losses(ours: dict[str, Any], theirs: dict[str, Any], rel: float) -> None:
    losses = [row["loss"] for row in theirs["history"]]
    assert [row["step"] for row in ours["history"]] == [row["step"] for row in theirs["history"]]
    assert [row["loss"] for row in ours["history"]] == pytest.approx(losses, rel=rel)


def test_losses_are_those_of_one_process_and_both_ranks_end_with_identical_weights(pair: Any, alone: Path) -> None:
    ours, theirs = results(pair[0] / "translation"), results(alone)
    assert ours["environment"]["processes"] == 2 and len(ours["history"]) == 6
    same_losses(ours, theirs, rel=1e-4)
    assert ours["sparsity"] == pytest.approx(theirs["sparsity"], abs=1e-3)
    first, second = (torch.load(pair[0] / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert any(key.endswith("threshold") for key in first)
    saved = load_file(pair[0] / "translation" / "step_6" / "model.safetensors")
    assert [key for key in saved if not torch.equal(saved[key], first[key])] == []


def test_an_odd_set_is_translated_and_printed_once(pair: Any, alone: Path, corpus_files: tuple[str, ...]) -> None:
    folder, out = pair[0] / "translation", pair[1]
    # Five test sentences over two ranks: 3 + 2, no duplicate that fills the shorter share.
    sources = [json.loads(line)["en"] for line in Path(corpus_files[-1].partition("=")[2]).read_text().splitlines()]
    printed = [line.removeprefix("  translation ") for line in out.splitlines() if line.startswith("  translation ")]
    assert [line.split(" | ")[0] for line in printed] == sources
    ours, theirs = (results(each)["bleu_line"].split("ref_len = ")[1] for each in (folder, alone))
    assert ours == theirs
    assert out.count("BLEU on test") == 1
    # An experiment of several runs keeps its processes together.
    document = json.loads((pair[0] / "memorization" / "memorization.json").read_text(encoding="utf-8"))
    assert document["environment"]["processes"] == 2
    assert {title: list(runs) for title, runs in document["runs"].items()} == {
        "without augmentation": ["dense"], "with augmentation": ["dense"],
    }  # fmt: skip


def test_one_of_two_writes_what_one_refuses(pair: Any, translating: list[str], tmp_path: Path, capsys: Any) -> None:
    folder = pair[0] / "translation"
    assert [path.name for path in checkpoints.checkpoint_folders(folder)] == ["step_3", "step_6"]
    written = {"model.safetensors", "optimizer.bin", "run.json", "tritonsparse_state.json"}
    written |= {f"random_states_{rank}.pkl" for rank in (0, 1)}
    assert written <= {path.name for path in (folder / "step_6").iterdir()}
    assert not list(folder.glob(".unfinished*"))
    # Its random states and its batches are of two ranks: it could not go on bit for bit.
    resume = [f"--resume_from_checkpoint={folder / 'step_3'}", f"--output_dir={tmp_path}"]
    assert translation.main([*translating, "--gradient_accumulation_steps=2", *resume]) == 2
    assert "expected a checkpoint of a run with" in capsys.readouterr().err


def test_each_process_has_its_own_memory(pair: Any, modelling: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    folder, one = pair[0] / "language", tmp_path / "one"
    monkeypatch.setitem(language_presets.TRANSFO_XL, "transfoxl-tiny", language_presets.Sizes(*SIZES))
    assert language_modeling.main([*modelling, "--gradient_accumulation_steps=2", f"--output_dir={one}"]) == 0
    ours = results(folder)
    assert ours["environment"]["processes"] == 2 and len(ours["history"]) == 9
    same_losses(ours, results(one), rel=1e-5)
    weights, expected = (load_file(each / "step_8" / "model.safetensors") for each in (folder, one))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    # The ranks' memories lie beside each other, and are the two chunks' of the other run.
    memory = load_file(one / "step_8" / "memory_0.safetensors")
    for rank in (0, 1):
        found = load_file(folder / "step_8" / f"memory_{rank}.safetensors")["0.0"]
        torch.testing.assert_close(found, memory[f"{rank}.0"], rtol=1e-4, atol=1e-6)


REMEMBERING = [
    "--preset=resnet8-narrow", "--max_train_samples=32", "--max_test_samples=9", "--batch_size=8", "--sparsities=0",
    "--num_train_epochs=1", "--corrupted_samples=5", "--augmentation=crop",
]  # fmt: skip


# The smallest preset, and 61 test images: they do not divide by two. A norm's statistics are counted again at the end,
# by all ranks on the same batches.
CLASSIFYING = [
    "--preset=resnet8-narrow", "--max_train_samples=96", "--max_test_samples=61", "--batch_size=12",
    "--logging_steps=1", "--num_train_epochs=2", "--method=acdc", "--sparsity=0.5", "--augmentation=crop",
    "--bn_reestimation_batches=2", "--checkpointing_steps=4", "--channels_last",
    "--method_args", '{"phases": {"starts": [[0, "dense"], [1, "sparse"]], "epochs": 2}}',
]  # fmt: skip


@pytest.mark.long
def test_two_processes_classify_as_one(launched: Any, tmp_path: Path) -> None:
    """Starting two processes takes longer than all else that is tested of images."""
    pair, alone = tmp_path / "pair", tmp_path / "alone"
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    )
    launched(*torchrun, "-m", "tritonsparse.train.image_classification", *CLASSIFYING, f"--output_dir={pair}")
    arguments = [*CLASSIFYING, "--gradient_accumulation_steps=2", f"--output_dir={alone}"]
    assert image_classification.main(arguments) == 0
    weights, expected = (load_file(folder / "step_8" / "model.safetensors") for folder in (pair, alone))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        # Running statistics are the first rank's, over its own batches.
        if "running" not in name and tensor.is_floating_point():
            assert torch.allclose(weights[name], tensor, rtol=1e-3, atol=1e-5), name
    ours, theirs = results(pair), results(alone)
    same_losses(ours, theirs, rel=1e-4)
    assert ours["environment"]["processes"] == 2 and ours["sparsity"] == theirs["sparsity"]
    # After the switch, at the end of the first epoch, both evaluate with statistics of the same batches.
    first, other = ours["evaluations"][0], theirs["evaluations"][0]
    assert first["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-3)
    # Top-1 counts images, of which 61 were seen once each.
    assert (first["top1"] * 61) == pytest.approx(round(first["top1"] * 61), abs=1e-9)
    assert abs(first["top1"] - other["top1"]) < 1.5 / 61
