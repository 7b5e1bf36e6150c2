"""What a run found, as a table for people."""

from __future__ import annotations

from rich.table import Table


def summary(result: dict) -> Table:
    rows, layers = result["rows"], result["layers"]
    table = Table("", "before", "after", title=f"{result['model']}, {result['task']}, {result['steps']:,} steps")
    for name, value in result["after"].items():
        if name not in ("examples", "tokens"):
            table.add_row(name, _number(result["before"].get(name)), _number(value))
    table.add_section()
    for name, value in (
        ("rows to train on, to evaluate on", f"{rows['train']:,}, {rows['test']:,}"),
        ("ranks", f"{result['ranks']:,} in {layers['all'] - layers['without rank']:,} of {layers['all']:,} layers"),
        ("adapter parameters", f"{result['parameters']:,}"),
        ("path integral misses", "" if result["path residual"] is None else f"{result['path residual']:.1%}"),
        ("steps skipped, gradients not finite", f"{result['bad_steps']:,}"),
        ("seconds", ", ".join(f"{stage} {value:.0f}" for stage, value in result["seconds"].items() if value >= 0.5)),
    ):
        if value:
            table.add_row(name, "", value)
    return table


def how_to_load(result: dict) -> str | None:
    """Which class loads what the run wrote, where transformers has no such class."""
    architecture = result.get("architecture", "")
    if "." not in architecture:
        return None
    written = "adapter/ and merged/ load" if "merge" in result else "adapter/ loads"
    return f"{written} with {architecture} alone, see adapter/README.md: transformers' Auto classes make another model"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
