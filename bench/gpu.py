"""python -m bench.gpu: what only a CUDA device can tell, in one run of at most nine minutes that needs no network.

Builds the C++ extension, runs the tests for a device, sweeps the candidate tiles of the Triton kernels, times single layers of
LLaMA-7B, and writes bench/results/<device>/: environment.json, tests.json, configs.json (the tuned table) and
gated_lora_linear.json.
Each part has its share of the time, and says what it left out. The exit status is 1 where a test or a validation failed.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TESTS_END, SWEEP_END, LAYERS_END = 210, 360, 510  # seconds from the start
NEEDED = ("triton", "pytest", "numpy", "safetensors", "peft", "transformers")


def main() -> int:
    start = time.monotonic()
    _refuse_without_device()
    folder = ROOT / "bench" / "results" / torch.cuda.get_device_name().lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "environment.json", environment() | {"extension": build()})
    tests = run_tests(start + TESTS_END)
    _write(folder / "tests.json", tests)
    print(tests["output"][-1] if tests["output"] else tests["status"])

    from bench.sweep_gated_lora_linear import fastest, sweep

    rows = sweep(start + SWEEP_END)
    _write(folder / "configs.json", {"fastest": fastest(rows), "candidates": rows})
    layers = time_layers(start + LAYERS_END)
    _write(folder / "gated_lora_linear.json", layers)
    print(f"written to {folder} after {time.monotonic() - start:.0f} s; {len(layers['left_out'])} layers had no time")
    return int(tests["status"] != "passed" or bool(layers["failed"]))


def _refuse_without_device() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"make gpu needs {', '.join(missing)}, which this Python lacks: {sys.executable}; name another with PYTHON=…")
    if not torch.cuda.is_available():
        sys.exit(f"make gpu needs a CUDA device, and torch {torch.__version__} sees none; `make bench` is for the CPU")


def environment() -> dict:
    import triton

    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def build() -> str:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    return "built" if done.returncode == 0 else done.stderr[-500:]


def run_tests(deadline: float) -> dict:
    """The files of tests that are for a device alone, so that nothing else is imported."""
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_*_gpu.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=deadline - time.monotonic())
    except subprocess.TimeoutExpired as expired:
        return {"status": "out of time", "output": (expired.stdout or b"").decode().splitlines()[-40:]}
    return {"status": "failed" if done.returncode else "passed", "output": done.stdout.splitlines()[-40:]}


def time_layers(deadline: float) -> dict:
    from bench.bench_gated_lora_linear import cuda_cases, run_on_cuda

    rows, failed, left_out = [], {}, []
    for case in cuda_cases():
        if time.monotonic() > deadline:
            left_out.append(str(case))
            continue
        try:
            comparisons = run_on_cuda(case)
        except Exception as error:  # one layer's failure is a finding, and the others are still worth their time
            failed[str(case)] = f"{type(error).__name__}: {error}"[:500]
            continue
        for comparison in comparisons:
            rows += comparison.rows()
            print(comparison.work, *(f"{row['name']} {row['ratio']:.3f}x" for row in comparison.rows()), sep="; ", flush=True)
    return {"rows": rows, "failed": failed, "left_out": left_out}


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
