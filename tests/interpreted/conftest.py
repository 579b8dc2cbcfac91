"""Tests of kernels through Triton's interpreter, on a CPU.

Triton decides for good at its import whether kernels are interpreted, and the main pytest process must not be. So
nothing here is collected unless TRITON_INTERPRET=1; `tests/kernels/test_interpreted.py` runs the folder so. By hand:

    TRITON_INTERPRET=1 pytest --confcutdir=tests/interpreted tests/interpreted

No bfloat16 here: the interpreter computes on its raw bits, and truncates where a cast to it should round.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings

# For `cases` and `small_runs`.
sys.path += [str(Path(__file__).parents[1] / each) for each in ("kernels", "small")]

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

# The interpreter is slow and a failure must come back on the next run: no deadline, no chance, and no search
# for a smaller example, which takes minutes and gains little over shapes that are small already.
phases = [Phase.explicit, Phase.generate]
settings.register_profile("interpreted", deadline=None, derandomize=True, max_examples=50, phases=phases)
settings.load_profile("interpreted")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
        memory = allocate(*args, **kwargs)
        if memory.is_floating_point():
            return memory.fill_(float("nan"))
        return memory.fill_(True if memory.dtype == torch.bool else torch.iinfo(memory.dtype).min)

    return allocate_and_fill


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Memory that a kernel forgets to write reads as NaN, as the lowest integer, or as True."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield
