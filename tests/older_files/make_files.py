"""Makes the files in this folder with the package as it was at commit 2a1f126.

Not part of the suite, and refused under another version of the package. From the repository's root:

    git worktree add ../older 2a1f126
    python3.11 -m venv V && V/bin/pip install "torch==2.13.0" "transformers==5.24.0" "accelerate==1.15.0" ../older
    OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 V/bin/python tests/older_files/make_files.py

    states/<case>.pt       model, optimizer and Sparsifier in the middle of training
    pretrained/<case>/     what `save_pretrained` wrote
    bsr/<case>/            what `save_bsr` wrote
    pickled/<case>.pt      a whole module with sparse layers
    program/               a run of the language-modelling program: its model and texts, a checkpoint in the middle of
                           an epoch, `all_results.json`, and the finalized model at the end

<case>.safetensors beside them holds what the test compares: outputs, and where training went from there. It holds
the batches too: the same seed may give other numbers under another version or on another CPU. Adam's epsilon is large,
so that gradients as small as rounding errors move nothing.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts

HERE = Path(__file__).parent
# Steps of a run before it is saved, in the middle of an epoch; of the whole run; of an epoch.
BEFORE, STEPS, STEPS_PER_EPOCH = 3, 8, 2


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8))


def mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), Conv1D(8, 16))


def convolution() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, bias=False), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 8, bias=False),
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last)


def pixels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 8))


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, n_inner=16, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run: how its model is built, and by what it is made sparse and trained."""

    build: Callable[[], nn.Module]
    method: str
    fields: dict[str, Any]
    optimizer: str = "adamw"
    pattern: str = "unstructured"
    embedding_sparsity: float | None = None


THRESHOLDS = {"threshold_init": -2.5, "threshold_lr_scale": 5.0}
TUNED = {"backward_density": 0.9, "auto_tune": {"reference_losses": [0.5, 0.1]}}
TARGET = {"sparsity": 0.5, "control_every": 2}
PHASES = {"starts": [[0, "dense"], [1, "sparse"], [2, "dense"], [3, "sparse"]], "epochs": 4}
STATES = {
    "autosparse": Case(linear, "autosparse", {**THRESHOLDS, **TUNED}, "sgd"),
    "autosparse_target": Case(convolution, "autosparse", {**THRESHOLDS, **TARGET, "refresh_every": 2}, "sgd"),
    "autosparse_blocks": Case(linear, "autosparse", {**TARGET, "backward_density": 0.9}, "sgd", "block:4"),
    "dst": Case(linear, "dst", {"penalty": 0.01}, "sgd"),
    "rigl": Case(linear, "rigl", {"sparsity": 0.5, "drop_fraction": 0.5, "update_every": 3}, pattern="block:4"),
    "acdc": Case(linear, "acdc", {"sparsity": 0.6, "phases": PHASES}),
    "powerprop": Case(linear, "powerprop", {"sparsity": 0.7, "backward_sparsity": 0.4}, "sgd"),
    "swat": Case(convolution, "swat", {"sparsity": 0.5, "refresh_every": 5, "distribution": "momentum"}, "sgd"),
}
PRETRAINED = {
    "bert_autosparse": Case(bert, "autosparse", {"threshold_init": -5.0, "backward_density": 0.95}, "plain"),
    "gpt2_topkast": Case(
        gpt2, "topkast", {"sparsity": 0.6, "backward_sparsity": 0.3, "alpha": 0.5}, "plain", embedding_sparsity=0.5
    ),
}
BSR = {
    "gpt2": Case(gpt2, "static", {"sparsity": 0.75}, pattern="block:4"),
    "pixels": Case(pixels, "static", {"sparsity": 0.75}, pattern="block:4"),
}
PICKLED = {
    "autosparse": Case(linear, "autosparse", {**THRESHOLDS, "backward_density": 0.9}),
    "powerprop": Case(mixed, "powerprop", {"sparsity": 0.7, "backward_sparsity": 0.4, "alpha": 0.5}, pattern="block:4"),
    "swat": Case(mixed, "swat", {"sparsity": 0.5, "activation_sparsity": 0.25, "refresh_every": 2}, pattern="2:4"),
}


