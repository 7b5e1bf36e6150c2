"""What a run costs on the machine it is on, of the process on a CPU and of the device on a GPU; and by which code."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SOURCES = ("cobra/**/*.py", "cobra_kernels/*.py", "csrc/*", "bench/accuracy/*.py")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Seconds:
    """By stage; on a GPU its work is waited for."""

    device: str = "cpu"
    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        _wait(self.device)
        start = time.perf_counter()
        yield
        _wait(self.device)
        self.spent[stage] = round(time.perf_counter() - start, 2)


def check_device(device: str) -> None:
    """Raises ValueError for another device than the CPU or a CUDA device that is there."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: runs are on cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch {torch.__version__} finds no CUDA device here; use cpu")


def machine_name(device: str) -> str:
    """The GPU, or the processor's kind and widest instructions, and the number of threads: seconds of others do not compare."""
    if _is_gpu(device):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@cache
def source_digest() -> str:
    """12 hex digits of the sources that a run depends on: rows of one digest are of the same code."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def forget_peak_memory(device: str) -> None:
    """What ran in this process before does not count."""
    if _is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")


def peak_memory_mb(device: str) -> int | None:
    """Since `forget_peak_memory`; None where the system does not say."""
    if _is_gpu(device):
        return torch.cuda.max_memory_allocated(device) >> 20
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), None)


def _is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _wait(device: str) -> None:
    if _is_gpu(device):
        torch.cuda.synchronize(device)
