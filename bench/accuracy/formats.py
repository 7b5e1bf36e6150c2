"""How the tables write numbers, and Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from bench.accuracy.intervals import Estimate

EMPTY, MISSING = "No rows yet.", "–"
FEWEST_SEEDS = 3


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; `EMPTY` without rows."""
    lines = [_line(row) for row in rows]
    return "\n".join([_line(header), f"|{' --- |' * len(header)}", *lines]) if lines else EMPTY


def percent(found: Estimate | None) -> str:
    """Of a fraction: mean ± half of the interval."""
    return MISSING if found is None else spread(f"{100 * found.mean:.1f}", 100 * found.half, ".1f")


def points(found: Estimate | None) -> str:
    """Of a difference of fractions, with its sign."""
    return MISSING if found is None else spread(f"{100 * found.mean:+.2f}", 100 * found.half, ".2f")


def number(found: Estimate | None) -> str:
    """With as many decimals as give the mean three digits."""
    if found is None:
        return MISSING
    places = max(0, 2 - math.floor(math.log10(abs(found.mean)))) if found.mean else 3
    return spread(f"{found.mean:.{places}f}", found.half, f".{places}f")


def spread(mean: str, half: float, spec: str) -> str:
    """Without ± where one seed leaves no interval."""
    return mean if math.isnan(half) else f"{mean} ± {half:{spec}}"


def interval(found: Estimate, unit: str) -> str:
    return MISSING if math.isnan(found.low) else f"{100 * found.low:+.2f} to {100 * found.high:+.2f}{unit}"


def p_value(value: float) -> str:
    if math.isnan(value):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def plain(value: float | None, spec: str, scale: float = 1) -> str:
    return MISSING if value is None or math.isnan(value) else f"{scale * value:{spec}}"


def median(values: Iterable[float | None], spec: str) -> str:
    known = [value for value in values if value is not None]
    return plain(statistics.median(known), spec) if known else MISSING


def seeds(count: int) -> str:
    return f"{count}†" if count < FEWEST_SEEDS else str(count)


def listed(values: Iterable[object]) -> str:
    return ", ".join(f"{v:.2g}" if isinstance(v, float) else str(v) for v in values)


def _line(cells: Sequence[object]) -> str:
    return " ".join(["|", *(f"{str(cell).replace('|', '/')} |" for cell in cells)])
