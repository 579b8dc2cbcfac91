"""The `tritonsparse` command as one would type it, and what it says of the machine."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, ResNetConfig

import tritonsparse
from tritonsparse.eval import cli, doctor, layer_bench, machine
from tritonsparse.kernels import measured

H200 = "NVIDIA H200"


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A configuration of a size that no test could hold."""
    LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return str(tmp_path)


def test_usage_and_versions_are_printed(capsys: Any) -> None:
    assert cli.main([]) == 0
    assert "usage: tritonsparse COMMAND" in capsys.readouterr().out
    assert cli.main(["doctr"]) == 2
    assert "expected a command, doctor or bench, got 'doctr'" in capsys.readouterr().err
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch           {torch.__version__}" in out and "Triton kernels" in out and "transformers" in out


def test_doctor_predicts_every_layer_of_a_model_for_a_gpu_that_is_not_there(llama: str, capsys: Any) -> None:
    command = ["doctor", "--model_name_or_path", llama, "--device_name", H200, "--tokens", "8192"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("element  triton") == 14  # two layers of seven
    assert "lm_head" in out and "dense: output head" in out
    assert "element regime: no product gets shorter by unstructured zeros" in out
    layers, _ = doctor.outlook(doctor.configured(llama), 8192, H200)
    # 2 M N K / 790 TFLOP/s three times, 6 bytes a weight at 4.3 TB/s; ours 10 bytes a weight more.
    product, byte = 2 * 8192 * 4096 * 4096 / 790e12, 4096 * 4096 / 4.3e12
    assert layers[0].dense_ms == pytest.approx(1e3 * (3 * product + 6 * byte))
    assert layers[0].sparse_ms == pytest.approx(1e3 * (3 * product + 16 * byte))
    # At few tokens the weight's traffic is all there is.
    assert {row.backend for row in doctor.outlook(doctor.configured(llama), 16, H200)[0]} == {"fused"}


def test_doctor_says_of_blocks_what_is_known(llama: str, monkeypatch: Any, tmp_path: Path) -> None:
    model, square = doctor.configured(llama), (4096, 4096)
    entry = {"device": "nvidia-h200", "n": 4096, "k": 4096, "rows": 64, "columns": 64}
    entry |= {"dtype": "bfloat16", "max_density": 0.5}
    monkeypatch.setattr(measured, "read_block_table", lambda: (entry,))
    layers, _ = doctor.outlook(model, 8192, H200, pattern="block:64", density=0.5)
    others = [row for row in layers if row.shape != square]
    assert {(row.backend, row.sparse_ms) for row in layers if row.shape == square} == {("block", None)}
    assert others and all(row.backend == "triton" and "not measured" in row.why for row in others)
    denser, _ = doctor.outlook(model, 8192, H200, pattern="block:64", density=0.6)
    assert {row.backend for row in denser} == {"triton"}
    # Where rates are unknown it predicts nothing; convolutions are taken too.
    ResNetConfig(architectures=["ResNetForImageClassification"]).save_pretrained(tmp_path)
    layers, _ = doctor.outlook(doctor.configured(str(tmp_path)), 64, "Some GPU", pattern="block:16")
    found = [(row.backend, row.regime, row.dense_ms, row.sparse_ms) for row in layers]
    assert found == [("triton", "block", None, None)] * 53


def test_doctor_refuses_in_one_sentence(llama: str, capsys: Any) -> None:
    for options, words in ((["--model_name_or_path", f"{llama}/nothing"], f"{llama}/nothing"),):
        assert cli.main(["doctor", *options]) == 2
        printed = capsys.readouterr()
        assert words in printed.err and printed.err.startswith("error: ") and not printed.out


def test_bench_times_a_layer_beside_the_dense_one_and_gives_a_wrong_one_no_time(monkeypatch: Any, capsys: Any) -> None:
    assert cli.main(["bench", "--smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {row["way"]: row for row in json.loads(lines[-1])}
    assert {"dense", "eager", "torch", "torch, cached"} <= rows.keys()
    assert all(row["right"] and row["median_ms"] > 0 for row in rows.values())
    assert rows["dense"]["ratio"] == 1.0 and "ratio" in lines[1]

    def wrong(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, 1.1 * self.weight, self.bias)

    monkeypatch.setattr(layer_bench.Eager, "forward", wrong)
    assert cli.main(["bench", "--smoke"]) == 1
    assert "torch                 WRONG" in capsys.readouterr().out


def test_the_processor_and_the_commit_are_named(tmp_path: Path, monkeypatch: Any) -> None:
    package = tmp_path / "tritonsparse"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(tritonsparse, "__file__", str(package / "__init__.py"))
    assert machine.commit() is None  # an installation
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert machine.commit() == head[:12]
    (package / "__init__.py").write_text("x = 1\n")
    assert machine.commit() == f"{head[:12]}-dirty"

    # The processor, as Linux names it, elsewhere by the platform.
    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    text = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz: x\nmodel name\t: other\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert machine.processor() == "Some CPU @ 3 GHz: x"
    monkeypatch.setattr(Path, "read_text", absent)
    assert machine.processor() == (platform.processor() or platform.machine()) != ""
