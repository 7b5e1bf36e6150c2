"""Timing of alternatives in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one alternative over the rounds."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Alternatives timed together; `ratio` compares round by round, which a slow moment does not spoil.

    amount, unit: what the work moves or computes at least, in "B" or "FLOP", the same for all; 0 where that is not counted
    """

    work: str
    yardstick: str
    timings: tuple[Timing, ...]
    amount: float = 0.0
    unit: str = ""

    def ratios(self, name: str) -> list[float]:
        by_name = {t.name: t.seconds for t in self.timings}
        return [a / b for a, b in zip(by_name[name], by_name[self.yardstick], strict=True)]

    def rows(self) -> list[dict]:
        """One row an alternative: median, its ratio to the yardstick with the range over rounds, rate of what is counted."""
        rows = []
        for timing in self.timings:
            ratios = self.ratios(timing.name)
            rows.append(
                {
                    "work": self.work,
                    "name": timing.name,
                    "seconds": timing.median,
                    "yardstick": self.yardstick,
                    "ratio": statistics.median(ratios),
                    "ratio_low": min(ratios),
                    "ratio_high": max(ratios),
                    "rounds": len(ratios),
                    **({"rate": self.amount / timing.median, "unit": f"{self.unit}/s"} if self.amount else {}),
                }
            )
        return rows


def compare(
    work: str,
    yardstick: str,
    alternatives: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    amount: float = 0.0,
    unit: str = "",
) -> Comparison:
    """Runs every alternative once a round. amount, unit: as in `Comparison`."""
    for run in alternatives.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return Comparison(work, yardstick, tuple(Timing(n, tuple(s)) for n, s in seconds.items()), amount, unit)
