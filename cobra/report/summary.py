"""The top of the page: what the run decided, on what evidence, and at what cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cobra.plan import RankPlan
from cobra.report import measures, tables
from cobra.report.markup import count, number
from cobra.report.run import Run

MOST_MISSED = 0.05  # of the output's change by the path integral, before `calibrate` warns
UNMOVED = 0.01  # a gate's probability that changed by less is where the prior put it
MOST_METRICS = 4


@dataclass(frozen=True)
class Fact:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Card:
    title: str
    facts: list[Fact]


def subject(run: Run) -> str:
    """Model, data and seed, as far as run.json names them."""
    given = {**run.settings, **(run.settings.get("settings") if isinstance(run.settings.get("settings"), dict) else {})}
    model, data = (given.get(key) if isinstance(given.get(key), str) else "" for key in ("model", "data"))
    seed = f"seed {given['seed']}" if isinstance(given.get("seed"), int) else ""
    return ", ".join(filter(None, (" on ".join(filter(None, (model, data))), seed)))


def lead(run: Run) -> list[str]:
    """A few sentences."""
    if run.plan is None or not run.plan.sites:
        return ["This run has no rank plan yet."]
    return [_spent(run.plan), _certainty(run)]


def cautions(run: Run) -> list[str]:
    """What a reader should know before believing the rest."""
    found = [*run.notes]
    if run.scores is not None and run.scores.completeness.path > MOST_MISSED:
        found.append(
            f"The path integral misses {number(100 * run.scores.completeness.path)} % of the output's change, and "
            f"{100 * MOST_MISSED:g} % should be the most: contributions, and ranks that rest on them, are rough. More "
            "points of the path or another baseline may do better."
        )
    return found


def cards(run: Run) -> list[Card]:
    """Those that the run's files can fill."""
    found = (
        Card("Decided", _decided(run)),
        Card("On what evidence", _evidence(run)),
        Card("At what cost", _cost(run)),
        Card("Evaluation", _evaluation(run)),
    )
    return [card for card in found if card.facts]


def _decided(run: Run) -> list[Fact]:
    if run.plan is None or not run.plan.sites:
        return []
    plan, ranks = run.plan, run.plan.ranks.values()
    gates = sum(len(site.posterior) for site in plan.sites)
    return [
        Fact("ranks kept", f"{plan.total:,}", f"of {gates:,} gates"),
        Fact("layers with ranks", f"{sum(map(bool, ranks)):,}", f"of {len(ranks):,}"),
        Fact("full layers", f"{len(_full(plan)):,}", "every gate kept"),
        Fact("largest rank", f"{max(ranks):,}"),
    ]


def _evidence(run: Run) -> list[Fact]:
    found = []
    if run.scores is not None:
        scores, settings = run.scores, run.scores.settings
        r = measures.pearson(scores.conductance, scores.gradient).value
        found += [
            Fact("calibration examples", f"{settings['examples']:,}", f"{settings['steps']:,} points of the path"),
            Fact("path integral misses", f"{number(100 * scores.completeness.path)} %", "of the output's change"),
            Fact("correlation", "–" if math.isnan(r) else f"{r:.2f}", "of gradient and contribution"),
        ]
    if run.plan is not None and measures.keeps_gates(run.plan):
        gates = measures.all_gates(run.plan)
        low, high = measures.UNDECIDED
        open_ones = measures.undecided(p for p, _ in gates)
        found.append(Fact("undecided gates", f"{open_ones:,}", f"of {len(gates):,}: {low} to {high}"))
    return found


def _cost(run: Run) -> list[Fact]:
    found = []
    if run.plan is not None and run.plan.sites:
        plain = run.plan.parameters / sum(site.cost for site in run.plan.sites)
        found.append(Fact("parameters", f"{run.plan.parameters:,}", f"as LoRA of rank {plain:.3g} on all layers"))
    if run.history:
        cut = "" if run.cut is None else f"ranks cut at {run.cut:,}"
        found.append(Fact("training steps", f"{run.history[-1]['step'] - run.history[0]['step'] + 1:,}", cut))
    if (seconds := _seconds(run)) is not None:
        found.append(Fact("seconds", f"{seconds:,.0f}"))
    if run.merge is not None:
        sites, unmerged = len(run.merge.sites), len(run.merge.kept)
        found.append(Fact("layers merged", f"{sites - unmerged:,}", f"of {sites:,}, with no overhead"))
    return found


