"""Checkpoints of accelerate and the Trainer go on as if never stopped; as a program, two ranks under DDP do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import GMP, AutoSparse, AutoTune, Method, RigL

if __name__ != "__main__":
    from small_runs import Build, assert_same
    from transformers import Trainer, TrainingArguments

METHODS: dict[str, Method] = {
    "autosparse": AutoSparse(threshold_init=-3.0, backward_density=0.7, auto_tune=AutoTune(reference_losses=[0.5])),
    "gmp": GMP(sparsity=0.75, update_every=1, end=1.0),
}


def run(name: str, folder: Path) -> dict[str, object]:
    accelerator = Accelerator(cpu=True)
    losses = []

    def begin(seed: int) -> tuple[Any, Any, ts.Sparsifier]:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        sparsifier = ts.sparsify(net, METHODS[name], total_steps=6, steps_per_epoch=3)
        model, optimizer = accelerator.prepare(net, torch.optim.AdamW(sparsifier.param_groups(lr=0.05)))
        sparsifier.attach(optimizer)
        sparsifier.register(accelerator)
        return model, optimizer, sparsifier

    def train(model: Any, optimizer: Any, sparsifier: ts.Sparsifier) -> dict[str, object]:
        for _ in range(3):
            # Each rank has its own data: what they agree on, they agree on through the gradients.
            seed = 10 * sparsifier.step + accelerator.process_index
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
            loss = (model(x) - x[:, :4]).square().mean()
            sparsifier.observe(loss=loss)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        weights = {key: value.clone() for key, value in accelerator.unwrap_model(model).state_dict().items()}
        return {"model": weights, "sparsifier": sparsifier.state_dict()}

    first = begin(0)
    train(*first)
    accelerator.save_state(str(folder / name))
    unbroken = train(*first)
    accelerator.free_memory()
    accelerator._load_model_state_pre_hook.clear()
    accelerator._save_model_state_pre_hook.clear()
    second = begin(1)
    accelerator.load_state(str(folder / name))
    assert second[2].step == 3
    return {"resumed": train(*second), "unbroken": unbroken, "losses": losses[:6]}


def rank(number: int, folder: Path) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=2)
    torch.save({name: run(name, folder) for name in METHODS}, folder / f"{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    run = subprocess.run([sys.executable, __file__, folder], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name in METHODS:
        files = {path.name for path in (folder / name).iterdir()}
        assert {"tritonsparse_state.json", "tritonsparse_state.safetensors"} <= files
        assert not any(file.startswith("custom_checkpoint_") for file in files)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_both_ranks_end_alike_and_go_on_as_if_never_stopped(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["losses"] != second["losses"]
    assert_same(first["unbroken"], second["unbroken"])
    for each in (first, second):
        assert_same(each["resumed"], each["unbroken"])
    views = ["mask"] if name == "gmp" else ["grad_mask", "alpha"]
    assert first["unbroken"]["sparsifier"]["tensors"].keys() == {f"{i}.{view}" for i in (0, 2) for view in views}
    losses = [a + b for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert sum(losses[4:]) < sum(losses[:2])
    if name == "autosparse":  # the tuner sees the mean loss over ranks
        states = [each["unbroken"]["sparsifier"] for each in (first, second)]
        seen = states[0]["epoch_losses"][0]
        assert seen == pytest.approx(sum(losses[:3]) / 6, rel=1e-6)
        # .5 * 1.05 or .5 * .995: the same verdict on both, of the mean and not of a rank's own loss
        tuned = [state["method_state"]["tuned_alpha"] for state in states]
        assert tuned == [0.5 * (1.05 if seen > 0.505 else 0.995)] * 2


DECAYED = AutoSparse(threshold_init=-3.5, alpha=0.5, alpha_schedule="linear", threshold_weight_decay=0.1)


def trainer(model: Any, method: Any, folder: Path, compact: bool = False, **options: Any) -> Trainer:
    """8 examples in batches of 2: 4 steps an epoch, 2 epochs."""
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 30, (8, 6), generator=torch.Generator())]
    sparsifier = ts.sparsify(model, method, total_steps=8, steps_per_epoch=4, **options)
    arguments = TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=2, logging_steps=1, save_steps=5,
        report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(sparsifier.param_groups(weight_decay=0.01), lr=0.01)
    callback = ts.SparsityCallback(sparsifier, compact=compact)
    made = Trainer(model, arguments, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None))
    made.sparsifier = sparsifier
    return made


def trained(run: Trainer, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    run.train(**options)
    assert run.sparsifier.step == 8
    return run.sparsifier, [entry for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", [DECAYED, METHODS["gmp"]], ids=["autosparse", "gmp"])
def test_the_trainer_resumes_as_if_never_stopped_and_logs_what_it_did(gpt2: Build, tmp_path: Path, method: Any) -> None:
    first, logs = trained(trainer(gpt2(), method, tmp_path))
    folder = tmp_path / "checkpoint-5"
    assert (folder / "tritonsparse.safetensors").is_file()
    second, _ = trained(trainer(gpt2(seed=7), method, tmp_path), resume_from_checkpoint=str(folder))
    assert_same([second.model.state_dict(), second.state_dict()["tensors"]],
                [first.model.state_dict(), first.state_dict()["tensors"]])  # fmt: skip
    sparsities, losses = [entry["sparsity"] for entry in logs], [entry["loss"] for entry in logs]
    # The Trainer logs a step's loss after the step: an epoch's mean lacks its last loss and has the one before it.
    assert len(logs) == 8
    assert first.epoch_losses == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:7]) / 4], rel=1e-5)
    if method.name == "gmp":
        assert all("alpha" not in entry and "threshold" not in entry for entry in logs)
        assert sparsities == sorted(sparsities) and sparsities[-1] == 0.75
    else:
        # The log of step n is written after it, when alpha is that of step n + 1: .5 (1 - epoch/2)
        assert [entry["alpha"] for entry in logs] == [0.5] * 3 + [0.25] * 4 + [0.0]
        assert sparsities[-1] == pytest.approx(first.sparsity(), abs=1e-12)
        thresholds = [torch.sigmoid(layer.threshold).item() for layer in first.layers.values()]
        assert logs[0]["threshold"] != logs[-1]["threshold"] == pytest.approx(sum(thresholds) / len(thresholds))


def test_packed_blocks_are_saved_as_dense_weights_and_resumed_from_them(gpt2: Build, tmp_path: Path) -> None:
    states = []
    for seed, options in ((0, {}), (7, {"resume_from_checkpoint": str(tmp_path / "checkpoint-5")})):
        method = RigL(sparsity=0.75, update_every=3)
        sparsifier, _ = trained(trainer(gpt2(seed=seed), method, tmp_path, True, pattern="block:8"), **options)
        assert all(layer.compacted for layer in sparsifier.layers.values())
        sparsifier.expand()
        states.append({**sparsifier.model.state_dict()})
    assert_same(states[1], states[0])
    stock = type(gpt2()).from_pretrained(tmp_path / "checkpoint-8").state_dict()
    finalized = {key: value for key, value in states[0].items() if not key.endswith(".mask")}
    assert_same({key: stock[key] for key in finalized}, finalized)


def test_thresholds_among_the_weights_are_refused_when_training_begins(gpt2: Build, tmp_path: Path) -> None:
    for own in (False, True):
        run = trainer(gpt2(), DECAYED, tmp_path)
        run.optimizer = None if own else torch.optim.AdamW(run.model.parameters(), lr=0.01)
        with pytest.raises(ValueError, match=r"got .*\.threshold in group \d.*build the optimizer from sparsifier"):
            run.train()


if __name__ == "__main__":
    # Forked before anything has run backward: the packages are imported once.
    torch.multiprocessing.start_processes(rank, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
