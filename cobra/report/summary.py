"""The top of the page: what the run decided, in plain words and a few numbers."""

from __future__ import annotations

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
        found.append(Tile("correlation", number(run.scores.correlation), "gradient and contribution"))
    if run.metrics:
        name = "accuracy" if "accuracy" in run.metrics else next(iter(run.metrics))
        found.append(Tile(name, number(run.metrics[name]), "evaluation"))
    return found


def _spent(plan: RankPlan) -> str:
    ranks = plan.ranks
    empty = [name for name, rank in ranks.items() if rank == 0]
    largest = max(ranks.values())
    most = [name for name, rank in ranks.items() if rank == largest]
    budget, spent = plan.provenance.get("budget"), plan.provenance.get("spent")
    text = f"{plan.total:,} ranks went to {len(ranks) - len(empty):,} of {len(ranks):,} layers"
    if isinstance(budget, dict) and "amount" in budget:
        of = f"{number(spent)} of {number(budget['amount'])}" if spent is not None else number(budget["amount"])
        text += f"; the budget was {number(budget['amount'])} {budget.get('unit', 'ranks')}"
        text += f", {of} are spent" if spent is not None else ""
    text += ". "
    text += "Every layer got at least one" if not empty else f"{len(empty):,} got none and are the base model's own again"
    if largest:
        others = f" and {len(most) - 1:,} more" if len(most) > 1 else ""
        text += f"; {most[0]}{others} got the most, {largest:,}"
    return text + "."


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
