"""The launches of `first_contact.py` without a GPU: our launchers run on a CPU, and what they would launch is compiled.

    python benchmarks/first_contact_dry.py SOURCE --records FILE      SOURCE: a step, or a file of tests/gpu

Triton is told of a driver whose GPU is an H100 or H200 of the SXM kind (sm_90, 132 multiprocessors, 232,448 bytes of
shared memory a program); tensors are on the CPU, allocated and mostly untouched, and nothing is launched. Each kernel
is compiled into TRITON_CACHE_DIR, under the key that a launch on such a GPU would ask for: a key is made of the source,
the types, the constants, which numbers 16 divides, the options and the compiler; the places of tensors do not enter it
beyond their alignment. FILE gets a line for each kernel, in the order in which they are asked for.

Called by `triton_cache.py`, under the Triton of the GPU machines.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from row_log import RowLog

ROOT = Path(__file__).resolve().parents[1]
SHARED_BYTES, PROCESSORS, L2_BYTES = 232_448, 132, 50 * 2**20
# Steps on single kernels, and steps that train.
KERNEL_STEPS = {
    "threshold": "first_contact_kernels", "blocks": "first_contact_blocks", "grad": "first_contact_kernels",
    "topk": "first_contact_kernels",
}  # fmt: skip
TRAINING_STEPS = {"train_step": "first_contact_train", "decoder": "first_contact_decoder"}
# Elements up to which an operation is worth doing: tables and indices that decide what is launched are small.
SMALL = 2**14


class Properties:
    """Of the GPU that is not there, as `torch.cuda.get_device_properties` gives them."""

    name = "NVIDIA H200"
    multi_processor_count, L2_cache_size = PROCESSORS, L2_BYTES
    shared_memory_per_block, shared_memory_per_block_optin = 49_152, SHARED_BYTES
    total_memory = 140 * 2**30
    major, minor = 9, 0


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class NoArithmetic(TorchDispatchMode):
    """PyTorch's own operations on large tensors are left out: their results are allocated, and writes do not happen.

    A small result, as a norm or a count, is ones.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            # Operators of ours launch kernels, and call PyTorch's beside them: their own code, seen by this mode too.
            own = OPDEFS.get(func._schema.name)
            with self if own is not None else contextlib.nullcontext():
                return (func if own is None else own._init_fn)(*args, **kwargs)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if tensors:
            sizes = [tensor.numel() for tensor in tensors]
        else:
            sizes = [math.prod(args[0]) if args and isinstance(args[0], (list, tuple)) else 0]
        returns = func._schema.returns
        aliases = [each.alias_info for each in returns if each.alias_info is not None]
        on_meta = str(kwargs.get("device")) == "meta" or any(tensor.is_meta for tensor in tensors)
        if on_meta or max(sizes) <= SMALL or any(not alias.is_write for alias in aliases):
            return func(*args, **kwargs)
        if aliases or not returns:
            # It would write to `out`, to its first argument, or to a list of them.
            return kwargs.get("out", args[0]) if len(returns) == 1 else None
        given, options = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        if "device" in options or not tensors:
            options = {**options, "device": "meta"}
        try:
            made = func(*given, **{key: None if key == "generator" else value for key, value in options.items()})
        except (RuntimeError, NotImplementedError):
            # Its shape depends on the values: do it.
            return func(*args, **kwargs)
        return tree_map_only(torch.Tensor, _allocated, made)


