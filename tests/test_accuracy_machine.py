"""Where a run is and what it costs: devices that are not there are refused, stages are timed, memory is of the run."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.accuracy.machine import Seconds, check_device, machine_name, peak_memory_mb

ROOT = Path(__file__).parents[1]


def test_devices():
    check_device("cpu")
    with pytest.raises(ValueError, match="device='meta': runs are on cpu or cuda"):
        check_device("meta")
    instructions = torch.backends.cpu.get_cpu_capability()
    assert machine_name("cpu").endswith(f" {instructions}, {torch.get_num_threads()} threads")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_missing_gpu_is_named():
    with pytest.raises(ValueError, match=r"device='cuda': torch .* finds no CUDA device here; use cpu"):
        check_device("cuda")


def test_stages_are_timed():
    seconds = Seconds()
    with seconds.of("train"):
        time.sleep(0.03)
    assert 0.03 <= seconds.spent["train"] < 3


MEMORY = """
import torch
from bench.accuracy.machine import forget_peak_memory, peak_memory_mb
held = torch.ones(50 << 18)  # 50 MB
del held
forget_peak_memory("cpu")
before = peak_memory_mb("cpu")
held = torch.ones(100 << 18)
print(peak_memory_mb("cpu") - before)
"""


def test_memory_of_before_is_forgotten():
    """In a process of its own: in one that has run much, what is asked for may lie in memory that it still holds."""
    if peak_memory_mb("cpu") is None:
        pytest.skip("the system does not say")
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 90 <= int(done.stdout) <= 130
