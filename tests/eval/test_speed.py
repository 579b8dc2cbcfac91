"""Speed comparison, compressed rows and ONNX: equal outputs first, then numbers."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tritonsparse as ts
from tritonsparse.eval import csr, onnx_export, speed
from tritonsparse.eval.csr import CsrConv2d, CsrLinear, use_csr
from tritonsparse.eval.preprocessing import Preprocessing
from tritonsparse.eval.speed import measure, relative_error
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

quick, SEEDS = settings(max_examples=40, deadline=None), st.integers(0, 999)
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def prune(layer: Any, sparsity: float = 0.9) -> Any:
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand_like(layer.weight) < sparsity, 0.0)
    return layer


def classifier(**options: Any) -> CifarResNetForImageClassification:
    """Half of the weights are 0; norms have statistics of their own, so that folding them changes numbers."""
    torch.manual_seed(0)
    config = {"depth": 8, "widths": [4, 4, 8], "shortcut": "projection", "image_size": 12, "num_labels": 5, **options}
    model = CifarResNetForImageClassification(CifarResNetConfig(**config))
    with torch.no_grad():
        model.train()(torch.randn(32, 3, 12, 12) + 0.5)
    ts.sparsify(model, "static", sparsity=0.5).finalize()
    return model.eval()


@given(st.integers(1, 12), st.integers(1, 9), st.lists(st.integers(1, 4), max_size=2), st.booleans(), SEEDS)
@quick
def test_a_compressed_linear_layer(inputs: int, outputs: int, batch: list[int], bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = prune(nn.Linear(inputs, outputs, bias=bias).double(), 0.7)
    x = torch.randn(*batch, inputs, dtype=torch.float64)
    assert torch.allclose(CsrLinear(layer)(x), layer(x), atol=1e-12)


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.tuples(st.integers(5, 9), st.integers(5, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)), st.integers(1, 2), st.booleans(), SEEDS,
)  # fmt: skip
@quick
def test_a_compressed_convolution(
    inputs: int, outputs: int, batch: int, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: int, bias: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "bias": bias}
    layer = prune(nn.Conv2d(inputs, outputs, kernel, **options).double(), 0.7)
    x = torch.randn(batch, inputs, *size, dtype=torch.float64)
    assert torch.allclose(CsrConv2d(layer)(x), layer(x), atol=1e-12)


@pytest.fixture
def wins(monkeypatch: Any) -> Callable[[bool], None]:
    """`wins(fast)`: compressed rows are timed faster than dense ones, or slower."""
    return lambda fast: monkeypatch.setattr(csr, "_medians", lambda *_: (2.0, 1.0) if fast else (1.0, 2.0))


def test_layers_that_win_are_replaced_in_a_copy_and_the_outputs_stay(wins: Any) -> None:
    model, inputs = classifier(), {"pixel_values": torch.randn(3, 3, 12, 12)}
    expected = model(**inputs).logits
    wins(True)
    compressed, timings = use_csr(model, inputs, least_sparsity=0.4)
    assert len(timings) == 10 and {timing.name for timing in timings} >= {"conv", "blocks.1.projection.0", "classifier"}
    assert all(timing.used and 0.4 < timing.sparsity < 0.6 for timing in timings)
    assert type(compressed.get_submodule("classifier")) is CsrLinear
    assert type(compressed.get_submodule("blocks.2.projection.0")) is CsrConv2d
    assert relative_error(compressed(**inputs).logits, expected) < 1e-6
    assert type(model.classifier) is nn.Linear and torch.equal(model(**inputs).logits, expected)
    other = {"pixel_values": torch.randn(7, 3, 9, 9)}
    assert relative_error(compressed(**other).logits, model(**other).logits) < 1e-6


def test_layers_that_lose_layers_of_few_zeros_and_other_layers_stay(wins: Any) -> None:
    wins(False)
    inputs = {"pixel_values": torch.randn(1, 3, 12, 12)}
    compressed, timings = use_csr(classifier(), inputs, least_sparsity=0.4)
    assert len(timings) == 10 and not any(timing.used for timing in timings)
    assert not any(isinstance(module, CsrLinear | CsrConv2d) for module in compressed.modules())
    assert use_csr(classifier(), inputs, least_sparsity=0.9)[1] == []
    same, reflecting = {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}
    others = [nn.Conv2d(4, 4, 3, **options) for options in ({"groups": 2}, same, reflecting)]
    assert not any(csr._is_convolution(layer) for layer in (*others, nn.ConvTranspose2d(4, 4, 3)))
    assert csr._is_convolution(nn.Conv2d(4, 4, 3, padding="valid"))
    with pytest.raises(ValueError, match="float32 or float64 model on the CPU"):
        use_csr(classifier().bfloat16(), {})


def test_what_is_really_faster_is_found_by_measuring(one_thread: None) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(prune(nn.Linear(1024, 1024), 0.999), prune(nn.Linear(1024, 1024), 0.5))
    _, timings = use_csr(layers, {"input": torch.randn(64, 1024)}, repeats=11)
    # A thousandth of the products against all; half of them, in a layout that is several times slower a product.
    assert [timing.used for timing in timings] == [True, False], timings


def test_timings_are_those_of_each_model_and_taken_in_turn() -> None:
    order: list[str] = []
    seconds = {"slow": 0.02, "fast": 0.002}
    forwards = {name: lambda name=name: (order.append(name), time.sleep(seconds[name])) for name in seconds}
    found = measure(forwards, batch_size=8, runs=5, warmup=2)
    assert order == ["slow", "fast"] * 7
    assert found["slow"].median >= 0.02 > found["fast"].p20 >= 0.002
    for timing in found.values():
        assert timing.p20 <= timing.median <= timing.p80 and timing.runs == 5
        assert timing.throughput == pytest.approx(8 / timing.median)
    with pytest.raises(ValueError, match="at least 1 run"):
        measure({}, batch_size=1, runs=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    # In 16 bits, as many are: programs compute in float32 all the same.
    folder = tmp_path_factory.mktemp("saved")
    classifier().to(torch.bfloat16).save_pretrained(folder)
    Preprocessing((0.5,) * 3, (0.5,) * 3).save(folder)
    return folder


@pytest.fixture
def compared(capsys: Any) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """`compared(model, *options, status=0)` runs the program: its document and its other lines."""

    def run(model: Path, *options: str, status: int = 0) -> tuple[dict[str, Any], list[str]]:
        assert speed.main(["--model", str(model), "--device", "cpu", "--runs", "1", *options]) == status
        *lines, last = capsys.readouterr().out.splitlines()
        return json.loads(last), lines

    return run


def test_models_are_compared_in_one_run(saved: Path, tmp_path: Path, compared: Any, wins: Any, marian: Any) -> None:
    wins(True)
    file = tmp_path / "speed.json"
    options = ("--batch_sizes", "1", "2", "--runs", "2", "--threads", "1", "--output", str(file))
    document, lines = compared(saved, *options)
    assert document == json.loads(file.read_text(encoding="utf-8"))
    rows = [(row["batch_size"], row["model"], row["verdict"]) for row in document["rows"]]
    assert rows == [(size, model, "ok") for size in (1, 2) for model in ("dense", "compressed rows")]
    # Matrices of norms do not count: half of the weights of 9 convolutions and the classifier.
    assert document["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert document["rows"][0]["speedup"] == 1.0 and document["environment"]["threads"] == 1
    assert any(line.strip().startswith("2  compressed rows") for line in lines)
    # Translation models are compared on tokens.
    marian().save_pretrained(tmp_path)
    assert len(compared(tmp_path, "--batch_sizes", "2", "--length", "8")[0]["rows"]) == 2


def test_a_dense_checkpoint_is_pruned_as_asked(tmp_path: Path, compared: Any, wins: Any, capsys: Any) -> None:
    wins(True)
    torch.manual_seed(0)
    config = CifarResNetConfig(depth=8, widths=[8, 8, 8], image_size=8)
    CifarResNetForImageClassification(config).save_pretrained(tmp_path)
    document, _ = compared(tmp_path, "--batch_sizes", "1", "--prune", "0.75")
    assert document["sparsity"] == pytest.approx(0.75, abs=0.005) and document["pruned_to"] == 0.75
    assert [layer["sparsity"] for layer in document["rows"][1]["layers"]] == pytest.approx([0.75] * 8, abs=0.01)
    # The largest weights are those kept.
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data.copy_(torch.tensor([[0.1, -3.0, 2.0, -0.2]]))
    assert speed.pruned(model, 0.5)[0].weight.tolist() == [[0.0, -3.0, 2.0, 0.0]]
    # A folder without a model is one sentence.
    assert speed.main(["--model", str(tmp_path / "none"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_wrong_output_prints_no_time(saved: Path, compared: Any, wins: Any, monkeypatch: Any) -> None:
    wins(True)
    monkeypatch.setattr(CsrLinear, "forward", lambda self, x: torch.zeros(*x.shape[:-1], 5))
    document, lines = compared(saved, "--batch_sizes", "1", status=1)
    row = document["rows"][1]
    assert row["verdict"] == "WRONG" and "median" not in row
    assert any("WRONG: error" in line for line in lines)


def test_sparse_layers_are_not_exported(tmp_path: Path) -> None:
    model = classifier()
    ts.sparsify(model, "static", sparsity=0.5)
    words = "expected a finalized model" if HAS_ONNX else "expected onnx and onnxscript"
    with pytest.raises((ValueError, ImportError), match=words):
        onnx_export.export_onnx(model, {"pixel_values": torch.randn(2, 3, 12, 12)}, tmp_path / "model.onnx")


@pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")
def test_onnx_keeps_the_zeros_and_the_outputs_at_any_batch(saved: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "model.onnx"
    assert onnx_export.main(["--model", str(saved), "--output", str(path)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["zeros"] == printed["model_zeros"] > 600 and printed["error"] < 1e-5
    assert printed["bytes"] == path.stat().st_size
    model = speed.load_any(str(saved))
    for batch in (1, 5):
        found = onnx_export.round_trip(model, {"pixel_values": torch.randn(batch, 3, 12, 12)}, path)
        assert found.error < 1e-5 and found.zeros == found.model_zeros
