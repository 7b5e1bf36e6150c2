"""python -m bench.gpu: what only a CUDA device can tell, in one run of at most nine minutes that needs no network.

Builds what is compiled, then runs in turn what it finds by name: the tests of devices (tests/test_*_gpu.py), those of CUDA
kernels once more under compute-sanitizer, the sweeps of candidate tiles (bench/sweep_*.py) and the cases for a device
(`run_on_cuda` in bench/*.py). Each is a process of its own with its share of the time, so that what fails or hangs takes
nothing else along. The records are bench/results/<device>/*.json, and configs.json there is the tuned table. A second run goes
on where the first one stopped. The exit status is 1 where something failed or had no time.

--device cpu: a dry run on a machine without a GPU; what needs one says so and is skipped
--fresh: runs everything again, also what has passed on this very code
--seconds N: another limit than 510
--only TEXT: the parts whose name has it
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.gpu_part import write_json

ROOT = Path(__file__).parents[1]
LIMIT = 510  # seconds
NEEDED = ("torch", "triton", "pytest", "numpy", "safetensors", "setuptools")
SOURCES = ("cobra_kernels/*.py", "csrc/*", "bench/*.py", "tests/*_gpu.py", "setup.py")
ENDS = {"build": 0.18, "tests": 0.45, "sanitizer": 0.51, "sweep": 0.73, "benchmark": 1.0}  # shares of the limit


@dataclass(frozen=True)
class Part:
    """A process with its own record.

    kind: one of ENDS
    command: without the record's path and the seconds, which the runner's own children take as their last arguments
    """

    kind: str
    name: str
    command: tuple[str, ...]
    measures: bool = False

    @property
    def record(self) -> str:
        return f"{self.kind}-{self.name}.json"


def main(arguments: list[str], root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser("bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--seconds", type=float, default=LIMIT)
    parser.add_argument("--only", default="")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    facts = environment(options.device)
    folder = root / "bench" / "results" / facts["device"].lower().replace(" ", "-")
    write_json(folder / "environment.json", facts)
    code = code_of(root, facts)
    states = {}
    chosen = [part for part in parts(root, options.device) if options.only in f"{part.kind}-{part.name}"]
    for i, part in enumerate(chosen):
        rest = sum(other.kind == part.kind for other in chosen[i:])
        end = start + ENDS[part.kind] * options.seconds
        states[part.record] = run(part, folder, code, max(5.0, (end - time.monotonic()) / rest), root, options.fresh)
        print(f"{part.kind:<10} {part.name:<32} {states[part.record]}", flush=True)
    write_json(folder / "configs.json", tuned(folder))
    bad = [name for name, state in states.items() if state not in ("passed", "skipped")]
    print(f"{len(states) - len(bad)} of {len(states)} parts done, {time.monotonic() - start:.0f} s, written to {folder}")
    return int(bool(bad))


def environment(device: str) -> dict:
    """Facts of the machine. Exits where it cannot do what is asked for."""
    missing = [name for name in NEEDED if find_spec(name) is None and not (device == "cpu" and name == "triton")]
    if missing:
        sys.exit(f"make gpu needs {', '.join(missing)}, which this Python lacks: {sys.executable}; name another with PYTHON=…")
    import torch

    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "device": "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cpu":
        return facts
    if not torch.cuda.is_available():
        sys.exit(f"make gpu needs a CUDA device, and torch {torch.__version__} sees none; --device cpu is a dry run")
    import triton

    return facts | {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def code_of(root: Path, facts: dict) -> str:
    """Of what a record tells: the sources and the versions below them."""
    found = hashlib.sha256(json.dumps([facts[k] for k in sorted(facts) if k != "date"]).encode())
    for path in sorted(path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def parts(root: Path, device: str) -> Iterator[Part]:
    """In the order to run them, the files of each kind by name."""
    if (root / "setup.py").is_file():
        yield Part("build", "extensions", (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"))
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")
    tests = [path for path in sorted(root.glob("tests/test_*_gpu.py")) if "pytest.mark.gpu" in path.read_text()]
    for path in tests:
        yield Part("tests", path.stem.removeprefix("test_").removesuffix("_gpu"), (*pytest, str(path)))
    sanitizer = shutil.which("compute-sanitizer")
    checked = [str(path) for path in tests if '"cuda"' in path.read_text()]
    if sanitizer and checked and device == "cuda":
        command = (sanitizer, "--error-exitcode", "9", *pytest, "-k", "cuda and not triton", *checked)
        yield Part("sanitizer", "cuda-kernels", command)
    child = (sys.executable, "-m", "bench.gpu_part", device)
    for path in sorted(root.glob("bench/sweep_*.py")):
        yield Part("sweep", path.stem.removeprefix("sweep_"), (*child, str(path)), measures=True)
    for path in sorted(root.glob("bench/*.py")):
        if "\ndef run_on_cuda(" in path.read_text():
            yield Part("benchmark", path.stem.removeprefix("cuda_"), (*child, str(path)), measures=True)


def run(part: Part, folder: Path, code: str, seconds: float, root: Path, fresh: bool) -> str:
    """Runs a part, or finds that it has passed on this code, and returns its state."""
    path = folder / part.record
    record = {} if fresh or not path.is_file() else json.loads(path.read_text())
    if record.get("code") == code and record["state"] in ("passed", "skipped"):
        return record["state"]
    if part.measures:
        known = record if record.get("code") == code else {"code": code, "rows": []}
        write_json(path, known | {"state": "stopped"})
    start = time.monotonic()
    last = (str(path), str(max(1.0, seconds - 3))) if part.measures else ()
    status, output = _finish([*part.command, *last], seconds, root)
    state = "out of time" if status is None else _state(part, status)
    record = json.loads(path.read_text()) if part.measures else {"code": code}
    if not part.measures or state != "passed":
        record["state"] = state
    record |= {"status": status, "seconds": round(time.monotonic() - start, 1), "output": output.splitlines()[-40:]}
    write_json(path, record)
    return record["state"]


def _state(part: Part, status: int) -> str:
    if part.kind in ("tests", "sanitizer") and status == 5:  # pytest found no test that is for a device
        return "skipped"
    return "passed" if status == 0 else "failed"


def _finish(command: list[str], seconds: float, root: Path) -> tuple[int | None, str]:
    """Exit status, None after the time, and what was printed; no child of the process is left."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(ROOT)))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=root, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def tuned(folder: Path) -> dict:
    """The fastest candidates of every sweep, by operation."""
    records = {path: json.loads(path.read_text()) for path in sorted(folder.glob("sweep-*.json"))}
    return {path.stem.removeprefix("sweep-"): record.get("fastest", []) for path, record in records.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
