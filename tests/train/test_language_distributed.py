"""Two processes under torchrun, each with its own columns and memory, are one process that accumulates two chunks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from tritonsparse.train import language_modeling
from tritonsparse.train.text import language_presets
from tritonsparse.train.text.language_presets import Sizes

SIZES = (1, 16, 2, 8, 32, 1, 0.0, 0.0, 0.1, (12,), 8)
WORKER = f"""
import sys
from tritonsparse.train import language_modeling
from tritonsparse.train.text import language_presets
language_presets.TRANSFO_XL["transfoxl-tiny"] = language_presets.Sizes(*{SIZES!r})
sys.exit(language_modeling.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    # Every split the same text, so that no word is unknown. A large epsilon: Adam would not notice gradients of the
    # wrong scale.
    text = "".join(f"w{number % 17} w{number % 5} w{number % 11}\n" for number in range(60))
    words = ["--preset=transfoxl-tiny", "--batch_size=4", "--max_train_steps=9", "--method=gmp", "--sparsity=0.5"]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
        words.append(f"--{split}_file={folder / split}.txt")
    return [
        *words, '--method_args={"update_every": 2}', "--eval_batch_size=2", "--logging_steps=1", "--adam_epsilon=0.1",
        "--learning_rate=0.1", "--checkpointing_steps=4", "--roll",
    ]  # fmt: skip


def test_two_processes_are_one_that_accumulates(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(worker), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    pair = tmp_path / "pair"
    done = subprocess.run(
        [*launch, f"--output_dir={pair}"], env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    monkeypatch.setitem(language_presets.TRANSFO_XL, "transfoxl-tiny", Sizes(*SIZES))
    one = tmp_path / "one"
    assert language_modeling.main([*options, "--gradient_accumulation_steps=2", f"--output_dir={one}"]) == 0
    histories = [json.loads((folder / "all_results.json").read_text())["history"] for folder in (pair, one)]
    assert len(histories[0]) == 9
    for first, second in zip(*histories, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    weights = [load_file(folder / "step_8" / "model.safetensors") for folder in (pair, one)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-6, msg=name)
    # The ranks' memories lie beside each other, and are the two chunks' of the other run.
    found = [load_file(pair / "step_8" / f"memory_{rank}.safetensors")["0.0"] for rank in (0, 1)]
    expected = load_file(one / "step_8" / "memory_0.safetensors")
    for rank in (0, 1):
        torch.testing.assert_close(found[rank], expected[f"{rank}.0"], rtol=1e-4, atol=1e-6)
