"""python -m bench.gpu_part DEVICE FILE RECORD SECONDS: a sweep or the cases of a benchmark, written down as they come.

A record that is there already, of a run that was stopped, is gone on with. `python -m bench.gpu` runs these.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

NEEDS_DEVICE = "needs a CUDA device"


def main(device: str, file: str, record: str, seconds: str) -> int:
    module, path, deadline = load(Path(file)), Path(record), time.monotonic() + float(seconds)
    known = json.loads(path.read_text())
    if device == "cpu" and getattr(module, "NEEDS_CUDA", False):
        write_json(path, known | {"state": "skipped", "reason": NEEDS_DEVICE})
        return 0
    found = sweep(module, known, deadline) if hasattr(module, "sweep") else measure(module, known, path, deadline)
    write_json(path, known | found)
    return int(found["state"] != "passed")


def write_json(path: Path, value: dict) -> None:
    """Whole or not at all, whenever the process is ended; without torch, which a part may not need."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def load(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module of their annotations
    spec.loader.exec_module(module)
    return module


def sweep(module: ModuleType, known: dict, deadline: float) -> dict:
    rows = module.sweep(deadline, known["rows"])
    state = "out of time" if time.monotonic() > deadline else "passed" if rows else "failed"
    return {"state": state, "fastest": module.fastest(rows), "rows": rows}


def measure(module: ModuleType, known: dict, path: Path, deadline: float) -> dict:
    """A case that fails is a finding, and the others are still worth their time."""
    found = {"rows": list(known["rows"]), "done": list(known.get("done", [])), "failed": {}, "left_out": []}
    for case in module.cuda_cases():
        name = str(case)
        if name in found["done"]:
            continue
        if time.monotonic() > deadline:
            found["left_out"].append(name)
            continue
        try:
            comparisons = module.run_on_cuda(case)
        except Exception as error:
            found["failed"][name] = f"{type(error).__name__}: {error}"[:500]
            continue
        found["rows"] += [row for comparison in comparisons for row in comparison.rows()]
        found["done"].append(name)
        write_json(path, known | found | {"state": "stopped"})
    state = "failed" if found["failed"] else "out of time" if found["left_out"] else "passed"
    return found | {"state": state}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
