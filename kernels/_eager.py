"""When an op's Python may run as it is, instead of the registered op: in eager code, which is where its cost shows.

`torch.library` puts checks, wrappers and two dispatches around every call: some 0.2 ms a layer's forward and backward.
What reads or rewrites a program needs them, for it sees a registered op as one node: torch.compile, export, tracers,
functorch's transforms, dispatch modes and tensor subclasses. Nobody else does: there a layer calls an
`autograd.Function` over the same Python, and the numbers are the same because the code is.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

__all__ = ["as_dtype", "is_eager", "on_device_of", "outside_autocast"]

_PLAIN = (Tensor, nn.Parameter)
_NOTHING = contextlib.nullcontext()


def is_eager(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing but autograd watches what is computed of these operands."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        # What `is_grads_batched` and `jacobian(vectorize=True)` hand to a backward.
        or torch._C._functorch.is_legacy_batchedtensor(x)
    )


def outside_autocast(x: Tensor, bias: Tensor | None = None) -> contextlib.AbstractContextManager[object]:
    """Autocast switched off for a product of x, unless it would cast nothing: a look costs a tenth of the switch."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _NOTHING
    dtype = torch.get_autocast_dtype(device)
    if x.dtype == dtype and (bias is None or bias.dtype == dtype):
        return _NOTHING
    return torch.autocast(device, enabled=False)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The tensor's GPU as the current one, for a launch; nothing where it is that already."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device_of(tensor)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which costs as much as an addition even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
