"""The benchmark of peak memory: a sweep holds no more than 1.2 times what a training step on as many rows does."""

import subprocess
import sys
from pathlib import Path

import pytest

import bench.memory as memory


@pytest.mark.slow
def test_a_sweep_takes_the_memory_of_a_training_step():
    cases = "training step, every weight", "sweep, estimator='paper'"
    peaks = []
    for case in cases:
        command = [sys.executable, "-W", "ignore", "-m", "bench.memory", case]
        found = subprocess.run(command, capture_output=True, text=True, cwd=Path(memory.__file__).parents[1])
        assert found.returncode == 0, found.stderr
        peaks.append(int(found.stdout.splitlines()[-1]))
    assert 100 < peaks[1] < 1.2 * peaks[0]