def begin(case: Case) -> tuple[nn.Module, ts.Sparsifier]:
    """A case's model before the first step."""
    torch.manual_seed(0)
    model = case.build()
    sparsifier = ts.sparsify(
        model, ts.methods.METHODS[case.method](**case.fields), pattern=case.pattern, total_steps=STEPS,
        steps_per_epoch=STEPS_PER_EPOCH, embedding_sparsity=case.embedding_sparsity,
    )  # fmt: skip
    return model, sparsifier


def attach(case: Case, sparsifier: ts.Sparsifier) -> torch.optim.Optimizer:
    """A case's optimizer; the Sparsifier counts its steps."""
    groups = sparsifier.param_groups(lr=0.05, weight_decay=0.01)
    optimizer: torch.optim.Optimizer
    if case.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, eps=1e-3)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9 if case.optimizer == "sgd" else 0.0)
    sparsifier.attach(optimizer)
    return optimizer


def draw(case: Case, count: int) -> Tensor:
    """Batches `[count, ...]`: ids of a language model, else inputs of 8 features or of 4 channels of 4x4."""
    if case.build in (bert, gpt2):
        return torch.randint(2, 16, (count, 2, 8))
    return torch.randn(count, 8, 8) if case.build in (linear, mixed) else torch.randn(count, 2, 4, 4, 4)


