"""The top of the page: what the run decided, in plain words and a few numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cobra.plan import RankPlan
from cobra.report import measures
from cobra.report.markup import number
from cobra.report.run import Run


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str


def lead(run: Run) -> list[str]:
    """A few sentences."""
    if run.plan is None or not run.plan.sites:
        return ["This run has no rank plan yet."]
    return [_spent(run.plan), _certainty(run.plan)]


def tiles(run: Run) -> list[Tile]:
    found = []
    if run.plan is not None and run.plan.sites:
        plan, gates = run.plan, measures.all_gates(run.plan)
        empty = sum(rank == 0 for rank in plan.ranks.values())
        flips = measures.coin_flips(p for p, _ in gates)
        found += [
            Tile("ranks kept", f"{plan.total:,}", f"of {len(gates):,} gates"),
            Tile("parameters", f"{plan.parameters:,}", "in the matrices that remain"),
            Tile("layers at rank 0", f"{empty:,}", f"of {len(plan.ranks):,}"),
            Tile("coin flips", f"{flips:,}", "gates from {} to {}".format(*measures.COIN_FLIP)),
        ]
    if run.scores is not None:
        r = measures.pearson(run.scores.conductance, run.scores.gradient).value
        found.append(Tile("correlation", "–" if math.isnan(r) else f"{r:.2f}", "gradient and contribution"))
    if run.metrics:
        name = "accuracy" if "accuracy" in run.metrics else next(iter(run.metrics))
        found.append(Tile(name, number(run.metrics[name]), "evaluation"))
    return found


def _spent(plan: RankPlan) -> str:
    ranks = plan.ranks
    empty = sum(rank == 0 for rank in ranks.values())
    largest = max(ranks.values())
    most = [name for name, rank in ranks.items() if rank == largest]
    text = f"{plan.total:,} ranks went to {len(ranks) - empty:,} of {len(ranks):,} layers{_budget(plan)}. "
    if empty:
        text += (
            f"{empty:,} {'layer' if empty == 1 else 'layers'} got none and {'is' if empty == 1 else 'are'} as in the base model"
        )
    else:
        text += "Every layer got at least one"
    if largest and len(most) == len(ranks):
        return f"{text}; all have {largest:,}."
    if largest:
        others = f" and {len(most) - 1:,} more" if len(most) > 1 else ""
        text += f"; {most[0]}{others} got the most, {largest:,}"
    return text + "."


def _budget(plan: RankPlan) -> str:
    budget, spent = plan.provenance.get("budget"), plan.provenance.get("spent")
    if not isinstance(budget, dict) or "amount" not in budget:
        return ""
    amount = f"{number(budget['amount'])} {budget.get('unit', 'ranks')}"
    if spent is None:
        return f", under a budget of {amount}"
    return f", the whole budget of {amount}" if spent == budget["amount"] else f", {number(spent)} of a budget of {amount}"


def _certainty(plan: RankPlan) -> str:
    gates = measures.all_gates(plan)
    if plan.provenance.get("source") == "scores":
        return "The ranks come from the scores alone, without training: how certain they are is not known."
    flips = measures.coin_flips(p for p, _ in gates)
    kept, dropped = [p for p, k in gates if k], [p for p, k in gates if not k]
    text = f"{flips:,} of {len(gates):,} gates ({flips / max(1, len(gates)):.0%}) are coin flips, with a probability "
    text += "from {} to {}".format(*measures.COIN_FLIP)
    if kept and dropped:
        text += (
            f"; the weakest gate that was kept stands at {min(kept):.3f}, the strongest that was dropped at {max(dropped):.3f}"
        )
    return text + "."
