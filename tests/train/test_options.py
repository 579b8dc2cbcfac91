"""The translation and image programs: what their options do to a run, and the experiment on memorisation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSeq2SeqLM

from tritonsparse.eval.preprocessing import Preprocessing
from tritonsparse.train import image_classification, memorization
from tritonsparse.train.images.arguments import parser
from tritonsparse.train.run import arguments, checkpoints
from tritonsparse.train.text import translation_presets

SOFT = ("--method_args", '{"threshold_init": -3}')


def test_auto_tuning_takes_its_reference_from_a_dense_run(translation: Any, tmp_path: Path) -> None:
    losses, epochs = tmp_path / "reference" / "losses.json", ("--max_tokens_per_batch=1600", "--num_train_epochs=2")
    dense = translation.train(tmp_path / "dense", "--method=dense", *epochs, f"--record_reference_losses={losses}")
    assert (dense["sparsity"], dense["train_flops_fraction"], dense["test_flops_fraction"]) == (0.0, 1.0, 1.0)
    assert len(dense["epoch_losses"]) == len(dense["evaluations"]) == 2
    assert dense["epoch_losses"][1] < dense["epoch_losses"][0] and "thresholds" not in dense["history"][-1]
    document = translation.train(tmp_path / "tuned", f"--auto_tune={losses}", *epochs, "--logging_steps=1")
    tune = document["method_fields"]["auto_tune"]
    assert tune["reference_losses"] == dense["epoch_losses"][:1]
    # Algorithm 1: alpha_0 in the epoch that is compared, then 5 % more or 0.5 % less.
    worse = document["epoch_losses"][0] > 1.01 * tune["reference_losses"][0]
    per_epoch = document["steps"] // 2
    alphas = [row["alpha"] for row in document["history"]]
    assert alphas[: per_epoch - 1] == [0.5] * (per_epoch - 1)
    assert alphas[per_epoch:-1] == [pytest.approx(0.5 * (1.05 if worse else 0.995))] * (per_epoch - 1)


def test_str_runs_with_alpha_zero_and_is_costed_by_the_convention_it_names(translation: Any, tmp_path: Path) -> None:
    document = translation.train(tmp_path, "--method=str", *SOFT, "--max_train_steps=2", "--flops_convention=swat")
    assert document["sparsity"] > 0.05
    assert {row["alpha"] for row in document["history"]} == {0.0}
    assert document["flops_convention"] == "swat"
    spent = document["train_flops"]
    assert (spent["unit"], spent["steps"]) == ("multiply-adds", 2)
    for row in document["layers"]:
        # Two steps; the last left macs_kept, the first saw a little else. By SWAT dW sees half of the input.
        half = {"forward": 2 * row["macs_kept"], "grad_input": 2 * row["macs_kept"], "grad_weight": row["macs"]}
        assert spent["layers"][row["name"]] == pytest.approx(half, rel=0.02)
        assert spent["layers"][row["name"]]["grad_weight"] == row["macs"]
    dense = 3 * sum(2 * layer["grad_weight"] for layer in spent["layers"].values())
    total = sum(spent[name] for name in ("forward", "grad_input", "grad_weight"))
    assert document["train_flops_fraction"] == pytest.approx(total / dense)


def test_translations_into_chinese_are_scored_by_characters(translation: Any, tmp_path: Path) -> None:
    """As sacreBLEU does for zh; also where references, not the language, say so."""
    for split in ("train", "test"):
        rows = "".join(f"w{number} w{number % 7}\t我们今天{number}早上去公园\n" for number in range(60))
        (tmp_path / f"{split}.tsv").write_text(rows, encoding="utf-8")
    files = (f"--train_file={tmp_path / 'train.tsv'}", f"--validation_file={tmp_path / 'test.tsv'}", "--vocab_size=50")
    line = translation.refusal(tmp_path / "no", *files, "--max_train_steps=1")
    assert "--target_lang or --bleu_tokenize" in line and "the language 'de' and mostly CJK letters" in line
    for options, tokenizer in (("--target_lang=zh_CN",), "zh"), (("--bleu_tokenize=char",), "char"):
        document = translation.train(tmp_path / tokenizer, *files, "--method=dense", "--max_train_steps=1", *options)
        assert f"|tok:{tokenizer}|" in document["bleu_signature"]


def test_the_last_checkpoints_are_averaged_as_masters_and_thresholds(translation: Any, tmp_path: Path) -> None:
    options = ("--checkpointing_steps=2", "--average_checkpoints=2", "--checkpoints_total_limit=2")
    document = translation.train(tmp_path, *SOFT, "--max_train_steps=6", *options)
    assert document["averaged_checkpoints"] == ["step_4", "step_6"]
    mean = checkpoints.average_weights([tmp_path / "step_4", tmp_path / "step_6"])
    sidecar, name = load_file(tmp_path / "tritonsparse.safetensors"), document["layers"][0]["name"]
    assert torch.equal(sidecar[f"master.{name}"], mean[f"{name}.weight"])
    assert torch.equal(sidecar[f"threshold.{name}"], mean[f"{name}.threshold"])
    # Half of the supports' intersection would be lost by averaging what the views show.
    assert document["sparsity"] > 0.05


def test_the_sinusoids_of_a_saved_model_stay_constant(saved_marian: Callable[[float], Path]) -> None:
    """transformers gives them back as trainable, and two processes would wait for their gradients."""
    _, model = translation_presets.load_model(str(saved_marian(0.1)))
    constant = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert constant == {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}


def test_acdc_is_evaluated_as_the_twin_that_each_epoch_trained_and_keeps_both(translation: Any, tmp_path: Path) -> None:
    document = translation.train(
        tmp_path, "--method=acdc", "--sparsity=0.8", "--num_train_epochs=2", "--max_tokens_per_batch=1600",
        '--method_args={"phases": {"starts": [[0, "dense"], [1, "sparse"]], "epochs": 2}}', "--save_twins",
    )  # fmt: skip
    found = [(each["phase"], round(each["sparsity"], 2)) for each in document["evaluations"]]
    assert found == [("dense", 0.0), ("sparse", 0.8)] and round(document["sparsity"], 2) == 0.8
    # Half of the steps were dense, the others cost what inference does.
    assert document["train_flops_fraction"] == pytest.approx((1 + document["test_flops_fraction"]) / 2, abs=0.005)
    zeros = {}
    for phase in ("dense", "sparse"):
        folder = tmp_path / f"best_{phase}"
        assert checkpoints.read_run(folder)["evaluations"][-1]["phase"] == phase
        model = AutoModelForSeq2SeqLM.from_pretrained(folder / "pretrained").model
        weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
        zeros[phase] = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros["sparse"] == pytest.approx(document["sparsity"], abs=1e-3) and zeros["dense"] < 0.01
    final, best = (load_file(folder / "model.safetensors") for folder in (tmp_path, folder / "pretrained"))
    assert all(torch.equal(final[name], best[name]) for name in best)


def phases(*starts: tuple[int, str]) -> str:
    """AC/DC's phases, of which the last is one epoch long."""
    return "--method_args=" + json.dumps({"phases": {"starts": starts, "epochs": starts[-1][0] + 1}})


