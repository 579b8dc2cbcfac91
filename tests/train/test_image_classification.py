"""The image program end to end: what it writes, that it is what was trained, and that it resumes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import tritonsparse as ts
from tritonsparse.eval.accuracy import accuracy
from tritonsparse.eval.image_sets import load_images
from tritonsparse.eval.preprocessing import Preprocessing
from tritonsparse.masks.topk import kept_count
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from tritonsparse.train import image_classification, memorization
from tritonsparse.train.images import models as image_models
from tritonsparse.train.images.arguments import parser
from tritonsparse.train.run import checkpoints, results
from tritonsparse.train.run.arguments import add_common

Train = Callable[..., dict[str, Any]]
SMALL = [
    "--preset=tiny", "--max_train_samples=300", "--max_test_samples=60", "--batch_size=32", "--logging_steps=2",
    "--learning_rate=0.1",
]  # fmt: skip
SOFT = ("--method=autosparse", "--method_args", '{"threshold_init": -2.5, "threshold_weight_decay": 0.01}')
GMP = ("--method=gmp", "--method_args", '{"sparsity": 0.8, "update_every": 2}')
KEYS = {
    "method", "method_fields", "top1", "top5", "eval_loss", "split", "preprocessing", "sparsity", "block_sparsity",
    "exploitable", "flops_convention", "method_statistics", "train_flops_fraction", "train_flops",
    "test_flops_fraction", "steps",
    "averaged_checkpoints", "training_seconds", "epoch_losses", "evaluations", "layers", "history", "arguments",
    "environment",
}  # fmt: skip


def tiny(**options: Any) -> CifarResNetForImageClassification:
    return CifarResNetForImageClassification(CifarResNetConfig(depth=8, widths=[4, 8, 8], **options))


@pytest.fixture(scope="module", autouse=True)
def tiny_preset() -> Iterator[None]:
    """A preset of 3,380 weights in 8 layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(image_models.IMAGE_MODELS, "tiny", tiny)
        yield


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def classify() -> Train:
    """`classify(output_dir, *options)` runs the program and returns its all_results.json."""

    def run(output_dir: Path, *options: str, plots: bool = False) -> dict[str, Any]:
        reset()
        with pytest.MonkeyPatch.context() as patch:
            if not plots:
                patch.setattr(results, "plot", lambda *_: None)
            assert image_classification.main([*SMALL, "--output_dir", str(output_dir), *options]) == 0
        document: dict[str, Any] = json.loads((output_dir / "all_results.json").read_text(encoding="utf-8"))
        return document

    return run


