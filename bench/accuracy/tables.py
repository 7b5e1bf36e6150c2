"""The tables of docs/evidence.md, each a function from rows and their summary to Markdown.

A missing cell is "–". ± is half of the 95 % interval, the number of seeds stands in parentheses, and † marks fewer than 3.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from bench.accuracy.calibration import METRICS, calibration_changes
from bench.accuracy.cells import BASELINE, Cell, Place, Runs, of_phase, sort_methods
from bench.accuracy.factors import Effect, effects
from bench.accuracy.factors import row_lengths as lengths
from bench.accuracy.formats import (
    EMPTY,
    MISSING,
    interval,
    listed,
    markdown,
    median,
    number,
    p_value,
    percent,
    plain,
    points,
    seeds,
)
from bench.accuracy.intervals import Estimate, mean_of, seeds_estimate
from bench.accuracy.replication import replications
from bench.accuracy.statistics import Candidate, Choice, Summary, candidates, describe, win_tie_loss

LEVEL = {"classification": "accuracy %, ↑", "regression": "MSE, ↓", "language": "NLL, ↓"}
GAIN = {"classification": "points", "regression": "% less MSE", "language": "% less NLL"}
SECONDARY = {
    "classification": {"macro_f1": "F1", "mcc": "MCC"},
    "regression": {"mae": "MAE", "pearson": "Pearson", "spearman": "Spearman"},
    "language": {"perplexity": "perplexity"},
}


def runs(rows: Sequence[dict], summary: Summary) -> str:
    """How many rows there are, of what."""
    out = []
    for phase in sorted({row["phase"] for row in rows}):
        done, failed = of_phase(rows, phase), of_phase(rows, phase, diverged=True)
        both = [*done, *failed]
        fields = [listed(sorted({row[name] for row in both})) for name in ("task", "average_rank", "seed")]
        methods = listed(sort_methods(row["method"] for row in both))
        out.append((phase, len(done), len(failed), methods, *fields, listed(sorted({row["machine"] for row in done}))))
    return markdown(("phase", "runs", "diverged", "methods", "tasks", "ranks", "seeds", "machines"), out)


def main(rows: Sequence[dict], summary: Summary) -> str:
    """Test accuracy or loss: methods down, tasks across, one table a rank; the mean is that of accuracies."""

    def table(cells: list[Cell]) -> str:
        means = {m.method: m.level for m in summary.means if (m.place, m.kind) == (cells[0].place, "classification")}
        header = ["method", *(f"{cell.task} ({LEVEL[summary.kind(cell)]})" for cell in cells), "mean accuracy"]
        return markdown(
            header,
            [(m, *(_level(summary, cell, m) for cell in cells), percent(means.get(m))) for m in summary.methods(cells)],
        )

    return _by_place(summary, table)


def secondary(rows: Sequence[dict], summary: Summary) -> str:
    """The other metrics of predictions, means over seeds."""

    def table(cells: list[Cell]) -> str:
        names = {cell: SECONDARY[summary.kind(cell)] for cell in cells if SECONDARY[summary.kind(cell)]}
        header = ["method", *(f"{cell.task} ({' / '.join(of.values())})" for cell, of in names.items())]
        found = summary.runs
        return markdown(
            header, [(m, *(_metrics(found[cell].get(m), of) for cell, of in names.items())) for m in summary.methods(cells)]
        )

    return _by_place(summary, table)


def calibration(rows: Sequence[dict], summary: Summary) -> str:
    """NLL, ECE and Brier score by task, and their means over classification tasks with the interval over seeds."""

    def table(cells: list[Cell]) -> str:
        cells = [cell for cell in cells if summary.kind(cell) == "classification"]
        header = [
            "method",
            *(f"{cell.task} (NLL / ECE / Brier)" for cell in cells),
            *(f"mean {n}" for n in METRICS.values()),
        ]
        out = []
        for method in summary.methods(cells):
            found = [summary.runs[cell].get(method) for cell in cells]
            means = [number(_mean_metric(found, name)) for name in METRICS]
            out.append((method, *(_metrics(each, METRICS) for each in found), *means))
        return markdown(header, out)

    return _by_place(summary, table)


def calibration_gains(rows: Sequence[dict], summary: Summary, metrics: Mapping[str, str] = METRICS) -> str:
    """NLL, ECE and Brier score beside LoRA's: the mean difference, its interval and p-values over seeds."""
    out = [
        (
            *(str(found.place), found.method, f"{found.tasks}", seeds(found.change.seeds), metrics[found.metric]),
            f"{found.change.mean:+.4f}",
            f"{found.change.low:+.4f} to {found.change.high:+.4f}",
            *(p_value(found.change.p), p_value(found.corrected)),
        )
        for found in calibration_changes(summary, metrics)
    ]
    return markdown(
        ("at", "method", "tasks", "seeds", "metric", "beside LoRA, ↓", "95 % interval", "p over seeds", "p, Holm"), out
    )


