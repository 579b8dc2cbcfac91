"""The `tritonsparse` command as one would type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, ResNetConfig

from tritonsparse.eval import cli, doctor, layer_bench
from tritonsparse.kernels import measured


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A configuration of a size that no test could hold."""
    LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return str(tmp_path)


def test_without_a_command_the_usage_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "usage: tritonsparse COMMAND" in capsys.readouterr().out
    assert cli.main(["doctr"]) == 2
    assert "expected a command, doctor or bench, got 'doctr'" in capsys.readouterr().err


def test_doctor_names_versions_and_what_triton_can_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch           {torch.__version__}" in out and "Triton kernels" in out and "transformers" in out


def test_doctor_predicts_every_layer_of_a_model_for_a_gpu_that_is_not_there(
    llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["doctor", "--model_name_or_path", llama, "--device_name", "NVIDIA H200", "--tokens", "8192"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("element  triton") == 14  # two layers of seven
    assert "lm_head" in out and "dense: output head" in out
    assert "element regime: no product gets shorter by unstructured zeros" in out
    layers, _ = doctor.outlook(doctor.configured(llama), 8192, "NVIDIA H200")
    # 2 M N K / 790 TFLOP/s three times, 6 bytes a weight at 4.3 TB/s; ours 10 bytes a weight more.
    product, byte = 2 * 8192 * 4096 * 4096 / 790e12, 4096 * 4096 / 4.3e12
    assert layers[0].dense_ms == pytest.approx(1e3 * (3 * product + 6 * byte))
    assert layers[0].sparse_ms == pytest.approx(1e3 * (3 * product + 16 * byte))
    # At few tokens the weight's traffic is all there is.
    assert {row.backend for row in doctor.outlook(doctor.configured(llama), 16, "NVIDIA H200")[0]} == {"fused"}


def test_doctor_says_of_blocks_what_was_measured(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (n, k) = doctor.configured(llama), (4096, 4096)
    fields = ("device", "n", "k", "rows", "columns", "dtype", "max_density")
    entry = dict(zip(fields, ("nvidia-h200", n, k, 64, 64, "bfloat16", 0.5), strict=True))
    monkeypatch.setattr(measured, "read_block_table", lambda: (entry,))
    layers, _ = doctor.outlook(model, 8192, "NVIDIA H200", pattern="block:64", density=0.5)
    square = [row for row in layers if row.shape == (n, k)]
    assert {row.backend for row in square} == {"block"} and {row.sparse_ms for row in square} == {None}
    others = [row for row in layers if row.shape != (n, k)]
    assert others and all(row.backend == "triton" and "not measured" in row.why for row in others)
    denser, _ = doctor.outlook(model, 8192, "NVIDIA H200", pattern="block:64", density=0.6)
    assert {row.backend for row in denser} == {"triton"}


def test_doctor_predicts_nothing_where_rates_are_unknown_and_takes_convolutions(tmp_path: Path) -> None:
    ResNetConfig(architectures=["ResNetForImageClassification"]).save_pretrained(tmp_path)
    layers, _ = doctor.outlook(doctor.configured(str(tmp_path)), 64, "Some GPU", pattern="block:16")
    assert {row.backend for row in layers} == {"triton"} and {row.regime for row in layers} == {"block"}
    assert all(row.dense_ms is None and row.sparse_ms is None for row in layers)
    assert len(layers) == 53


def test_doctor_refuses_in_one_sentence(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model_name_or_path", str(tmp_path / "nothing")]) == 1
    assert cli.main(["doctor", "--model_name_or_path", llama, "--tokens", "0"]) == 1
    assert cli.main(["doctor", "--model_name_or_path", llama, "--pattern", "stripes"]) == 1
    assert cli.main(["doctor", "--model_name_or_path", llama, "--density", "0"]) == 1
    errors = capsys.readouterr().err
    assert "expected at least 1 token, got 0" in errors and "'stripes'" in errors
    assert "expected a density in (0, 1], got 0" in errors


def test_bench_times_a_layer_beside_the_dense_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {row["way"]: row for row in json.loads(lines[-1])}
    assert {"dense", "eager", "torch", "torch, cached"} <= rows.keys()
    assert all(row["right"] and row["median_ms"] > 0 for row in rows.values())
    assert rows["dense"]["ratio"] == 1.0
    assert "ratio" in lines[1]


def test_bench_gives_a_wrong_layer_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = nn.functional.linear(x, 1.1 * self.weight, self.bias)
        return y

    monkeypatch.setattr(layer_bench.Eager, "forward", wrong)
    assert cli.main(["bench", "--smoke"]) == 1
    assert "torch                 WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4096"], "expected --shape OUTPUTSxINPUTS, got '4096'"),
        (["--tokens", "0"], "expected --tokens and --runs of at least 1, got 0 and 30"),
    ],
)
def test_bench_refuses_sizes_that_are_none(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", *arguments])
    assert message in capsys.readouterr().err