def _allocated(meta: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
    return made.fill_(1) if meta.numel() <= SMALL else made


class Idle(torch.optim.Optimizer):
    """An optimizer whose step does nothing but call its hooks."""

    def __init__(self, params: Any, lr: float = 0.0, fused: bool = False) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        return None


def pretend(log: RowLog, source: str) -> None:
    """Let Triton and our launchers see the GPU that is not there; every kernel compiled is a row."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime import driver, jit

    import tritonsparse.kernels
    from tritonsparse.kernels import _tiles, _triton

    driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
    real_run, real_key = jit.JITFunction.run, compiler.get_cache_key
    triton.knobs.nvidia.dump_ptxas_log = True
    missed: list[bool] = []
    triton.knobs.compilation.listener = lambda **facts: missed.append(not facts["cache_hit"])
    asked: list[tuple[str, str]] = []
    seen: set[str] = set()

    def key(src: Any, backend: Any, options: Any, env_vars: Any) -> str:
        whole: str = real_key(src, backend, options, env_vars=env_vars)
        first = triton.runtime.cache.triton_key()
        # The compiler's own part, its hash, is of the library for one version of Python.
        asked.append((whole, whole.removeprefix(first)))
        return whole

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        before, start = len(asked), time.monotonic()
        remarks = io.StringIO()
        try:
            with contextlib.redirect_stdout(remarks):
                kernel = real_run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            log.append(
                {"source": source, "kernel": self.fn.__name__, "failure": f"{type(error).__name__}: {error}"[:500]}
            )
            return None
        for whole, rest in asked[before:]:
            if whole not in seen:
                seen.add(whole)
                row = {"source": source, "kernel": self.fn.__name__, "hash": kernel.hash, "rest": rest}
                row |= {
                    "compiled": missed[-1],
                    "shared": kernel.metadata.shared,
                    # Whether ptxas makes each matrix instruction wait for the one before.
                    "serialized": "instructions are serialized" in remarks.getvalue(),
                    "seconds": round(time.monotonic() - start, 3),
                }
                log.append(row)
        return kernel

    jit.JITFunction.run, compiler.get_cache_key = run, key
    limits = _tiles.Limits(SHARED_BYTES, PROCESSORS)
    package = Path(tritonsparse.kernels.__path__[0])
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        module: Any = importlib.import_module(".".join(("tritonsparse.kernels", *parts)))
        if hasattr(module, "require"):
            module.require = lambda *_: None
        if hasattr(module, "limits_of"):
            module.limits_of = lambda _: limits
    # Kernels took their own copy of this flag as they were imported: here it only lets layers ask for a back end.
    _triton.INTERPRETED = True
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda *_: Properties()
    cuda.get_device_name = lambda *_: Properties.name
    cuda.current_device = lambda: 0
    cuda.is_current_stream_capturing = lambda: False


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """Tensors say that they are on a GPU: layers then choose what they would choose there."""
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda self: True)
    try:
        yield
    finally:
        del tensor.is_cuda


def launch_kernels(step: str) -> None:
    from first_contact_timing import Settings

    Settings.empty = True
    for case in importlib.import_module(KERNEL_STEPS[step]).CASES[step](False):
        for provider in case.providers():
            if provider.ours:
                with NoArithmetic():
                    provider.calls[0]()


def launch_training(step: str) -> None:
    module: Any = importlib.import_module(TRAINING_STEPS[step])
    module.compile_layers = lambda *_: None
    module.torch.optim.AdamW = Idle
    for variant in module.variants(False):
        if variant.name != "dense":
            with NoArithmetic(), on_gpu():
                trained = variant.make(False)
                # The second one finds the views that the first one's hooks wrote.
                trained.step()
                trained.step()


def launch_tests(path: str) -> None:
    """The GPU tests of a file, each as far as it gets: results are wrong, so most end at their first comparison."""
    import pytest

    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.get_device_capability = lambda *_: (Properties.major, Properties.minor)
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    # Tests ask for "cuda" by name.
    for name in ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "tensor", "arange", "randperm"):
        setattr(torch, name, functools.partial(_on_cpu, getattr(torch, name)))
    torch_: Any = torch
    torch_.Generator = type("Generator", (torch.Generator,), {"__new__": lambda cls, device=None: _generator(cls)})
    torch_.Tensor.to = functools.partialmethod(_moved, torch.Tensor.to)
    torch_.Tensor.cuda = torch_.nn.Module.cuda = lambda self, *_, **__: self
    fixed = ["-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    with NoArithmetic(), on_gpu():
        pytest.main([*fixed, "-c", str(ROOT / "pyproject.toml"), "-m", "gpu", path])


def _on_cpu(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return make(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})


def _generator(cls: Any, base: Any = torch.Generator) -> Any:
    return base.__new__(cls)


def _moved(self: Any, move: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    args = tuple("cpu" if each == "cuda" else each for each in args)
    return move(self, *args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--records", type=Path, required=True)
    args = parser.parse_args(argv)
    pretend(RowLog(args.records), args.source)
    if args.source in KERNEL_STEPS:
        launch_kernels(args.source)
    elif args.source in TRAINING_STEPS:
        launch_training(args.source)
    else:
        launch_tests(args.source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
