"""`cases`, the bounds of the GPU tests and the programs of `benchmarks` can be imported."""

import sys
from pathlib import Path

# At the end of the path: the folders' modules have names of their own.
sys.path += [str(Path(__file__).parents[2] / each) for each in ("tests/kernels", "tests/gpu", "benchmarks")]
