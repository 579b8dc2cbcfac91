"""`method_runs`, the models and loops that tests of methods share, can be imported."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
