"""How a training program ends: finished, refused, failed or stopped; one line on stderr, and an exit status.

0     finished
1     training ended: a full disk, a loss that is not finite, data or memory that gave out
2     refused before the first step; nothing was written
130   Ctrl-C
143   SIGTERM
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tritonsparse.eval.command_line import MENDABLE, Parser, Stopped, say, stoppable

from . import arguments, checkpoints

__all__ = ["run_program", "saved"]

# What ends a training without being a fault of this package: data, disk, memory, a loss that is not finite.
_ENDS = (ValueError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError, SafetensorError)


class _AfterTraining(Exception):
    """Something failed when the weights were saved already."""


def run_program(
    parser: Parser,
    prepare: Callable[[argparse.Namespace], Any],
    finish: Callable[[Any], None],
    argv: Sequence[str] | None,
) -> int:
    """A program's exit status; what is not 0 is one line on stderr, which says what is whole.

    prepare: arguments -> an object with a `loop`, which `finish` gets after the training.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "transformers", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    trained: Path | None = None
    try:
        with stoppable():
            try:
                args = arguments.parse(parser, sys.argv[1:] if argv is None else argv)
                run = prepare(args)
            except MENDABLE as error:
                say(error)
                return 2
            trained = Path(args.output_dir)
            try:
                run.loop.run()
                finish(run)
            except (*_ENDS, _AfterTraining) as error:
                say(error)
                return 1
    except (KeyboardInterrupt, Stopped) as stop:
        by, status = ("Ctrl-C", 130) if isinstance(stop, KeyboardInterrupt) else ("SIGTERM", 143)
        left = str(stop) or ("before the first step" if trained is None else checkpoints.whole(trained))
        say(f"{parser.program}: stopped by {by}; {left}")
        return status
    return 0


@contextlib.contextmanager
def saved(output_dir: Path) -> Iterator[None]:
    """Around what follows when the trained weights are saved: what fails or is stopped says where they lie."""
    where = f"the trained weights are saved in {output_dir}"
    try:
        yield
    except Exception as error:
        if os.environ.get("TRITONSPARSE_TRACEBACK"):
            raise
        raise _AfterTraining(f"{str(error) or type(error).__name__}; {where}") from error
    except (KeyboardInterrupt, Stopped) as stop:
        raise type(stop)(where) from stop
