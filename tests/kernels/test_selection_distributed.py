"""Tensors on two and on three ranks, ranked together: every rank finds what one process finds of all of them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path


def test_every_rank_finds_the_cutoff_and_its_part_of_the_masks_of_one_stable_sort() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "1"}
    worker = Path(__file__).with_name("selection_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", str(worker)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    # Of each back end: 16 cut-offs and 2 refusals on each of three ranks, then on two of them.
    backends = 1 + (importlib.util.find_spec("triton") is not None)
    assert run.stdout.count("checked 18\n") == backends * (3 + 2)
