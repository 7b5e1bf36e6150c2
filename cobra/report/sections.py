"""What the page shows of a run, section by section; a section that the run's files cannot fill is left out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from matplotlib.figure import Figure

from cobra.report import measures, plots, tables
from cobra.report.markup import Table, count, number, paragraph
from cobra.report.plots.factors import MOST_NAMED
from cobra.report.run import Run, flatten

TERMS = {"nll": "data term (nll)", "kl": "KL term"}
SEARCH = {
    "expected_rank": "expected rank",
    "undecided": "undecided, share",
    "gate_entropy": "entropy (bits)",
    "temperature": "temperature",
    "lr": "learning rate",
}
MOST_LISTED = 12


@dataclass(frozen=True)
class Exhibit:
    """A figure or a table alone, with what it shows in words and the rows behind it.

    name: of its files
    """

    name: str
    title: str
    caption: str
    rows: Table
    figure: Figure | None = None


@dataclass(frozen=True)
class Section:
    """parts: HTML and exhibits, in order"""

    anchor: str
    title: str
    parts: list[str | Exhibit]


def sections(run: Run) -> list[Section]:
    found = (
        Section("ranks", "Where the ranks went", list(_ranks(run))),
        Section("prior", "What came of the prior", list(_prior(run))),
        Section("factors", "Gradient against contribution", list(_factors(run))),
        Section("training", "Training", [*_terms(run), *_search(run), *_trajectories(run)]),
        Section("evaluation", "Evaluation", list(_evaluation(run))),
        Section("merge", "Merge", list(_merge(run))),
        Section("calibration", "Completeness of the calibration", list(_calibration(run))),
        Section("reproduce", "To run it again", list(_reproduce(run))),
    )
    return [section for section in found if section.parts]


def _ranks(run: Run) -> Iterator[str | Exhibit]:
    if run.plan is None or not run.plan.sites:
        return
    caption = "Rank of every layer; bold where every gate is kept. Layers of rank 0 are the base model's own again."
    yield Exhibit("ranks", "Rank by layer", caption, tables.ranks(run.plan), plots.rank_heatmap(run.plan))


def _prior(run: Run) -> Iterator[str | Exhibit]:
    plan, scores = run.plan, run.scores
    if plan is None or not plan.sites:
        return
    trained = measures.was_trained(plan)
    if not trained:
        yield paragraph("The plan was made from the scores alone: there was no training of gates, and no posterior.")
    reason = tables.mismatch(scores, plan, run.fusion)
    if reason:
        yield paragraph(f"Prior and posterior are not compared: {reason}.", "absent")
    elif scores is not None:
        caption = f"Share of each group in the prior π (fusion “{run.fusion}”)"
        if trained:
            caption += (
                ", in the expected rank after training, and in the ranks kept. Gates start from π flattened by γ: from prior"
            )
            caption += " to expected rank is the work of γ and training, the rest that of the cut."
        else:
            caption += " and in the ranks kept."
        figure = plots.prior_posterior(scores, plan, fusion=run.fusion)
        title = "Prior and posterior" if trained else "Prior and ranks"
        yield Exhibit("prior_posterior", title, caption, tables.prior(scores, plan, run.fusion), figure)
    if trained and not measures.keeps_gates(plan):
        yield paragraph(
            "Ranks were cut in the singular basis: by the energy of the directions of every update, not by its gates."
        )
    if measures.keeps_gates(plan):
        low, high = measures.UNDECIDED
        caption = (
            f"Every gate's probability after training, those of a group side by side. From {low} to {high} (grey) training "
        )
        caption += "did not decide."
        yield Exhibit("gates", "Posterior of the gates", caption, tables.posterior(plan), plots.gate_probabilities(plan))


def _factors(run: Run) -> Iterator[str | Exhibit]:
    if run.scores is None:
        return
    scores, f = run.scores, measures.factors(run.scores)
    phi, gamma = scores.conductance.numpy(), scores.gradient.numpy()
    yield paragraph(
        f"Pearson {measures.pearson(phi, gamma)}, Spearman {measures.spearman(phi, gamma)} over {len(phi)} groups. The 95 % "
        "intervals are Fisher's and take groups as independent, which layers of one model are not quite."
    )
    ratio = f"{measures.ZONE_RATIO:g}"
    yield paragraph(
        f"Red zone, at least an even share of the gradient and {ratio} times the group's share of the contribution, where "
        f"gradients alone would send ranks: {_named(run, f.red)}."
    )
    yield paragraph(
        f"The opposite, at least an even share of the contribution and {ratio} times the group's share of the gradient, which "
        f"gradients alone would pass by: {_named(run, f.under)}."
    )
    caption = "A point a group, at its share of each factor (1 is an even share); the dotted line is agreement."
    if max(len(f.red), len(f.under)) > MOST_NAMED:
        caption += f" Of each zone the largest {MOST_NAMED} are named."
    yield Exhibit("factors", "Where the two disagree", caption, tables.factors(scores), plots.factor_scatter(scores))


def _named(run: Run, chosen: list[int]) -> str:
    """Groups, with the rank they got where the plan is of the same groups."""
    names = run.scores.sites
    ranks = {} if run.plan is None else {site.name: f" (rank {site.rank})" for site in run.plan.sites}
    text = ", ".join(names[i] + ranks.get(names[i], "") for i in chosen[:MOST_LISTED])
    rest = len(chosen) - MOST_LISTED
    return (text + (f" and {rest:,} more" if rest > 0 else "")) or "none"


def _terms(run: Run) -> Iterator[Exhibit]:
    terms = tables.panels(run.history, TERMS) or tables.panels(run.history, {"loss": "loss"})
    if not terms:
        return
    caption = "Terms of the objective by step, raw and as a running mean."
    if run.cut is not None:
        caption += f" The dashed line is the cut, at step {run.cut:,}."
    shares = [abs(row["kl"] / row["nll"]) for row in run.history if row.get("kl") is not None and row.get("nll")]
    if shares:
        caption += f" The KL term is at most {number(100 * max(shares))} % of the data term."
    yield Exhibit("elbo", "Terms of the ELBO", caption, tables.history(run.history), plots.series_panels(terms, run.cut))


def _search(run: Run) -> Iterator[Exhibit]:
    panels = tables.panels(run.history, SEARCH)
    if panels:
        figure = plots.series_panels(panels, run.cut, smooth=False)
        yield Exhibit(
            "search", "The search", "Gates and schedules by step.", tables.history(run.history, tuple(SEARCH)), figure
        )


def _trajectories(run: Run) -> Iterator[str | Exhibit]:
    if not run.gates:
        return
    if reason := tables.uneven(run.gates):
        yield paragraph(f"Gate trajectories are not drawn: {reason}.", "absent")
        return
    plan = run.plan
    if plan is not None and not (measures.keeps_gates(plan) and tables.same_gates(run.gates, plan)):
        plan = None
    caption = "Probability of gates by step; below, each group's expected rank, the sum of its probabilities."
    figure = plots.gate_trajectories(run.gates, plan, run.cut)
    yield Exhibit("gate_trajectories", "Gates over training", caption, tables.trajectories(run.gates), figure)


def _evaluation(run: Run) -> Iterator[str | Exhibit]:
    if run.metrics:
        yield Exhibit("metrics", "Metrics", "", Table(("metric", "value"), list(run.metrics.items())))
    if sum(b.count for b in run.bins):
        error = measures.calibration_error(run.bins)
        caption = "On the dotted line the model is as often right as it is sure; bars are 95 % intervals. Expected calibration "
        caption += f"error {error:.3f}."
        yield Exhibit("reliability", "Calibration", caption, tables.bins(run.bins), plots.reliability(run.bins))
    elif "eval.json" in run.files:
        yield paragraph("eval.json has no calibration bins: no reliability diagram.", "absent")


def _merge(run: Run) -> Iterator[str | Exhibit]:
    if run.merge is None:
        return
    kept, sites = run.merge.kept, run.merge.sites
    text = f"{len(sites) - len(kept)} of {count(len(sites), 'layer')} are plain weights again, of the base model's types and "
    text += f"names. Rounding to the weights' dtype lost at most {run.merge.worst_rounding_loss:.1e} of a layer's update."
    if run.merge.logit_difference is not None:
        text += f" Outputs on the probe batch moved by at most {run.merge.logit_difference:.1e}."
    yield paragraph(text + (f" Unmerged: {', '.join(kept)}." if kept else ""))
    caption = "Size of each layer's update beside its weight (Frobenius norms), and the share of the update lost to rounding."
    figure = plots.merge_updates(run.merge) if sites else None
    yield Exhibit("merge", "Merge report", caption, tables.merge(run.merge), figure)


def _calibration(run: Run) -> Iterator[str | Exhibit]:
    if run.scores is None:
        return
    scores, c = run.scores, run.scores.completeness
    yield paragraph(
        f"Along the path the attributions miss F(x) − F(x0) by {number(100 * c.path)} %: the quadrature's error, which more "
        f"points make smaller. Summed over layers they miss it by {number(100 * c.sites)} %; only the estimator “direct” "
        f"promises a small number there, and this is “{scores.settings['estimator']}”. F changes by {number(c.change)} on "
        "average."
    )
    caption = "Residuals are shares of the mean change of F; steps are points of the path."
    yield Exhibit("completeness", "Residuals and settings", caption, tables.completeness(scores))
    if scores.unused:
        yield Exhibit("unused", "Layers without a score", "", Table(("layer", "reason"), list(scores.unused.items())))


def _reproduce(run: Run) -> Iterator[str | Exhibit]:
    settings = dict(run.settings)
    command = settings.pop("command", None)
    if command is not None:
        line = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
        yield f"<h3>Command</h3><pre>{escape(line)}</pre>"
    if run.plan is not None and run.plan.provenance:
        settings["plan"] = run.plan.provenance
    if settings:
        yield Exhibit("settings", "Settings", "", Table(("setting", "value"), list(flatten(settings).items())))
    prints = [(name, o.fingerprint) for name, o in (("scores", run.scores), ("plan", run.plan)) if o is not None]
    rows = [(f"base model, by {name}", value) for name, value in prints]
    rows += [(f"{name}, SHA-256", digest) for name, digest in run.files.items()]
    yield Exhibit("fingerprints", "Fingerprints", "", Table(("what", "fingerprint"), rows))
