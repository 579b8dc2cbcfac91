"""The package's names are imported when they are asked for, and a kernel's import brings in nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

SNIPPETS = {
    "a kernel imports neither transformers nor the layers": """
import sys
import tritonsparse.kernels.weight.op
found = [name for name in sys.modules if name.split(".")[0] in ("transformers", "accelerate", "peft")]
found += [name for name in sys.modules if name.startswith(("tritonsparse.layers", "tritonsparse.methods"))]
found += [name for name in ("tritonsparse.api", "tritonsparse.sparsifier") if name in sys.modules]
assert found == [], found
""",
    "every public name is there when it is asked for, and listed before": """
import sys
import tritonsparse as ts
assert "sparsify" in dir(ts) and set(ts.__all__) <= set(dir(ts))
assert "sparsify" not in vars(ts) and "tritonsparse.api" not in sys.modules
found = {name: getattr(ts, name) for name in ts.__all__}
assert all(getattr(ts, name) is value for name, value in found.items())
assert {name for name, value in found.items() if type(value).__name__ == "module"} == {
    "flops", "methods", "pattern", "schedules"
}
assert found["sparsify"].__module__ == found["load"].__module__ == "tritonsparse.api"
try:
    ts.sparsfy
except AttributeError as error:
    assert "module 'tritonsparse' has no attribute 'sparsfy'" in str(error)
else:
    raise AssertionError("a wrong name was found")
""",
    "sparsify is the function whatever was imported first": """
import tritonsparse.api
import tritonsparse.sparsifier
import tritonsparse as ts
assert ts.sparsify is tritonsparse.api.sparsify and callable(ts.sparsify)
assert ts.Sparsifier is tritonsparse.sparsifier.Sparsifier
from tritonsparse import sparsify
assert sparsify is ts.sparsify
""",
    "the callback waits until it is asked for": """
import sys
import tritonsparse as ts
ts.sparsify
assert "tritonsparse.callback" not in sys.modules and "transformers.trainer" not in sys.modules
ts.SparsityCallback
assert "tritonsparse.callback" in sys.modules
""",
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_in_a_process_of_its_own(name: str) -> None:
    run = subprocess.run([sys.executable, "-c", SNIPPETS[name]], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