def test_the_dense_model_learns_the_digits(images: Any, tmp_path: Path) -> None:
    options = ("--method=dense", "--num_train_epochs=4", "--max_train_samples=512", "--warmup_epochs=0.5")
    losses_file = tmp_path / "losses.json"
    document = images.train(tmp_path, *options, "--max_test_samples=200", f"--record_reference_losses={losses_file}")
    assert document["top1"] > 0.7 and document["top5"] > 0.95
    losses = document["epoch_losses"]
    assert len(losses) == 4 and losses[-1] < 0.4 * losses[0]
    assert json.loads(losses_file.read_text())["epoch_losses"] == losses
    # Half an epoch of 16 steps: the rate rises to 0.1 at step 8 and ends at 0.
    rates = {row["step"]: row["learning_rate"] for row in document["history"]}
    assert (rates[4], rates[8], rates[max(rates)]) == pytest.approx((0.05, 0.1, 0.0), abs=1e-9)


def test_a_step_schedule_with_nesterov_is_trained_as_asked(images: Any, tmp_path: Path, monkeypatch: Any) -> None:
    taken: list[dict[str, Any]] = []
    step = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, closure: Any = None) -> Any:
        taken.append({**self.param_groups[0]})
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    options = ("--method=dense", "--num_train_epochs=2", "--max_train_samples=96", "--nesterov", "--no_norm_decay")
    schedule = ("--lr_scheduler_type=multistep", "--lr_milestones", "1", "1.4", "--warmup_epochs=0.7")
    images.train(tmp_path, *options, *schedule)
    # 3 steps an epoch: 2 of warming up, tenths from steps 3 and 4.2 on.
    assert [group["lr"] for group in taken] == pytest.approx([0.0, 0.05, 0.1, 0.01, 0.01, 0.001])
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in taken)