def means(rows: Sequence[dict], summary: Summary) -> str:
    """Over all tasks of a kind: mean accuracy, and the gain over LoRA of the same seeds with its interval and p-values.

    seeds: the fewest that a task has
    """
    out = []
    for found in summary.means:
        gain = [MISSING] * 4
        if found.gain:
            unit = _unit(found.kind)
            gain = [_signed(found.gain, unit), interval(found.gain, unit), p_value(found.gain.p), p_value(found.corrected)]
        tasks = f"{found.tasks} × {found.kind}"
        seeds = min((estimate.seeds for estimate in (found.level, found.gain) if estimate), default=MISSING)
        out.append((str(found.place), tasks, found.method, str(seeds), percent(found.level), *gain))
    header = ("at", "tasks", "method", "seeds", "mean accuracy", "gain over LoRA", "95 % interval", "p", "p, Holm")
    return markdown(header, out)


def replication(rows: Sequence[dict], summary: Summary) -> str:
    """Every mean gain over LoRA on test, the same runs' on validation, and their training loss beside LoRA's."""
    out = []
    for found in replications(summary):
        unit = _unit(found.kind)
        gains = [(_signed(gain, unit), interval(gain, unit)) for gain in (found.test, found.validation)]
        fitted = MISSING if found.training is None else f"{found.training:+.0%} ({found.higher} of {found.pairs})"
        out.append((str(found.place), found.kind, found.method, *gains[0], *gains[1], fitted))
    header = (
        *("at", "tasks", "method", "gain on test", "95 % interval", "gain on validation", "95 % interval over seeds"),
        "training loss (pairs above)",
    )
    return markdown(header, out)


def wins(rows: Sequence[dict], summary: Summary) -> str:
    """Cells won / tied / lost against LoRA after Holm's correction."""
    counts = {key: " / ".join(map(str, found)) for key, found in win_tie_loss(summary.comparisons).items()}
    places = [place for place in summary.places() if place in {place for place, _ in counts}]
    methods = sort_methods(method for _, method in counts)
    header = ["method", *map(str, places)]
    return markdown(header, [(m, *(counts.get((place, m), MISSING) for place in places)) for m in methods])


def pairs(rows: Sequence[dict], summary: Summary) -> str:
    """Every comparison with LoRA, one foldable table a method."""
    header = (
        "task",
        "at",
        "seeds",
        "gain over LoRA",
        "95 % interval",
        "p",
        "p, Holm",
        "p over seeds",
        "p bootstrap",
        "",
    )
    by_method = defaultdict(list)
    for found in summary.comparisons:
        gain, unit = found.gain, _unit(found.kind)
        tests = (gain.p, found.corrected, gain.p_seeds, gain.p_bootstrap)
        place = (found.cell.task, str(found.cell.place), seeds(gain.seeds))
        line = (*place, _signed(gain, unit), interval(gain, unit), *map(p_value, tests), found.verdict)
        by_method[found.method].append(line)
    blocks = []
    for method in sort_methods(by_method):
        found = by_method[method]
        blocks.append(f"<details><summary>{method}: {len(found)} cells</summary>\n\n{markdown(header, found)}\n\n</details>")
    return "\n\n".join(blocks) or EMPTY