def outputs_and_loss(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Ids are their own labels; other models give the first 8 numbers of their input back."""
    if not batch.is_floating_point():
        result = model(input_ids=batch, labels=batch)
        return result.logits, result.loss
    outputs = model(batch)
    return outputs, (outputs - batch.detach().flatten(1)[:, :8]).square().mean()


def train(model: nn.Module, sparsifier: ts.Sparsifier, optimizer: Any, batches: Tensor) -> Tensor:
    """One step a batch; returns the losses."""
    losses = []
    for batch in batches:
        _, loss = outputs_and_loss(model.train(), batch)
        loss.backward()
        sparsifier.observe(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def standing(model: nn.Module, sparsifier: ts.Sparsifier, batch: Tensor) -> dict[str, Tensor]:
    """Where training stands, by what is public beside the Parameters."""
    layers = sparsifier.layers
    outputs, _ = outputs_and_loss(model.eval(), batch)
    masks = {f"mask/{name}": layer.mask.clone() for name, layer in layers.items() if layer.mask is not None}
    return {
        "outputs": outputs,
        "step": torch.tensor(sparsifier.step),
        "epoch_losses": torch.tensor(sparsifier.epoch_losses),
        "kept": torch.tensor([layer.kept_count() for layer in layers.values()]),
        **masks,
        **{f"statistic/{key}": torch.tensor(value) for key, value in sparsifier.method.statistics().items()},
    }


def go_on(model: nn.Module, sparsifier: ts.Sparsifier, optimizer: Any, batches: Tensor) -> dict[str, Any]:
    """Where training stands, one step a batch, and where it has come to then."""
    return {
        "saved": standing(model, sparsifier, batches[0]),
        "losses": train(model, sparsifier, optimizer, batches),
        "reached": {**standing(model, sparsifier, batches[0]), **dict(model.named_parameters())},
    }


def write(path: Path, **parts: Tensor | dict[str, Tensor]) -> None:
    """`parts` as safetensors; the tensors of a dictionary are named "<part>/<key>"."""
    flat: dict[str, Tensor] = {}
    for part, value in parts.items():
        flat |= {part: value} if isinstance(value, Tensor) else {f"{part}/{key}": each for key, each in value.items()}
    save_file({key: value.detach().contiguous().clone() for key, value in flat.items()}, path)


def make_states(folder: Path) -> None:
    for name, case in STATES.items():
        model, sparsifier = begin(case)
        optimizer, batches = attach(case, sparsifier), draw(case, STEPS)
        train(model, sparsifier, optimizer, batches[:BEFORE])
        states = {"model": model, "sparsifier": sparsifier, "optimizer": optimizer}
        torch.save({key: value.state_dict() for key, value in states.items()}, folder / f"{name}.pt")
        batches = batches[BEFORE:]
        write(folder / f"{name}.safetensors", batches=batches, **go_on(model, sparsifier, optimizer, batches))


def make_pretrained(folder: Path) -> None:
    for name, case in PRETRAINED.items():
        model, sparsifier = begin(case)
        optimizer, batches = attach(case, sparsifier), draw(case, STEPS)
        train(model, sparsifier, optimizer, batches[:BEFORE])
        sparsifier.save_pretrained(folder / name)
        batches = batches[BEFORE:]
        write(folder / f"{name}.safetensors", batches=batches, **go_on(model, sparsifier, optimizer, batches))


def outputs_around_a_step(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Outputs before and after a step of SGD."""
    before, loss = outputs_and_loss(model, batch)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return {"before": before, "after": outputs_and_loss(model, batch)[0]}


def make_bsr(folder: Path) -> None:
    for name, case in BSR.items():
        model = begin(case)[1].finalize(format="bsr").eval()
        ts.save_bsr(model, folder / name)
        batch = draw(case, 1)[0]
        write(folder / f"{name}.safetensors", batch=batch, expected=outputs_around_a_step(model, batch))


def outputs_and_gradients(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Outputs, and the gradients of the input and of all Parameters."""
    x = batch.clone().requires_grad_()
    outputs, loss = outputs_and_loss(model, x)
    loss.backward()
    gradients = {"x": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    return {"outputs": outputs, **{name: gradient for name, gradient in gradients.items() if gradient is not None}}


def make_pickled(folder: Path) -> None:
    for name, case in PICKLED.items():
        model, sparsifier = begin(case)
        batches = draw(case, BEFORE + 1)
        train(model, sparsifier, attach(case, sparsifier), batches[:BEFORE])
        torch.save(model, folder / f"{name}.pt")
        write(folder / f"{name}.safetensors", batch=batches[-1], expected=outputs_and_gradients(model, batches[-1]))


# Files are named relative to the working folder: a resumed run must repeat the names of the run that was saved.
PROGRAM = [
    "--model_name_or_path=model", "--train_file=train.txt", "--validation_file=validation.txt", "--test_file=test.txt",
    "--output_dir=run", "--batch_size=4", "--gradient_accumulation_steps=2", "--tgt_len=8", "--mem_len=8",
    "--eval_batch_size=2", "--max_train_steps=12", "--checkpointing_steps=7", "--logging_steps=4",
    "--learning_rate=0.01", "--min_learning_rate=0.001", "--optim=lamb", "--adam_epsilon=0.001", "--method=autosparse",
    '--method_args={"threshold_init": -3, "backward_density": 0.9}', "--embedding_sparsity=0.25",
]  # fmt: skip


def make_program(folder: Path) -> None:
    from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel, Vocabulary
    from tritonsparse.train import language_modeling

    chance, words = random.Random(0), [f"w{number}" for number in range(20)]
    for split, count in (("train", 40), ("validation", 10), ("test", 10)):
        lines = [
            " ".join(chance.choices(words, weights=range(20, 0, -1), k=chance.randint(3, 9))) for _ in range(count)
        ]
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    vocabulary = Vocabulary.count((folder / "train.txt").read_text(encoding="utf-8").splitlines())
    torch.manual_seed(0)
    config = TransfoXLConfig(
        vocab_size=len(vocabulary), cutoffs=[12], d_model=8, d_embed=8, n_head=2, d_head=4, d_inner=16, div_val=1,
        n_layer=1, mem_len=8, clamp_len=-1, same_length=False, same_length_rule="nvidia", untie_r=False, init_std=0.1,
        dropout=0.0, dropatt=0.0,
    )  # fmt: skip
    TransfoXLLMHeadModel(config).save_pretrained(folder / "model")
    vocabulary.save(folder / "model" / "vocabulary.txt")
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        os.chdir(temporary)
        assert language_modeling.main(PROGRAM) == 0
        run = Path(temporary) / "run"
        assert [path.name for path in run.glob("step_*")] == ["step_7"]
        shutil.copytree(run / "step_7", folder / "step_7")
        for file in ("all_results.json", "model.safetensors"):
            shutil.copyfile(run / file, folder / file)


def main() -> int:
    if importlib.util.find_spec("tritonsparse.kernels.masked_matmul") is None:
        print("make_files: expected the package of commit 2a1f126, got another; see the docstring", file=sys.stderr)
        return 2
    for make in (make_states, make_pretrained, make_bsr, make_pickled, make_program):
        folder = HERE / make.__name__.removeprefix("make_")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
