"""Memory does not follow the size of a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "scripts/bench/convert_memory.py"


def test_peak_memory_is_far_below_the_checkpoint(tmp_path):
    """The full measurement, 4.4 GB against the largest block plus 1 GiB, is the benchmark's default."""
    command = [sys.executable, BENCHMARK, "--folder", tmp_path, "--gigabytes", "0.7"]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert measured["within_limit"]
    assert measured["written_bytes"] >= measured["source_bytes"] > 650e6
    assert measured["peak_bytes"] - measured["imports_bytes"] < 300e6
    assert not list(tmp_path.iterdir())
