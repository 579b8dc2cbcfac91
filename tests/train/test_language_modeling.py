"""The language-modelling program from its command line to what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tritonsparse.eval.perplexity import main as evaluate
from tritonsparse.eval.perplexity import segment_perplexity
from tritonsparse.models.transfo_xl import TransfoXLLMHeadModel, Vocabulary
from tritonsparse.train import language_modeling
from tritonsparse.train.run import checkpoints, results
from tritonsparse.train.text import language_arguments, language_presets
from tritonsparse.train.text.language_presets import Sizes

TINY = Sizes(2, 16, 2, 8, 32, 1, 0.1, 0.0, 0.1, (12,), 8)
# 4 columns of about 110 tokens: 14 steps an epoch.
SMALL = (
    "--batch_size=4", "--eval_batch_size=2", "--logging_steps=5", "--learning_rate=0.01", "--preset=transfoxl-tiny",
)  # fmt: skip
ACDC = ("--method=acdc", "--sparsity=0.8", "--num_train_epochs=4", "--save_twins")
PHASES = '{"phases": {"starts": [[0, "dense"], [1, "sparse"], [2, "dense"], [3, "sparse"]], "epochs": 4}}'

Train = Callable[..., dict[str, Any]]


def lines(count: int, seed: int) -> list[str]:
    words = [f"w{number}" for number in range(25)]
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, weights=range(25, 0, -1), k=draw.randint(0, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("text")
    options = []
    for seed, (split, count) in enumerate((("train", 66), ("validation", 15), ("test", 20))):
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines(count, seed)), encoding="utf-8")
        options.append(f"--{split}_file={folder / split}.txt")
    return tuple(options)


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def train(corpus: tuple[str, ...]) -> Iterator[Train]:
    """`train(output_dir, *options, plots=False)` runs the program on the small corpus; returns all_results.json."""
    patch = pytest.MonkeyPatch()
    patch.setitem(language_presets.TRANSFO_XL, "transfoxl-tiny", TINY)
    patch.setitem(language_presets.GPT2, "gpt2-tiny", (1, 16, 2, 16))

    def run(output_dir: Path, *options: str, plots: bool = False) -> dict[str, Any]:
        reset()
        with pytest.MonkeyPatch.context() as quick:
            if not plots:
                quick.setattr(results, "plot", lambda *_: None)
                quick.setattr(language_modeling, "plot_twins", lambda *_, **__: None)
            saved = any(option.startswith("--model_name_or_path") for option in options)
            small = SMALL[:-1] if saved else SMALL
            assert language_modeling.main([f"--output_dir={output_dir}", *corpus, *small, *options]) == 0
        document: dict[str, Any] = json.loads((output_dir / "all_results.json").read_text(encoding="utf-8"))
        return document

    yield run
    patch.undo()


@pytest.fixture(scope="module")
def acdc(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("acdc")
    options = (*ACDC, f"--method_args={PHASES}", "--checkpointing_steps=epoch", "--test_tgt_len=5", "--test_mem_len=20")
    return folder, train(folder, *options, "--test_clamp_len=9", "--test_same_length", plots=True)


def test_a_run_leaves_a_model_its_vocabulary_its_numbers_and_its_pictures(acdc: tuple[Path, dict[str, Any]]) -> None:
    folder, document = acdc
    for name in ("training.png", "layer_sparsity.png", "perplexity.png", "vocabulary.txt", "tritonsparse.safetensors"):
        assert (folder / name).stat().st_size > 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, TransfoXLLMHeadModel)
    layers = [module for module in model.transformer.layers.modules() if type(module) is torch.nn.Linear]
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    total = sum(layer.weight.numel() for layer in layers)
    assert len(layers) == 2 * 5 and zeros == round(0.8 * total)
    assert document["sparsity"] == pytest.approx(zeros / total)
    # Embeddings and the softmax are dense.
    assert not any("word_emb" in layer["name"] or "crit" in layer["name"] for layer in document["layers"])
    assert document["method"] == "acdc" and document["split"] == "test"


def test_the_perplexity_of_a_run_is_that_of_its_saved_model_under_the_settings_it_names(
    acdc: tuple[Path, dict[str, Any]], corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, document = acdc
    assert document["perplexity_settings"] == {
        "tgt_len": 5, "mem_len": 20, "clamp_len": 9, "same_length": True, "same_length_rule": "nvidia", "columns": 1,
        "vocabulary": 27 - 1,
    }  # fmt: skip
    text = corpus[2].removeprefix("--test_file=")
    options = ["--tgt_len=5", "--mem_len=20", "--clamp_len=9", "--same_length", "--device=cpu"]
    assert evaluate(["--model", str(folder), "--text_file", text, *options]) == 0
    measured = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    assert measured["perplexity"] == pytest.approx(document["perplexity"], rel=1e-6)
    assert measured["tokens"] == document["tokens_scored"]
    # The trained settings are the model's own again.
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.mem_len, config.clamp_len, config.same_length) == (8, -1, False)


def test_evaluations_are_of_the_phase_they_follow_and_the_best_of_each_is_kept(
    acdc: tuple[Path, dict[str, Any]], corpus: tuple[str, ...]
) -> None:
    folder, document = acdc
    evaluations = document["evaluations"]
    assert [each["phase"] for each in evaluations] == ["dense", "sparse", "dense", "sparse"]
    assert [each["sparsity"] > 0.7 for each in evaluations] == [False, True, False, True]
    stream = Vocabulary.load(folder / "vocabulary.txt").encode(lines(15, 1))
    for phase in ("dense", "sparse"):
        mine = [each for each in evaluations if each["phase"] == phase]
        best = min(mine, key=lambda each: each["perplexity"])
        twin = document["twins"][phase]
        assert (twin["epoch"], twin["perplexity"]) == (best["epoch"], best["perplexity"])
        assert checkpoints.read_run(folder / f"best_{phase}")["step"] == best["step"]
        model = AutoModelForCausalLM.from_pretrained(folder / f"best_{phase}" / "pretrained")
        found = segment_perplexity(model, stream, tgt_len=8, batch_size=2)
        assert found.perplexity == pytest.approx(best["perplexity"], rel=1e-5)
    assert document["twins"]["dense"]["test"]["settings"] == document["perplexity_settings"]


def test_the_dense_twin_is_fine_tuned_as_the_rest_of_the_run_without_masks(
    acdc: tuple[Path, dict[str, Any]], train: Train, tmp_path: Path
) -> None:
    folder, document = acdc
    first = document["twins"]["dense"]["step"]
    assert first < 60
    options = ("--method=dense", "--num_train_epochs=4", "--save_twins", "--checkpointing_steps=epoch")
    tuned = train(tmp_path, *options, f"--resume_from_checkpoint={folder / 'best_dense'}")
    # It went on from the twin's step: what is before is the record of the first run.
    before = [row for row in document["history"] if row["step"] <= first]
    assert tuned["history"][: len(before)] == before and tuned["history"][len(before)]["step"] > first
    assert tuned["method"] == "dense" and tuned["steps"] == 60
    after = [each for each in tuned["evaluations"] if each["step"] > first]
    assert after and all(each["phase"] == "dense" and each["sparsity"] < 0.01 for each in after)
    # The twin that is kept is of this run, not what it went on from.
    assert set(tuned["twins"]) == {"dense"} and tuned["twins"]["dense"]["step"] > first
    # The schedule goes on where it was, to its end.
    assert [row["step"] for row in tuned["history"]][-1] == 60
    assert tuned["history"][-1]["learning_rate"] == pytest.approx(document["history"][-1]["learning_rate"])


def test_a_dense_method_goes_on_from_no_other_checkpoint(
    acdc: tuple[Path, dict[str, Any]], corpus: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = acdc
    reset()
    options = [*corpus, *SMALL, "--method=dense", "--num_train_epochs=4", f"--output_dir={tmp_path}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(language_presets.TRANSFO_XL, "transfoxl-tiny", TINY)
        assert language_modeling.main([*options, f"--resume_from_checkpoint={folder / 'best_sparse'}"]) == 2
    assert "expected a checkpoint of a run with" in capsys.readouterr().err


def test_twins_of_an_earlier_run_are_not_overwritten(
    acdc: tuple[Path, dict[str, Any]], train: Train, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = acdc
    reset()
    options = [*corpus, *SMALL, *ACDC, f"--method_args={PHASES}", f"--output_dir={folder}"]
    assert language_modeling.main(options) == 2
    assert "without twins of an earlier run, got best_sparse" in capsys.readouterr().err


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "roll",
    [(), ("--roll", "--steps_per_epoch=6", "--mixed_precision=bf16")],
    ids=["straight", "rolled, part epochs, bf16"],
)
def test_a_resumed_run_is_the_run_that_never_stopped(train: Train, tmp_path: Path, roll: tuple[str, ...]) -> None:
    """Stopped at step 10 and at 20, inside passes of 15 steps: memory, order, dropout and masks all go on."""
    options = ("--method=gmp", "--sparsity=0.5", '--method_args={"update_every": 3}', "--max_train_steps=24", *roll)
    whole = train(tmp_path / "whole", *options, "--gradient_accumulation_steps=2", "--optim=lamb")
    stopped = ("--checkpointing_steps=10", "--gradient_accumulation_steps=2", "--optim=lamb")
    train(tmp_path / "parts", *options, *stopped)
    for step in (10, 20):
        folder = tmp_path / "parts" / f"step_{step}"
        resumed = train(tmp_path / f"from{step}", *options, *stopped, f"--resume_from_checkpoint={folder}")
        assert same_weights(tmp_path / "whole", tmp_path / f"from{step}")
        assert resumed["perplexity"] == whole["perplexity"]
    # Without the memory it would have been another run.
    memory = tmp_path / "parts" / "step_10" / "memory_0.safetensors"
    tensors = load_file(memory)
    assert len(tensors) == 2 * 2 and all(tensor.shape == (8, 2, 16) for tensor in tensors.values())


def test_accumulation_changes_nothing_but_rounding(train: Train, tmp_path: Path) -> None:
    options = ("--method=dense", "--max_train_steps=16", "--dropout=0", "--adam_epsilon=0.1")
    once = train(tmp_path / "once", *options)
    twice = train(tmp_path / "twice", *options, "--gradient_accumulation_steps=2")
    for first, second in zip(once["history"], twice["history"], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_the_cosine_warms_up_and_ends_where_it_is_told(train: Train, tmp_path: Path) -> None:
    options = ("--method=dense", "--max_train_steps=12", "--num_warmup_steps=4", "--min_learning_rate=0.001")
    document = train(tmp_path, *options, "--logging_steps=1", "--optim=lamb")
    rates = [row["learning_rate"] for row in document["history"]]
    # The rate of the step to come: 0.01 k / 4, then 0.001 + 0.009 (1 + cos(pi (k - 4) / 8)) / 2.
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[7] == pytest.approx(0.0055) and rates[11] == pytest.approx(0.001)
    assert document["arguments"]["optim"] == "lamb" and document["arguments"]["max_grad_norm"] == 0.25


@pytest.mark.parametrize(
    "options",
    [
        ("--method=autosparse", '--method_args={"threshold_init": -3}'),
        ("--method=topkast", "--sparsity=0.8", '--method_args={"backward_sparsity": 0.6}'),
        ("--method=acdc", "--sparsity=0.5", "--pattern=block:8", f"--method_args={PHASES}"),
        ("--method=rigl", "--sparsity=0.5", '--method_args={"update_every": 5}'),
        ("--method=gmp", "--sparsity=0.5", "--pattern=2:4"),
    ],
    ids=["autosparse", "topkast", "acdc in blocks", "rigl", "gmp 2:4"],
)
def test_methods_and_patterns_come_by_the_same_arguments(
    train: Train, tmp_path: Path, options: tuple[str, ...]
) -> None:
    document = train(tmp_path, *options, "--num_train_epochs=4")
    assert document["sparsity"] > 0.02
    assert document["evaluations"][-1]["perplexity"] < 26


def test_any_causal_model_trains_on_blocks_of_subwords(train: Train, tmp_path: Path) -> None:
    options = ("--preset=gpt2-tiny", "--vocab_size=270", "--batch_size=6", "--method=gmp", "--sparsity=0.5")
    document = train(tmp_path / "first", *options, "--max_train_steps=10", "--eval_stride=5")
    assert document["perplexity_settings"] == {"window": 16, "stride": 5, "vocabulary": 270}
    words = sum(len(line.split()) for line in lines(20, 2)) + 20
    assert document["word_perplexity"] == pytest.approx(
        2.718281828459045 ** (document["nll"] * document["tokens_scored"] / words)
    )
    again = ("--batch_size=6", "--method=dense", "--max_train_steps=4", "--block_size=12")
    tuned = train(tmp_path / "second", f"--model_name_or_path={tmp_path / 'first'}", *again)
    assert tuned["evaluations"][-1]["perplexity"] < 270 and tuned["perplexity_settings"]["window"] == 12


def test_a_saved_transformer_xl_goes_on_with_its_own_vocabulary(
    acdc: tuple[Path, dict[str, Any]], train: Train, tmp_path: Path
) -> None:
    folder, _ = acdc
    document = train(tmp_path, f"--model_name_or_path={folder}", "--method=dense", "--max_train_steps=3")
    assert (tmp_path / "vocabulary.txt").read_text() == (folder / "vocabulary.txt").read_text()
    assert document["perplexity_settings"]["mem_len"] == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--preset=transfoxl-huge",), "expected --preset among transfoxl-tiny"),
        (("--optim=sgd",), "expected --optim among adamw, lamb"),
        (("--min_learning_rate=1",), "expected --min_learning_rate from 0 to --learning_rate 0.01"),
        (("--tgt_len=0",), "expected --tgt_len of at least 1"),
        (("--mem_len=-1",), "expected --mem_len of at least 0"),
        (("--tgt_len=200",), "expected a text of at least one segment a column"),
        (("--mem_len=150",), "expected a memory shorter than a column"),
        (("--batch_size=3", "--gradient_accumulation_steps=2"), "1 process(es) x 2 accumulation steps divide, got 3"),
        (("--eval_tgt_len=100",), "expected a validation text of at least one segment a column"),
        (("--test_tgt_len=500",), "expected a test text of at least one segment a column"),
        (("--block_size=8",), "expected no --block_size for a Transformer-XL"),
        (("--preset=gpt2-tiny", "--tgt_len=8"), "expected no --tgt_len for a causal model without a memory"),
        (("--preset=gpt2-tiny", "--vocab_size=300", "--block_size=17"), "at most the model's 16 positions"),
        (("--preset=gpt2-tiny", "--vocab_size=200"), "expected vocab_size above 257"),
        (("--method=wanda",), "expected --method among"),
        (("--model_name_or_path=nowhere/at/all",), "expected no --preset beside --model_name_or_path"),
        (("--train_file=/no/such/text",), "expected a text file, got /no/such/text"),
        (("--recipe=demo",), "expected arguments of this program as keys"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    corpus: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reset()
    monkeypatch.setitem(language_presets.TRANSFO_XL, "transfoxl-tiny", TINY)
    monkeypatch.setitem(language_presets.GPT2, "gpt2-tiny", (1, 16, 2, 16))
    base = [f"--output_dir={tmp_path / 'out'}", f"--cache_dir={tmp_path / 'cache'}", *corpus, *SMALL]
    assert language_modeling.main([*base, "--max_train_steps=2", "--method=dense", *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("error: ") and words in line
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_is_not_the_model_s_and_words_it_lacks_are_refused(
    acdc: tuple[Path, dict[str, Any]], corpus: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = acdc
    base = [*corpus, *SMALL[:-1], "--max_train_steps=2", "--method=dense", f"--output_dir={tmp_path / 'out'}"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "model")
    vocabulary = Vocabulary.load(folder / "vocabulary.txt")
    Vocabulary([*vocabulary.words, "more"]).save(tmp_path / "model" / "vocabulary.txt")
    reset()
    assert language_modeling.main([*base, f"--model_name_or_path={tmp_path / 'model'}"]) == 2
    assert f"vocabulary of the model's {len(vocabulary)} types, got {len(vocabulary) + 1}" in capsys.readouterr().err
    (tmp_path / "other.txt").write_text("unheard of\n" * 100)
    reset()
    assert language_modeling.main([*base, f"--model_name_or_path={folder}", f"--test_file={tmp_path}/other.txt"]) == 2
    assert "got 'unheard' in line 1" in capsys.readouterr().err


def test_a_checkpoint_of_another_shape_is_refused(
    acdc: tuple[Path, dict[str, Any]], corpus: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(acdc[0], tmp_path / "model", ignore=shutil.ignore_patterns("best_*", "epoch_*", "tokens"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "d_inner": 64}))
    base = [*corpus, *SMALL[:-1], "--max_train_steps=2", "--method=dense", f"--output_dir={tmp_path / 'out'}"]
    reset()
    assert language_modeling.main([*base, f"--model_name_or_path={tmp_path / 'model'}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "expected a language model with its vocabulary or tokenizer" in line
    # A run goes on from a checkpoint of its own shape only.
    reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(language_presets.TRANSFO_XL, "transfoxl-tiny", dataclasses.replace(TINY, d_inner=48))
        options = [*corpus, *SMALL, *ACDC, f"--method_args={PHASES}", f"--output_dir={tmp_path / 'out'}"]
        assert language_modeling.main([*options, f"--resume_from_checkpoint={acdc[0] / 'epoch_1'}"]) == 2
    assert "expected a checkpoint of this model (transformer.layers" in capsys.readouterr().err


def test_the_options_are_frozen() -> None:
    """Users have these in scripts; those of every program are frozen with the translation program's."""
    from tritonsparse.train.text import translation_arguments

    common = {option for action in translation_arguments.parser()._actions for option in action.option_strings}
    mine = {option for action in language_arguments.parser()._actions for option in action.option_strings}
    assert mine - common == {
        "--batch_size", "--block_size", "--cache_dir", "--dropatt", "--embedding_sparsity",
        "--eval_batch_size", "--eval_mem_len", "--eval_stride", "--eval_tgt_len", "--max_eval_tokens",
        "--max_test_tokens", "--max_train_tokens", "--mem_len", "--min_count", "--min_learning_rate",
        "--no-roll", "--no-test_same_length", "--optim", "--roll", "--steps_per_epoch", "--test_batch_size",
        "--test_clamp_len", "--test_mem_len", "--test_same_length", "--test_tgt_len", "--tgt_len",
    }  # fmt: skip
