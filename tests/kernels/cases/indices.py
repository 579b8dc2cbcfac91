"""The indices of many layers against their definition, which every ring runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tritonsparse.kernels.block.topology import IndexTable, build_index_reference, build_indices, index_size


def check_indices(shapes: Sequence[tuple[int, int]], backend: str, device: str = "cpu") -> None:
    """The indices of layers are rewritten in place as their flags move, and nothing waits for the device."""
    random = torch.Generator(device).manual_seed(0)
    # Layers of nothing, of a few blocks, of many, of all.
    flags = [
        torch.rand(shape, generator=random, device=device) < (0.0, 0.3, 0.9, 1.0)[i % 4]
        for i, shape in enumerate(shapes)
    ]
    indices = [torch.empty(index_size(*shape), dtype=torch.int32, device=device) for shape in shapes]
    build_indices(flags, indices, backend)
    table = IndexTable(flags, indices, backend)
    for rebuild in (table.build, lambda: build_indices(flags, indices, backend)):
        for one in flags:
            one.logical_not_()
        with no_synchronization(device):
            rebuild()
        for one, index in zip(flags, indices, strict=True):
            assert torch.equal(index, build_index_reference(one)), tuple(one.shape)


@contextmanager
def no_synchronization(device: str = "cuda") -> Iterator[None]:
    """On a GPU, waiting for it is an error."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
