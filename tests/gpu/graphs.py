"""CUDA graphs: a call captured after others of its kind, which compile and allocate what it needs."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def captured(
    run: Callable[[], Result], *, calls: int = 1, before: Callable[[], object] = lambda: None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph, and what the captured call gave; `before` is called before each call."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(calls):
            before()
            run()
    torch.cuda.current_stream().wait_stream(side)
    before()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result
