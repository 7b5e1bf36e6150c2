"""Timing of alternatives on a CUDA device, by its own clock."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cobra.timing import Comparison, Timing

CACHE = 2**28  # bytes: more than the L2 cache of any device


def compare_on_cuda(
    work: str, yardstick: str, alternatives: dict[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> Comparison:
    """Runs every alternative once a round, with a cold L2 cache; short launches hide behind the write that empties it."""
    for run in alternatives.values():
        for _ in range(warmup):
            run()
    cache = torch.empty(CACHE, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cache.zero_()
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    timings = (Timing(n, tuple(start.elapsed_time(end) / 1e3 for start, end in pairs)) for n, pairs in events.items())
    return Comparison(work, yardstick, tuple(timings))
