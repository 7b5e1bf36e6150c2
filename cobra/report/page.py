"""`cobra report`: one page of everything a run found, that needs nothing but itself, and the files behind its figures."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from cobra import storage
from cobra.report import measures, plots, tables
from cobra.report.markup import Table, inline_svg, number, paragraph, table
from cobra.report.run import FILES, Run, flatten
from cobra.report.style import style_sheet
from cobra.report.summary import lead, tiles

PAGE, MARK = "index.html", '<meta name="generator" content="cobra report">'
# a page with names from anyone's model loads nothing and runs nothing
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


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


def write_report(run: Path | str, out: Path | str | None = None) -> Path:
    """Writes index.html and, for every figure, PNG, SVG and CSV into a folder that appears whole or not at all.

    run: a run's folder
    out: a new folder or an earlier report, which is replaced; by default run/report

    Returns the page.

    Raises FileNotFoundError where there is no run, FormatError for a broken file of it, ValueError for an `out` that holds
    something else.
    """
    found = Run.load(run)
    out = (Path(run) / "report" if out is None else Path(out)).resolve()
    _check_target(out)
    sections = list(_sections(found))
    with storage.new_folder(out) as folder:
        pages = [_section(section, folder) for section in sections]
        storage.write_bytes(folder / PAGE, _page(found, sections, pages).encode())
    return out / PAGE


def _check_target(out: Path) -> None:
    if out.is_file() or out.suffix in {".html", ".htm"}:
        raise ValueError(f"{out}: expected a folder; the page is {PAGE} in it, its figures beside it")
    if not out.exists():
        return
    page = out / PAGE
    if any(out.iterdir()) and not (page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:2000]):
        raise ValueError(f"{out}: holds files that are no report, and a report replaces its folder; choose another one")


def _sections(run: Run) -> Iterator[Section]:
    yield Section("ranks", "Where the ranks went", list(_ranks(run)))
    yield Section("prior", "Before and after training", list(_prior(run)))
    yield Section("factors", "Gradient against contribution", list(_factors(run)))
    yield Section("training", "Training", list(_training(run)))
    yield Section("evaluation", "Evaluation", list(_evaluation(run)))
    yield Section("merge", "Merge", list(_merge(run)))
    yield Section("calibration", "Completeness of the calibration", list(_calibration(run)))
    yield Section("reproduce", "To run it again", list(_reproduce(run)))


def _ranks(run: Run) -> Iterator[str | Exhibit]:
    if run.plan is None or not run.plan.sites:
        yield _absent("plan.json")
        return
    caption = "Rank of every layer. Layers of rank 0 are the base model's own again."
    yield Exhibit("ranks", "Rank by layer", caption, tables.ranks(run.plan), plots.rank_heatmap(run.plan))


def _prior(run: Run) -> Iterator[str | Exhibit]:
    plan, scores = run.plan, run.scores
    if plan is None or not plan.sites:
        yield _absent("plan.json")
        return
    if plan.provenance.get("source") == "scores":
        yield paragraph("The plan was made from the scores alone: there was no training of gates, and no posterior.")
    reason = tables.mismatch(scores, plan, run.fusion)
    if scores is None:
        yield _absent("scores.safetensors")
    elif reason:
        yield paragraph(f"Prior and posterior are not compared: {reason}.", "absent")
    else:
        caption = (
            f"Share of each group in the prior π (fusion “{run.fusion}”), in the expected rank after training, and in the "
            "ranks kept. Gates start at σ(γ(π − π̄)), flatter than π: a grey line is what γ and training left between the two."
        )
        figure = plots.prior_posterior(scores, plan, fusion=run.fusion)
        yield Exhibit("prior_posterior", "Prior and posterior", caption, tables.prior(scores, plan, run.fusion), figure)
    low, high = measures.COIN_FLIP
    caption = f"Every gate's probability after training. Between {low} and {high} (grey) the cut is close to a coin flip."
    yield Exhibit("gates", "Posterior of the gates", caption, tables.posterior(plan), plots.gate_probabilities(plan))


def _factors(run: Run) -> Iterator[str | Exhibit]:
    if run.scores is None:
        yield _absent("scores.safetensors")
        return
    scores, f = run.scores, measures.factors(run.scores)
    phi, gamma = scores.conductance.numpy(), scores.gradient.numpy()
    yield paragraph(
        f"Pearson {measures.pearson(phi, gamma)}, Spearman {measures.spearman(phi, gamma)} over {len(phi)} groups. The 95 % "
        "intervals are Fisher's and take groups as independent, which layers of one model are not quite."
    )
    yield paragraph(
        "Red zone: a group with at least an even share of the gradient and at least twice its share of the contribution; rank "
        "given by gradients alone goes there. The opposite: at least an even share of the contribution and at least twice the "
        "share of the gradient; rank given by gradients alone passes it by."
    )
    yield paragraph(f"Red zone: {_named(scores.sites, f.red)}. Opposite: {_named(scores.sites, f.under)}.")
    caption = "A point a group, on its share of each factor (1 is an even share); the dotted line is agreement."
    yield Exhibit("factors", "Gradient against contribution", caption, tables.factors(scores), plots.factor_scatter(scores))


def _training(run: Run) -> Iterator[str | Exhibit]:
    if not run.history:
        yield _absent("history.jsonl")
    terms = tables.panels(run.history, {"nll": "nll", "kl": "KL term", "loss": "loss"})
    if terms:
        cut = "" if run.cut is None else f" The dashed line is the cut, at step {run.cut:,}."
        caption = f"Terms of the objective by step, raw and as a running mean.{cut}"
        yield Exhibit("elbo", "Terms of the ELBO", caption, tables.history(run.history), plots.series_panels(terms, run.cut))
    labels = {
        "expected_rank": "expected rank",
        "undecided": "undecided gates",
        "temperature": "temperature",
        "lr": "learning rate",
    }
    search = tables.panels(run.history, labels)
    if search:
        figure = plots.series_panels(search, run.cut, smooth=False)
        content = tables.history(run.history, tuple(labels))
        yield Exhibit("search", "The search", "What the gates were doing meanwhile.", content, figure)
    if not run.gates:
        yield _absent("gates.jsonl")
        return
    reason = tables.uneven(run.gates)
    if reason:
        yield paragraph(f"Gate trajectories are not drawn: {reason}.", "absent")
        return
    plan = run.plan if run.plan is not None and tables.same_gates(run.gates, run.plan) else None
    caption = "Probability of gates by step, and expected rank (the sum of a group's probabilities) below."
    figure = plots.gate_trajectories(run.gates, plan, run.cut)
    yield Exhibit("gate_trajectories", "Gates over training", caption, tables.trajectories(run.gates), figure)


def _evaluation(run: Run) -> Iterator[str | Exhibit]:
    if run.metrics:
        yield Exhibit("metrics", "Metrics", "", Table(("metric", "value"), list(run.metrics.items())))
    if sum(b.count for b in run.bins):
        error = measures.calibration_error(run.bins)
        caption = f"On the dotted line the model is as often right as it is sure. Expected calibration error {error:.3f}."
        yield Exhibit("reliability", "Calibration", caption, tables.bins(run.bins), plots.reliability(run.bins))
    elif "eval.json" in run.files:
        yield paragraph("eval.json has no calibration bins: no reliability diagram.", "absent")
    else:
        yield _absent("eval.json")


def _merge(run: Run) -> Iterator[str | Exhibit]:
    if run.merge is None:
        yield _absent("merge.json")
        return
    kept, sites = run.merge.kept, run.merge.sites
    text = f"{len(sites) - len(kept)} of {len(sites)} layers are merged. Rounding to the weights' dtype lost at most "
    text += f"{run.merge.worst_rounding_loss:.1e} of a layer's update."
    if run.merge.logit_difference is not None:
        text += f" Outputs on the probe batch moved by at most {run.merge.logit_difference:.1e}."
    yield paragraph(text + (f" Unmerged: {', '.join(kept)}." if kept else ""))
    yield Exhibit("merge", "Merge report", "", tables.merge(run.merge))


def _calibration(run: Run) -> Iterator[str | Exhibit]:
    if run.scores is None:
        yield _absent("scores.safetensors")
        return
    scores, c = run.scores, run.scores.completeness
    yield paragraph(
        f"Along the path the attributions miss F(x) − F(x0) by {number(100 * c.path)} %: the quadrature's error, which more "
        f"points make smaller. Summed over layers they miss it by {number(100 * c.sites)} %; only the estimator “direct” "
        f"promises a small number there, and this is “{scores.settings['estimator']}”. F changes by {number(c.change)} on "
        "average."
    )
    yield Exhibit("completeness", "Residuals and settings", "", tables.completeness(scores))
    if scores.unused:
        yield Exhibit("unused", "Layers without a score", "", Table(("layer", "reason"), list(scores.unused.items())))


def _reproduce(run: Run) -> Iterator[str | Exhibit]:
    settings = dict(run.settings)
    command = settings.pop("command", None)
    if command is not None:
        line = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
        yield f"<h3>Command</h3><pre>{escape(line)}</pre>"
    if settings:
        yield Exhibit("settings", "Settings", "", Table(("setting", "value"), list(flatten(settings).items())))
    if "run.json" not in run.files:
        yield _absent("run.json")
    prints = [(name, o.fingerprint) for name, o in (("scores", run.scores), ("plan", run.plan)) if o is not None]
    rows = [(f"base model, by {name}", value) for name, value in prints]
    rows += [(f"{name}, SHA-256", digest) for name, digest in run.files.items()]
    yield Exhibit("fingerprints", "Fingerprints", "", Table(("what", "fingerprint"), rows))


def _absent(name: str) -> str:
    return paragraph(f"Not shown: the run has no {name} ({FILES[name]}).", "absent")


def _named(sites: tuple[str, ...], chosen: list[int]) -> str:
    text = ", ".join(sites[i] for i in chosen[:12])
    return (text + (f" and {len(chosen) - 12} more" if len(chosen) > 12 else "")) or "none"


def _section(section: Section, folder: Path) -> str:
    parts = [part if isinstance(part, str) else _exhibit(part, folder) for part in section.parts]
    return f'<section>\n<h2 id="{section.anchor}">{section.title}</h2>\n' + "\n".join(parts) + "\n</section>"


def _exhibit(exhibit: Exhibit, folder: Path) -> str:
    storage.write_bytes(folder / f"{exhibit.name}.csv", exhibit.rows.csv())
    rows = table(exhibit.rows, exhibit.title)
    if exhibit.figure is None:
        return f'<figure aria-label="{escape(exhibit.title)}">\n{rows}\n{_links(exhibit.name, "csv")}\n</figure>'
    svg = plots.render(exhibit.figure, "svg")
    exhibit.figure.set_layout_engine("none")  # it stays as it was laid out, which takes as long as drawing it
    storage.write_bytes(folder / f"{exhibit.name}.svg", svg)
    storage.write_bytes(folder / f"{exhibit.name}.png", plots.render(exhibit.figure, "png"))
    drawing = inline_svg(svg, exhibit.name, f"{exhibit.title}. {exhibit.caption}")
    return (
        f'<figure aria-label="{escape(exhibit.title)}">\n<h3>{escape(exhibit.title)}</h3>\n'
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(exhibit.title)}, figure">{drawing}</div>\n'
        f"<figcaption>{escape(exhibit.caption)}</figcaption>\n<details><summary>The numbers</summary>{rows}</details>\n"
        f"{_links(exhibit.name, 'png', 'svg', 'csv')}\n</figure>"
    )


def _links(name: str, *kinds: str) -> str:
    links = ", ".join(f'<a href="{name}.{kind}">{kind.upper()}</a>' for kind in kinds)
    return f"<figcaption>Beside this page: {links}</figcaption>"


def _page(run: Run, sections: list[Section], pages: list[str]) -> str:
    title = f"COBRA run {run.name}"
    tiled = "".join(
        f"<div><dt>{escape(t.label)}</dt><dd>{escape(t.value)}<small>{escape(t.note)}</small></dd></div>" for t in tiles(run)
    )
    notes = [paragraph(note, "note") for note in run.notes]
    if run.missing:
        notes.append(paragraph(f"Missing from the run, and from this page: {', '.join(run.missing)}.", "absent"))
    contents = "".join(f'<a href="#{s.anchor}">{s.title}</a>' for s in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style_sheet()}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{"".join(paragraph(text, "lead") for text in lead(run))}
<dl class="tiles">{tiled}</dl>
{"".join(notes)}
<nav aria-label="Contents">{contents}</nav>
{chr(10).join(pages)}
</main>
</body>
</html>
"""
