"""Where a run is and what it costs: devices that are not there are refused, stages are timed, memory is of the run."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.accuracy import machine
from bench.accuracy.machine import Seconds, check_device, machine_name, peak_memory_mb, source_digest

ROOT = Path(__file__).parents[1]


def test_devices():
    check_device("cpu")
    with pytest.raises(ValueError, match="device='meta': runs are on cpu or cuda"):
        check_device("meta")
    instructions = torch.backends.cpu.get_cpu_capability()
    assert machine_name("cpu").endswith(f" {instructions}, {torch.get_num_threads()} threads")


def test_sources_are_told_apart(tmp_path, monkeypatch):
    """By contents and names of what is run; other files do not count."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "cobra" / "cli").mkdir(parents=True)
    path = tmp_path / "cobra" / "cli" / "a.py"
    found = []
    for text in ("x = 1", "x = 2", "x = 1"):
        path.write_text(text)
        found.append(source_digest.__wrapped__())
    (tmp_path / "README.md").write_text("words")
    assert source_digest.__wrapped__() == found[0] == found[2] != found[1] and len(found[0]) == 12
    path.rename(path.with_name("b.py"))
    assert source_digest.__wrapped__() != found[0]


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
