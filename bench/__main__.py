"""python -m bench [NAME ...]: runs the benchmarks, or those named, and writes their rows to bench/results/<device>.json.

--rounds N: fewer or more rounds than usual, e.g. 1 to see whether a benchmark runs
--out FILE: another file; rows of other benchmarks that it has stay
--table: runs nothing, and prints the rows of the file, or those of the benchmarks named, as README.md has them
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

import cobra

HERE = Path(__file__).parent
KNOWN = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(KNOWN))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(KNOWN)
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(KNOWN)}")
    device = f"cpu-{torch.get_num_threads()}-threads"  # every workload of this release runs on the CPU
    out = options.out or HERE / "results" / f"{device}.json"
    if options.table and not out.is_file():
        sys.exit(f"{out}: no such file; run the benchmarks first, or name another with --out")
    if options.table:
        print(table(row for row in json.loads(out.read_text())["rows"] if row["benchmark"] in (options.names or KNOWN)))
        return
    rows = measure(options.names or KNOWN, options.rounds)
    if options.names and out.is_file():
        rows = [row for row in json.loads(out.read_text())["rows"] if row["benchmark"] not in options.names] + rows
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
    print(f"written to {out}")


def measure(names: list[str], rounds: int | None) -> list[dict]:
    """Runs benchmarks and prints their rows as they come."""
    rows = []
    for name in names:
        torch.manual_seed(0)
        run = import_module(f"bench.bench_{name}").run
        chosen = {"rounds": rounds} if rounds and "rounds" in inspect.signature(run).parameters else {}
        for comparison in run(**chosen):
            rows += [{"benchmark": name, **row} for row in comparison.rows()]
            print(comparison.work)
            for row in comparison.rows():
                spread = f"[{row['ratio_low']:.3g}, {row['ratio_high']:.3g}]"
                print(f"  {row['name']:<44} {row['seconds'] * 1e3:10.3f} ms  {row['ratio']:8.3f}x {spread}")
    return rows


def table(rows) -> str:
    """Rows in Markdown, the work named once."""
    lines, work = ["| work | | time | rate | ratio | range | rounds |", "| --- | --- | --- | --- | --- | --- | --- |"], None
    for row in rows:
        shown = "" if row["work"] == work else row["work"]
        work = row["work"]
        seconds = row["seconds"]
        duration = f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.0f} µs"
        ratio, low, high = (shown_ratio(row[key]) for key in ("ratio", "ratio_low", "ratio_high"))
        cells = shown, row["name"], duration, shown_rate(row), ratio, f"{low} to {high}", str(row["rounds"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown_rate(row: dict) -> str:
    """Of work that is counted, in billions."""
    return f"{row['rate'] / 1e9:,.1f} G{row['unit']}" if "rate" in row else ""


def shown_ratio(ratio: float) -> str:
    """Two decimals, or two digits where these would say little."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


if __name__ == "__main__":
    main(sys.argv[1:])
