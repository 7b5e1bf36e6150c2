"""python -m bench.memory: peak memory of one conductance sweep beside a training step on as many rows, each in its own process.

MiniLM in fp32 on the CPU, one example of 64 tokens at the ends and 50 points of its path, so 52 rows at once, without dropout.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from bench.accuracy.machine import STATUS, forget_peak_memory, peak_memory_mb
from bench.workload import batch, forward_backward, minilm
from cobra.batch import Batch
from cobra.conductance import attribute
from cobra.entry import find_entry
from cobra.objective import default_target
from cobra.path import path_rule
from cobra.sites import find_sites
from cobra.watch import frozen

TOKENS, POINTS = 64, 50


def sweep(estimator: str) -> Callable[[], None]:
    model, whole = minilm(), Batch(batch(1, TOKENS), 1)
    sites, rule = find_sites(model), path_rule(estimator, "midpoint", POINTS)

    def run() -> None:
        with frozen(model):
            entry = find_entry(model, whole)
            attribute(model, sites, entry, whole, rule, partial(default_target, model), max_rows=POINTS + 2)

    return run


def step(lora: bool) -> Callable[[], None]:
    model = minilm()
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    return forward_backward(model, batch(POINTS + 2, TOKENS))


CASES: dict[str, Callable[[], Callable[[], None]]] = {
    "training step, LoRA r=8 (peft)": partial(step, True),
    "training step, every weight": partial(step, False),
    **{f"sweep, estimator={name!r}": partial(sweep, name) for name in ("paper", "conductance", "direct")},
}


def measure(case: str) -> int:
    """MB above what the process held before, model and inputs included."""
    torch.set_num_threads(1)
    run = CASES[case]()
    before = next(int(line.split()[1]) >> 10 for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    forget_peak_memory("cpu")
    run()
    return peak_memory_mb("cpu") - before


def main(arguments: list[str]) -> None:
    if arguments:
        print(measure(arguments[0]))
        return
    first = None
    print("| work | peak MB | ratio |\n| --- | --- | --- |")
    for case in CASES:
        command = [sys.executable, "-W", "ignore", "-m", "bench.memory", case]
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        peak = int(found.stdout.splitlines()[-1])
        first = first or peak
        print(f"| {case} | {peak} | {peak / first:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
