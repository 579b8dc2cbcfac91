"""The one import of Triton: every kernel file takes `triton`, `tl` and `TensorDescriptor` from here.

Where Triton is not installed the names are inert stand-ins, under which files full of `@triton.jit`
still import: references and public functions work, and asking for the Triton back end is an error that
says what to do.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["AVAILABLE", "INTERPRETED", "TensorDescriptor", "require", "tl", "triton"]


class _Absent:
    """Swallows what a kernel file does with Triton at import: attributes, decorators, constexpr values."""

    def __getattr__(self, name: str) -> _Absent:
        # Inspection (pytest's collection, `inspect`) must see an object without special attributes.
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Absent:
        return self


_import_error = ""
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:  # also raised by an installed Triton whose binary does not load
    triton = tl = TensorDescriptor = _Absent()
    _import_error = str(error)

AVAILABLE: bool = not _import_error
# Triton reads TRITON_INTERPRET as each kernel is decorated, which happens while our package is imported;
# its own reading is asked, so that the two cannot disagree on what counts as set.
INTERPRETED: bool = AVAILABLE and bool(triton.knobs.runtime.interpret)


def require(function: str, tensor: torch.Tensor) -> None:
    """Refuses a launch that cannot work.

    Args:
        function: name of the public function the user called, for the message.
        tensor: the operand whose device the kernel would run on.

    Raises:
        RuntimeError: Triton is not importable, or `tensor` is not on a GPU; the interpreter takes any device.
    """
    if not AVAILABLE:
        raise RuntimeError(
            f'{function}: expected triton to be importable for backend="triton", got "{_import_error}"; '
            f'install triton or pass backend="torch"'
        )
    if not tensor.is_cuda and not INTERPRETED:
        raise RuntimeError(
            f'{function}: expected tensors on a GPU for backend="triton", got device {tensor.device}; '
            f'move them to a GPU or pass backend="torch"'
        )