def budget(rows: Sequence[dict], summary: Summary) -> str:
    """Parameters of the adapter that remain, as a range over tasks and seeds, beside LoRA's mean; and those of the heads."""
    out = []
    for place in summary.places():
        sizes, heads = defaultdict(list), defaultdict(set)
        for cell in summary.cells(place):
            for method, found in summary.runs[cell].items():
                sizes[method] += [row["trainable_parameters"] for row in found.values()]
                heads[method] |= {row["head_parameters"] for row in found.values()}
        for method in sort_methods(sizes):
            low, high = min(sizes[method]), max(sizes[method])
            span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            ratio = statistics.fmean(sizes[method]) / statistics.fmean(sizes[BASELINE]) - 1 if BASELINE in sizes else None
            out.append((str(place), method, span, plain(ratio, "+.2f", 100), listed(sorted(heads[method]))))
    return markdown(("at", "method", "adapter parameters", "beside LoRA %", "head parameters"), out)


def cost(rows: Sequence[dict], summary: Summary) -> str:
    """Median seconds beside LoRA's over runs paired by task, seed and machine, and memory.

    Evaluation is the same work for all methods but those that peft does not merge; where its ratio is far from 1, the machine
    was not equally busy, and the ratio of training says as little.
    """
    out = []
    for place in summary.places():
        cells = summary.cells(place)
        for method in summary.methods(cells):
            pairs = [pair for cell in cells for pair in _on_one_machine(summary.runs[cell], method)]
            found = [row for cell in cells for row in summary.runs[cell].get(method, {}).values()]
            timed = [ours for ours, _ in pairs]
            seconds = [median([row["seconds"].get(stage) for row in timed], ".1f") for stage in ("calibrate", "train")]
            ratios = [median([spent(ours) / spent(lora) for ours, lora in pairs], ".2f") for spent in (_spent, _evaluated)]
            memory = median([row.get("peak_memory_mb") for row in found], ".0f")
            out.append((str(place), method, f"{len(pairs)}", *seconds, *ratios, memory))
    header = ("at", "method", "pairs", "calibrate s", "train s", "calibrate + train ÷ LoRA", "evaluate ÷ LoRA", "peak MB")
    return markdown(header, out)


def factors(rows: Sequence[dict], summary: Summary, phase: str = "factor") -> str:
    """One row a change, and what it brings on validation. The reference shows its levels."""
    blocks, by_place = [], defaultdict(list)
    for effect in effects(rows, phase):
        by_place[effect.place, effect.kind, effect.form].append(effect)
    for (place, kind, form), found in by_place.items():
        tasks = sorted({task for effect in found for task in effect.gains})
        out = []
        for effect in found:
            cells = [_effect(effect, task) for task in tasks]
            diverged = f", {effect.diverged} diverged" if effect.diverged else ""
            fitted = plain(effect.training, "+.0f", 100) if effect.changed else plain(effect.training, ".3f")
            mean = _gained(effect, effect.mean)
            out.append((effect.changed or "reference", *cells, mean, fitted, f"{effect.runs}{diverged}"))
        header = ("changed", *(f"{task} ({GAIN[kind]})" for task in tasks), "mean", "training loss (+%)", "runs")
        blocks.append(_titled(", ".join(filter(None, [str(place), kind, form])), markdown(header, out)))
    return "\n\n".join(blocks) or EMPTY


def row_lengths(rows: Sequence[dict], summary: Summary) -> str:
    """One row for every length of lora_A's rows and the settings that it is compared under."""
    blocks, by_place = [], defaultdict(list)
    for parts, effect in lengths(rows):
        by_place[effect.place, effect.kind, effect.form].append((parts, effect))
    for (place, kind, form), found in by_place.items():
        tasks = sorted({task for _, effect in found for task in effect.gains})
        out = [
            (
                parts or f"the form ({form})",
                effect.changed.removeprefix("row_scale: default → "),
                *(_effect(effect, task) for task in tasks),
                _gained(effect, effect.mean),
                plain(effect.training, "+.0f", 100),
                str(effect.runs),
            )
            for parts, effect in found
        ]
        header = ("settings", "length", *(f"{task} ({GAIN[kind]})" for task in tasks), "mean", "training loss (+%)", "runs")
        blocks.append(_titled(f"{place}, {kind}", markdown(header, out)))
    return "\n\n".join(blocks) or EMPTY