@pytest.fixture(scope="module")
def sparse(classify: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two epochs under AutoSparse, channels-last, with augmentation, threads and plots."""
    folder = tmp_path_factory.mktemp("sparse")
    options = ("--num_train_epochs=2", "--channels_last", "--augmentation=crop", "--workers=2")
    return folder, classify(folder, *SOFT, *options, plots=True)


def test_the_options_that_images_add_are_these() -> None:
    common = argparse.ArgumentParser()
    add_common(common)
    shared = {action.dest for action in common._actions}
    assert {action.dest for action in parser("image_classification", None)._actions} - shared == {
        "model_name_or_path", "preset", "channels_last", "dataset_name", "dataset_config_name", "data_dir",
        "image_size", "eval_resize", "augmentation", "batch_size", "eval_batch_size", "workers", "max_train_samples",
        "max_eval_samples", "max_test_samples", "label_smoothing", "optimizer", "momentum", "nesterov", "norm_decay",
        "warmup_epochs", "lr_milestones", "lr_gamma", "bn_reestimation_batches",
    }  # fmt: skip


def test_the_results_file_has_these_keys_and_agrees_with_itself(sparse: Any) -> None:
    _, document = sparse
    assert set(document) == KEYS
    last = document["history"][-1]
    assert [row["step"] for row in document["history"]] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    for key in ("sparsity", "train_flops_fraction"):
        assert document[key] == last[key]
    assert [row["epoch"] for row in document["evaluations"]] == [0, 1]
    for key in ("top1", "top5", "eval_loss"):
        assert document["evaluations"][-1][key] == document[key]
    assert document["preprocessing"]["crop"] is None and len(document["preprocessing"]["mean"]) == 1


def test_zeros_on_disk_are_those_reported_and_others_get_the_accuracy_reported(sparse: Any) -> None:
    folder, document = sparse
    saved = load_file(folder / "model.safetensors")
    zeros = {row["name"]: int((saved[f"{row['name']}.weight"] == 0).sum()) for row in document["layers"]}
    assert {row["name"]: row["numel"] - row["kept"] for row in document["layers"]} == zeros
    assert len(zeros) == 8 and sum(zeros.values()) > 300
    model = AutoModelForImageClassification.from_pretrained(folder)
    tests = load_images("embedded")["test"].subset(torch.arange(60))
    found = accuracy(model, tests, Preprocessing.load(folder))
    assert (found.top1, found.top5, found.images) == (document["top1"], document["top5"], 60)
    again, _ = ts.load(folder, AutoModelForImageClassification)
    assert accuracy(again, tests, Preprocessing.load(folder)).top1 == document["top1"]
    for name in ("training.png", "layer_sparsity.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_dense_model_learns_the_digits(classify: Train, tmp_path: Path) -> None:
    options = ("--method=dense", "--num_train_epochs=4", "--max_train_samples=512", "--warmup_epochs=0.5")
    document = classify(
        tmp_path, *options, "--max_test_samples=200", f"--record_reference_losses={tmp_path}/losses.json"
    )
    assert document["top1"] > 0.7 and document["top5"] > 0.95
    losses = document["epoch_losses"]
    assert len(losses) == 4 and losses[-1] < 0.4 * losses[0]
    assert json.loads((tmp_path / "losses.json").read_text())["epoch_losses"] == losses
    # Half an epoch of 16 steps: the rate rises to 0.1 at step 8 and ends at 0.
    rates = {row["step"]: row["learning_rate"] for row in document["history"]}
    assert rates[4] == pytest.approx(0.05) and rates[8] == pytest.approx(0.1)
    assert rates[max(rates)] == pytest.approx(0.0, abs=1e-9)


def test_a_step_schedule_with_nesterov_is_trained_as_asked(
    classify: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[dict[str, Any]] = []
    step = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, closure: Any = None) -> Any:
        taken.append({**self.param_groups[0]})
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    options = ("--method=dense", "--num_train_epochs=2", "--max_train_samples=96", "--nesterov", "--no_norm_decay")
    schedule = ("--lr_scheduler_type=multistep", "--lr_milestones", "1", "1.4", "--warmup_epochs=0.7")
    classify(tmp_path, *options, *schedule)
    # 3 steps an epoch: 2 of warming up, tenths from steps 3 and 4.2 on.
    assert [group["lr"] for group in taken] == pytest.approx([0.0, 0.05, 0.1, 0.01, 0.01, 0.001])
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in taken)


@pytest.mark.parametrize("method", [SOFT, GMP], ids=["autosparse", "gmp"])
def test_a_resumed_run_is_the_run_that_never_stopped(classify: Train, tmp_path: Path, method: tuple[str, ...]) -> None:
    options = (*method, "--max_train_steps=15", "--checkpointing_steps=6", "--augmentation=crop_flip")
    straight = classify(tmp_path / "straight", *options)
    classify(tmp_path / "stopped", *options)
    for name in ("step_12", "all_results.json"):
        doomed = tmp_path / "stopped" / name
        checkpoints._remove(doomed) if doomed.is_dir() else doomed.unlink()
    resumed = classify(tmp_path / "stopped", *options, "--resume_from_checkpoint=latest", "--workers=2")
    one, other = (load_file(tmp_path / name / "step_12" / "model.safetensors") for name in ("straight", "stopped"))
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    for key in ("top1", "eval_loss", "sparsity", "epoch_losses", "evaluations", "train_flops_fraction"):
        assert resumed[key] == straight[key], key


def test_gmp_ends_at_the_sparsity_asked_for_to_one_element(classify: Train, tmp_path: Path) -> None:
    document = classify(tmp_path, *GMP, "--max_train_steps=4", "--optimizer=adamw", "--learning_rate=0.001")
    assert {row["name"]: row["kept"] for row in document["layers"]} == {
        row["name"]: kept_count(row["numel"], 0.8) for row in document["layers"]
    }


def test_acdc_keeps_twins_and_counts_statistics_again_where_a_phase_has_switched(
    classify: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    reestimate = image_classification.reestimate

    def counted(model: Any, inputs: Any, autocast: Any) -> int:
        batches = list(inputs)
        calls.append(len(batches))
        return reestimate(model, batches, autocast)

    monkeypatch.setattr(image_classification, "reestimate", counted)
    phases = {"starts": [[0, "dense"], [1, "sparse"], [3, "dense"], [4, "sparse"]], "epochs": 5}
    document = classify(
        tmp_path, "--method=acdc", "--sparsity=0.8", f"--method_args={json.dumps({'phases': phases})}",
        "--num_train_epochs=5", "--bn_reestimation_batches=3", "--save_twins", "--channels_last",
    )  # fmt: skip
    evaluations = document["evaluations"]
    assert [each["phase"] for each in evaluations] == ["dense", "sparse", "sparse", "dense", "sparse"]
    assert [round(each["sparsity"], 2) > 0.75 for each in evaluations] == [False, True, True, False, True]
    # The views that stand after an epoch differ from those after the one before at the ends of epochs 0, 2 and 3.
    assert calls == [3, 3, 3]
    for phase in ("dense", "sparse"):
        folder = tmp_path / f"best_{phase}" / "pretrained"
        assert AutoModelForImageClassification.from_pretrained(folder) is not None
        assert Preprocessing.load(folder) == Preprocessing.load(tmp_path)


@pytest.mark.parametrize("flag", [True, False])
def test_norms_decay_unless_told_not_to(flag: bool, tmp_path: Path) -> None:
    options = ["--max_train_steps=1", "--weight_decay=0.01", *SOFT[:1], *(["--no_norm_decay"] if flag else [])]
    args = image_classification.program.arguments.parse(
        parser("image_classification", None), [*SMALL, "--output_dir", str(tmp_path), *options]
    )
    run = image_classification.prepare(args)
    groups = {group["name"]: group["weight_decay"] for group in run.loop.optimizer.param_groups}
    assert groups == {"decay": 0.01, "no_decay": 0.0 if flag else 0.01, "thresholds": 0.01}


def test_bfloat16_trains_and_keeps_masters_in_float32(classify: Train, tmp_path: Path) -> None:
    document = classify(tmp_path, *SOFT, "--mixed_precision=bf16", "--max_train_steps=8")
    assert document["environment"]["mixed_precision"] == "bf16"
    assert document["history"][-1]["loss"] < document["history"][0]["loss"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}


def test_a_saved_model_is_trained_on(classify: Train, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tiny(num_channels=1, image_size=8).save_pretrained(tmp_path / "saved")
    options = ("--max_train_steps=1", "--learning_rate=0", "--method=dense")
    reset()
    arguments = [option for option in SMALL if "preset" not in option and "learning_rate" not in option]
    where = ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tmp_path / "saved")]
    assert image_classification.main([*arguments, *where, *options]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "out"))
    assert all(torch.equal(before[key], after[key]) for key in before if "running" not in key and "batches" not in key)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "resnet9"], "preset: expected one of"),
        (["--augmentation", "mixup"], "crop_flip, crop, imagenet, none"),
        (["--augmentation", "imagenet"], "--image_size"),
        (["--method", "lottery"], "--method among"),
        (["--data_dir", "nowhere"], "folders of classes"),
        (["--data_dir", "nowhere", "--dataset_name", "embedded"], "a dataset's name or a folder"),
        (["--model_name_or_path", "x"], "no --preset beside --model_name_or_path"),
        (["--method", "acdc", "--sparsity", "0.9"], "a run of 100 epochs"),
        (["--max_train_samples", "1"], "at least 2 images"),
        (["--lr_scheduler_type", "multistep"], "rising --lr_milestones"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output_dir", str(tmp_path / "out"), "--num_train_epochs", "1"]
    assert image_classification.main([*SMALL, *output, *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_set_without_anything_to_evaluate_on_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    np.savez(tmp_path / "train.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) % 2)
    arguments = ["--output_dir", str(tmp_path / "out"), "--num_train_epochs=1", "--data_dir", str(tmp_path)]
    assert image_classification.main([*SMALL, *arguments]) == 2
    assert "a train split and a validation or test split, got train" in capsys.readouterr().err


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """Dense and 80 %, without and with augmentation, four epochs of digits of which 40 are labelled wrongly."""
    folder = tmp_path_factory.mktemp("memorization")
    phases = {"starts": [[0, "dense"], [1, "sparse"], [2, "dense"], [3, "sparse"]], "epochs": 4}
    options = [
        *SMALL, "--output_dir", str(folder), "--num_train_epochs=4", "--corrupted_samples=40", "--sparsities",
        "0", "0.8",
        f"--method_args={json.dumps({'phases': phases})}", "--augmentation=crop",
    ]  # fmt: skip
    reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "plot", lambda *_: None)
        assert memorization.main(options) == 0
    return folder, json.loads((folder / "memorization.json").read_text(encoding="utf-8")), options


def test_the_memorisation_experiment_records_both_accuracies_of_every_run(experiment: Any) -> None:
    folder, document, _ = experiment
    runs = document["runs"]
    assert {title: list(group) for title, group in runs.items()} == {
        "without augmentation": ["dense", "80%"],
        "with augmentation": ["dense", "80%"],
    }
    for group in runs.values():
        assert {each["phase"] for each in group["dense"]} == {"dense"}
        assert [each["phase"] for each in group["80%"]] == ["dense", "sparse", "dense", "sparse"]
        for run in group.values():
            assert all(each["corrupted_as_true"] + each["corrupted_as_labelled"] <= 1 for each in run)
    plain = runs["without augmentation"]["dense"][-1]
    # What the digit is is learned from 260 right labels; 40 wrong ones are 13 % of the set.
    assert plain["corrupted_as_true"] > 0.4
    assert (folder / "memorization.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_memorisation_run_that_has_results_is_not_repeated(
    experiment: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, document, options = experiment
    reset()
    monkeypatch.setattr(image_classification, "prepare", lambda *_: pytest.fail("trained again"))
    assert memorization.main(options) == 0
    assert json.loads((folder / "memorization.json").read_text(encoding="utf-8"))["runs"] == document["runs"]
    assert capsys.readouterr().out.count("with augmentation") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--augmentation", "none"], "an augmentation for the second half"),
        (["--sparsities", "0.5", "1.0"], "different sparsities in [0, 1)"),
        (["--corrupted_samples", "301"], "between 1 and 300 images"),
    ],
)
def test_an_experiment_that_cannot_run_is_refused(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert memorization.main([*SMALL, "--output_dir", str(tmp_path / "x"), "--num_train_epochs=1", *options]) == 2
    assert words in capsys.readouterr().err
