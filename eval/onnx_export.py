"""Export to ONNX with the zeros kept, and the round trip that shows it.

    python -m tritonsparse.eval.onnx_export --model runs/resnet20 --output resnet20.onnx

Needs onnx, onnxscript and, for the round trip, onnxruntime (`pip install tritonsparse[onnx]`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .command_line import COUNT, TEXT, Parser, one_line
from .output_files import refuse_unwritable
from .speed import load_any, make_inputs, relative_error

__all__ = ["RoundTrip", "export_onnx", "main", "round_trip"]


@dataclass(frozen=True)
class RoundTrip:
    """What came back: relative RMS error of the logits, zeros in the file's matrices and in the model's, bytes."""

    error: float
    zeros: int
    model_zeros: int
    bytes: int


class _Logits(nn.Module):
    """The model as a function of tensors: ONNX knows no named outputs of transformers."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, values, strict=True))).logits
        return logits


def export_onnx(model: nn.Module, inputs: dict[str, Tensor], path: str | Path) -> Path:
    """Write `model` (stock modules, finalized) as ONNX; the first dimension of inputs and logits is free.

    Args:
        model: a transformers model whose output has `logits`; it is exported in evaluation mode and left as it was.
        inputs: keyword arguments of one forward.
        path: the file; it holds the weights too.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: sparse layers are still in the model.
    """
    from tritonsparse.layers import SparseLayer

    try:
        import onnx  # noqa: F401 - the exporter's own message names neither package's purpose
        import onnxscript  # noqa: F401 - likewise
    except ImportError as error:
        raise ImportError(
            "export_onnx: expected onnx and onnxscript, got an installation without; pip install onnx onnxscript"
        ) from error
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        raise ValueError(
            "export_onnx: expected a finalized model, got sparse layers; call sparsifier.finalize() first or load "
            "what save_pretrained wrote"
        )
    target, names = Path(path), list(inputs)
    batch = torch.export.Dim("batch", min=1)
    was_training = model.training
    wrapped = _Logits(model, names).eval()
    try:
        program = torch.onnx.export(
            wrapped, tuple(inputs.values()), dynamo=True, input_names=names, output_names=["logits"], verbose=False,
            dynamic_shapes=(tuple({0: batch} for _ in names),), external_data=False,
        )  # fmt: skip
    finally:
        model.train(was_training)
    assert program is not None  # given back where dynamo=True
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        program.save(str(partial), external_data=False)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


@torch.no_grad()
def round_trip(model: nn.Module, inputs: dict[str, Tensor], path: str | Path) -> RoundTrip:
    """Run the file with onnxruntime on `inputs` and compare it with the model.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError(
            "round_trip: expected onnx and onnxruntime, got an installation without; pip install onnx onnxruntime"
        ) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {name: value.cpu().numpy() for name, value in inputs.items()})
    was_training = model.training
    expected = model.eval()(**inputs).logits.cpu()
    model.train(was_training)
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer]
    matrices = [array for array in arrays if array.ndim >= 2 and array.dtype.kind == "f"]
    return RoundTrip(
        error=relative_error(torch.from_numpy(logits), expected),
        zeros=sum(int((array == 0).sum()) for array in matrices),
        model_zeros=sum(int((weight == 0).sum()) for weight in model.parameters() if weight.dim() >= 2),
        bytes=Path(path).stat().st_size,
    )


def parser() -> Parser:
    """The options; `main` reads them."""
    result = Parser("eval.onnx_export", __doc__)
    result.add_argument("--model", type=TEXT, required=True, help="a checkpoint folder")
    result.add_argument("--output", type=TEXT, required=True, help="the ONNX file")
    result.add_argument("--length", type=COUNT, default=128, help="tokens of a sequence, for language models")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: exports, runs the round trip, prints it as JSON; status 2 and one sentence for bad input."""
    return one_line(lambda: _report(parser().parse_args(argv)))


def _report(args: argparse.Namespace) -> int:
    refuse_unwritable("onnx_export", "--output", args.output)
    model = load_any(args.model)
    # Two, because torch.export takes a batch of one for a constant.
    inputs = make_inputs(model, args.model, 2, args.length, "cpu")
    path = export_onnx(model, inputs, args.output)
    print(json.dumps({"file": str(path), **asdict(round_trip(model, inputs, path))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
