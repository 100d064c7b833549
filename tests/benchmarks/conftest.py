import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if str(BENCHMARKS) not in sys.path:  # scripts there import each other by plain name
    sys.path.insert(0, str(BENCHMARKS))