def search(rows: Sequence[dict], rule: str, chosen: Mapping[Choice, float]) -> str:
    """All settings that were tried, with their validation metric by task, and what was chosen.

    chosen: learning rates (`bench.accuracy.searches.chosen`)
    """
    kinds = {row["task"]: row["kind"] for row in of_phase(rows, "search")}
    by_place = defaultdict(list)
    for choice, tried in candidates(rows, rule).items():
        by_place[Place(choice.model, choice.rank, choice.condition)].append((choice, tried))
    blocks = []
    for place, found in sorted(by_place.items(), key=lambda item: (item[0].condition, item[0])):
        tasks = sorted({task for _, tried in found for candidate in tried for task in candidate.values})
        order = sort_methods(choice.method for choice, _ in found)
        found.sort(key=lambda item: (order.index(item[0].method), str(item[0].task)))
        out = [(choice.method, *line) for choice, tried in found for line in _tried(tried, tasks, kinds, chosen.get(choice))]
        header = ("method", "settings", *(f"{t} ({LEVEL[kinds.get(t, 'classification')]})" for t in tasks), "shortfall %", "")
        blocks.append(_titled(place, markdown(header, out)))
    return "\n\n".join(blocks) or EMPTY


def _by_place(summary: Summary, table: Callable[[list[Cell]], str]) -> str:
    tables = [(place, table(summary.cells(place))) for place in summary.places()]
    return "\n\n".join(_titled(*each) for each in tables if each[1] != EMPTY) or EMPTY


def _titled(place: Place | str, table: str) -> str:
    return f"**{place}**\n\n{table}"


def _level(summary: Summary, cell: Cell, method: str) -> str:
    found, failed = summary.levels.get((cell, method)), summary.diverged[cell, method]
    if found is None:
        return f"{failed} diverged" if failed else MISSING
    shown = percent(found) if summary.kind(cell) == "classification" else number(found)
    return f"{shown} ({seeds(found.seeds)}{f', {failed} diverged' if failed else ''})"


def _unit(kind: str) -> str:
    """Accuracies gain points, losses per cent of themselves."""
    return "" if kind == "classification" else " %"


def _signed(found: Estimate, unit: str) -> str:
    return f"{100 * found.mean:+.2f}{unit}"


def _metrics(found: Runs | None, names: dict[str, str]) -> str:
    if not found:
        return MISSING
    return " / ".join(plain(statistics.fmean(row["test"][name] for row in found.values()), ".3f") for name in names)


def _mean_metric(found: Sequence[Runs | None], name: str) -> Estimate | None:
    if not found or not all(found):
        return None
    return mean_of([seeds_estimate([row["test"][name] for row in each.values()]) for each in found])


def _on_one_machine(methods: dict[str, Runs], method: str) -> list[tuple[dict, dict]]:
    """Rows of the method and LoRA's of the same seeds."""
    found, base = methods.get(method, {}), methods.get(BASELINE, {})
    shared = [seed for seed in found if seed in base and found[seed]["machine"] == base[seed]["machine"]]
    return [(found[seed], base[seed]) for seed in shared]


def _spent(row: dict) -> float:
    return row["seconds"].get("calibrate", 0.0) + row["seconds"]["train"]


def _evaluated(row: dict) -> float:
    return row["seconds"]["evaluate"]


def _effect(effect: Effect, task: str) -> str:
    return _gained(effect, effect.gains.get(task))


def _gained(effect: Effect, found: Estimate | None) -> str:
    """Levels of the reference, gains of the others."""
    if effect.changed:
        return points(found)
    return percent(found) if effect.kind == "classification" else number(found)


def _tried(
    tried: Sequence[Candidate], tasks: Sequence[str], kinds: dict[str, str], chosen: float | None
) -> list[tuple[str, ...]]:
    """Settings, validation by task, what they lack beside the best of those with all runs, and which were chosen."""
    out = []
    for place, candidate in enumerate(tried):
        other = tried[0] if place else tried[-1]
        spec = [(".1f", 100) if kinds.get(task) == "classification" else (".4g", 1) for task in tasks]
        values = [plain(candidate.values.get(task), *of) for task, of in zip(tasks, spec, strict=True)]
        lacks = "diverged" if math.isinf(candidate.shortfall) else plain(candidate.shortfall, ".2f", 100)
        taken = "chosen" if candidate.config["lr"] == chosen else ""
        out.append((describe(candidate.config, other.config), *values, lacks, taken))
    return out
