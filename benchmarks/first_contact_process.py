"""The process of one step of `first_contact.py`, as its parent sees it: started early, told when, watched, ended.

A child is a session of its own, so that what it starts ends with it and nothing else does. It is ended at its limit, or
where one case takes longer than the child itself said it may.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# About when the program began.
START = time.monotonic()
# Seconds before a step's limit at which it stops beginning cases.
GRACE = 3.0
# Lines of a child's output that are kept for the row of a step that did not end well.
TAIL = 40
# The exit status of a child that finds no GPU.
NO_GPU = 4


@dataclass(frozen=True)
class Ended:
    """How a step ended.

    Attributes:
        state: "done", "failed" (an exception, before or between cases), "crashed" (the process, or the GPU), "hung" (a
            case or the step took too long, and was ended) or "no GPU".
        case: the one during which it crashed or hung, "" where there was none.
        facts: for `run.jsonl`.
    """

    state: str
    case: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class Child:
    """A process that runs one step; see `first_contact_child.py` for what it prints."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=dict(variables), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self._over = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None  # PIPE
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def run(self, limit: float) -> Ended:
        """Let it run until it ends, or until `limit` of `time.monotonic`."""
        assert self.process.stdin is not None  # PIPE
        # One that has ended already shows below.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"go {limit - GRACE}\n")
            self.process.stdin.flush()
        case, case_limit, facts = "", limit, dict[str, Any]()
        while True:
            until = min(limit, case_limit)
            try:
                line = self._lines.get(timeout=max(0.0, min(until - time.monotonic(), 1.0)))
            except queue.Empty:
                if time.monotonic() < until:
                    continue
                self.end()
                return Ended("hung", case, facts | {"output": self._output()})
            if line is None:
                break
            word, _, rest = line.partition(" ")
            if word == "@case":
                seconds, _, case = rest.partition(" ")
                case_limit = time.monotonic() + float(seconds)
            elif word == "@over":
                case, case_limit = "", limit
            elif word == "@kernels":
                facts["kernels_cached"], facts["kernels_compiled"] = map(int, rest.split())
            elif word != "@ready":
                print(f"  {line}", flush=True)
                self._tail.append(line)
        status = self.process.wait()
        # What the child started and left behind.
        self.end()
        if status in (0, NO_GPU):
            return Ended("done" if status == 0 else "no GPU", facts=facts)
        facts |= {"status": status, "output": self._output()}
        # A Python exception outside of a case ends with status 1: starting again would meet it again.
        return Ended("failed", facts=facts) if status == 1 else Ended("crashed", case, facts)

    def _output(self) -> str:
        return "\n".join(self._tail)[-2000:]

    def end(self) -> None:
        """End the process and what it started; once, for its number may then be another's."""
        if self._over:
            return
        self._over = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