def test_acdc_keeps_twins_and_counts_statistics_again(images: Any, tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[int] = []
    reestimate = image_classification.reestimate

    def counted(model: Any, inputs: Any, autocast: Any) -> int:
        batches = list(inputs)
        calls.append(len(batches))
        return reestimate(model, batches, autocast)

    monkeypatch.setattr(image_classification, "reestimate", counted)
    document = images.train(
        tmp_path, "--method=acdc", "--sparsity=0.8", phases((0, "dense"), (1, "sparse"), (4, "dense"), (5, "sparse")),
        "--num_train_epochs=6", "--bn_reestimation_batches=3", "--save_twins", "--channels_last",
    )  # fmt: skip
    evaluations = document["evaluations"]
    assert [each["phase"] for each in evaluations] == ["dense", "sparse", "sparse", "sparse", "dense", "sparse"]
    assert [round(each["sparsity"], 2) > 0.75 for each in evaluations] == [False, True, True, True, False, True]
    # The views that stand after an epoch differ from those after the one before at the ends of epochs 0, 3 and 4.
    assert calls == [3, 3, 3]
    for phase in ("dense", "sparse"):
        folder = tmp_path / f"best_{phase}" / "pretrained"
        assert AutoModelForImageClassification.from_pretrained(folder) is not None
        assert Preprocessing.load(folder) == Preprocessing.load(tmp_path)


def test_norms_decay_unless_told_not_to(images: Any, tmp_path: Path) -> None:
    for options, decay in ((["--weight_decay=0.01"], 0.01), (["--weight_decay=0.01", "--no_norm_decay"], 0.0)):
        words = images.words(tmp_path, "--max_train_steps=1", *options, "--method=autosparse")
        with images.small():
            run = image_classification.prepare(arguments.parse(parser("image_classification", None), words))
        groups = {group["name"]: group["weight_decay"] for group in run.loop.optimizer.param_groups}
        assert groups == {"decay": 0.01, "no_decay": decay, "thresholds": 0.01}


def test_memorisation_is_recorded_and_not_repeated(images: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Dense and 80 %, without and with augmentation, four epochs of digits of which 40 are labelled wrongly."""
    options = images.words(
        tmp_path, "--num_train_epochs=4", "--corrupted_samples=40", "--sparsities", "0", "0.8", "--augmentation=crop",
        phases((0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")),
    )  # fmt: skip
    with images.small():
        assert memorization.main(options) == 0
    runs = json.loads((tmp_path / "memorization.json").read_text(encoding="utf-8"))["runs"]
    assert list(runs) == ["without augmentation", "with augmentation"]
    for group in runs.values():
        assert list(group) == ["dense", "80%"]
        assert {each["phase"] for each in group["dense"]} == {"dense"}
        assert [each["phase"] for each in group["80%"]] == ["dense", "sparse", "dense", "sparse"]
        for run in group.values():
            assert all(each["corrupted_as_true"] + each["corrupted_as_labelled"] <= 1 for each in run)
    # What the digit is is learned from 260 right labels; 40 wrong ones are 13 % of the set.
    assert runs["without augmentation"]["dense"][-1]["corrupted_as_true"] > 0.4
    assert (tmp_path / "memorization.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # What has results is not trained again.
    capsys.readouterr()
    monkeypatch.setattr(image_classification, "prepare", lambda *_: pytest.fail("trained again"))
    with images.small():
        assert memorization.main(options) == 0
    assert json.loads((tmp_path / "memorization.json").read_text(encoding="utf-8"))["runs"] == runs
    assert capsys.readouterr().out.count("with augmentation") == 2


def test_an_experiment_that_cannot_run_is_refused(images: Any, tmp_path: Path) -> None:
    experiment = dataclasses.replace(images, module=memorization)
    for options, words in (
        (["--augmentation=none"], "an augmentation for the second half"),
        (["--sparsities", "0.5", "0.5"], "different --sparsities, got [0.5, 0.5]"),
        # What only the second half of the runs could not do, or only the sparse ones.
        (["--augmentation=imagenet", "--corrupted_samples=40"], "an image size for augmentation 'imagenet'"),
        (["--pattern=3:7", "--corrupted_samples=40"], "rows of a multiple of 7 for pattern '3:7'"),
        (["--corrupted_samples=301"], "between 1 and 300 images"),
    ):
        assert words in experiment.refusal(tmp_path / "x", "--num_train_epochs=1", *options)