def _evaluation(run: Run) -> list[Fact]:
    """`before.NAME` stands beside NAME."""
    found = []
    for name, value in run.metrics.items():
        if isinstance(value, int | float) and not name.startswith("before."):
            before = run.metrics.get(f"before.{name}")
            changed = before is not None and before != value
            found.append(Fact(name, number(value), f"{number(before)} before training" if changed else ""))
    if sum(b.count for b in run.bins) and "ece" not in run.metrics:
        found.append(Fact("calibration error", f"{measures.calibration_error(run.bins):.3f}"))
    return found[:MOST_METRICS]


def _seconds(run: Run) -> float | None:
    """What run.json says of time: a number, or one a stage."""
    found = run.settings.get("seconds")
    values = [*found.values()] if isinstance(found, dict) else [found]
    return sum(values) if values and all(isinstance(v, int | float) for v in values) else None


def _full(plan: RankPlan) -> list[str]:
    """Layers that keep every gate they have, and might take more."""
    return [member for site in plan.sites if site.rank and site.rank == len(site.posterior) for member in site.members]


def _spent(plan: RankPlan) -> str:
    ranks, full = plan.ranks, _full(plan)
    empty = sum(rank == 0 for rank in ranks.values())
    text = f"{count(plan.total, 'rank')} went to {len(ranks) - empty:,} of {count(len(ranks), 'layer')}{_budget(plan)}"
    if empty:
        text += f"; the other {empty:,} {'is' if empty == 1 else 'are'} as in the base model"
    if full:
        text += f". {count(len(full), 'layer')} {'keeps' if len(full) == 1 else 'keep'} every gate: under a larger r_max"
        text += f"{' and budget' if len(full) == len(ranks) else ''} more ranks might go there"
    return text + "."


def _budget(plan: RankPlan) -> str:
    budget, spent = plan.provenance.get("budget"), plan.provenance.get("spent")
    if not isinstance(budget, dict) or "amount" not in budget:
        return ""
    amount = f"{number(budget['amount'])} {budget.get('unit', 'ranks')}"
    if spent is None:
        return f", under a budget of {amount}"
    return f", the whole budget of {amount}" if spent == budget["amount"] else f", {number(spent)} of a budget of {amount}"


def _certainty(run: Run) -> str:
    if not measures.was_trained(run.plan):
        return "The ranks come from the scores alone, without training: how certain they are is not known."
    if not measures.keeps_gates(run.plan):
        return _energy_kept(run.plan)
    gates = measures.all_gates(run.plan)
    kept, dropped = [p for p, k in gates if k], [p for p, k in gates if not k]
    found = []
    if len(run.gates) > 1 and not tables.uneven(run.gates):
        first, last = min(run.gates), max(run.gates)
        mean, most = measures.moved(run.gates[first], run.gates[last])
        text = f"From step {first:,} to {last:,} training moved a gate's probability by {mean:.4f} on average and "
        text += f"{most:.4f} at most"
        found.append(text + (": the ranks are those of the prior." if most < UNMOVED else "."))
    if kept and dropped:
        text = f"The weakest gate that was kept stands at {min(kept):.3f}, the strongest that was dropped at {max(dropped):.3f}"
        found.append(text + ("." if min(kept) >= max(dropped) else ": costs and limits of the budget count too."))
    return " ".join(found)


def _energy_kept(plan: RankPlan) -> str:
    kept = sum(site.energy[k] for site in plan.sites for k in site.kept)
    share = kept / (sum(sum(site.energy) for site in plan.sites) or 1.0)
    return f"The ranks are singular directions of the updates; those that were kept carry {share:.1%} of the updates' energy."
