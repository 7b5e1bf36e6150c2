"""python -m bench [NAME ...]: runs the benchmarks, or those named, and writes their rows to bench/results/<device>.json."""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

import cobra

HERE = Path(__file__).parent


def main(names: list[str]) -> None:
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    unknown = set(names) - set(known)
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    rows = []
    for name in names or known:
        torch.manual_seed(0)
        for comparison in import_module(f"bench.bench_{name}").run():
            rows += [{"benchmark": name, **row} for row in comparison.rows()]
            print(comparison.work)
            for row in comparison.rows():
                spread = f"[{row['ratio_low']:.3g}, {row['ratio_high']:.3g}]"
                print(f"  {row['name']:<44} {row['seconds'] * 1e3:10.3f} ms  {row['ratio']:8.3f}x {spread}")
    device = f"cpu-{torch.get_num_threads()}-threads"  # every workload of this release runs on the CPU
    out = HERE / "results" / f"{device}.json"
    if names and out.is_file():
        rows = [row for row in json.loads(out.read_text())["rows"] if row["benchmark"] not in names] + rows
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cobra": cobra.__version__,
        "rows": sorted(rows, key=lambda row: row["benchmark"]),
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {out.relative_to(HERE.parent)}")


main(sys.argv[1:])
