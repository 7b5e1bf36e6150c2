"""`cobra report`: one page of everything a run found, that needs nothing but itself, and the files behind its figures."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from cobra import storage
from cobra.report.markup import count, inline_svg, paragraph, table
from cobra.report.plots.canvas import render
from cobra.report.run import Run
from cobra.report.sections import Exhibit, Section, sections
from cobra.report.style import style_sheet
from cobra.report.summary import Card, cards, cautions, lead, subject

PAGE, MARK = "index.html", '<meta name="generator" content="cobra report">'
MOST_UNFOLDED = 60  # rows of a table
# a page with names from anyone's model loads nothing and runs nothing
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Report:
    """What was written, and what could not be. As text it is the page's path.

    missing: file of the run -> what the page lacks without it
    notes: what a reader should know about the run's files
    """

    page: Path
    files: tuple[Path, ...]
    missing: dict[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {
            "page": str(self.page),
            "files": list(map(str, self.files)),
            "missing": self.missing,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return str(self.page)

    def table(self) -> str:
        lines = [
            str(self.page),
            f"  {count(len(self.files) - 1, 'file')} beside it: PNG, SVG and CSV of figures, CSV of tables",
        ]
        lines += [f"  not in the run: {name}; not on the page: {shows}" for name, shows in self.missing.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def write_report(run: Path | str, out: Path | str | None = None) -> Report:
    """Writes index.html and, for every figure, PNG, SVG and CSV into a folder that appears whole or not at all.

    run: a run's folder
    out: a new folder or an earlier report, which is replaced; by default run/report

    Raises FileNotFoundError where there is no run, FormatError for a broken file of it, ValueError for an `out` that holds
    something else.
    """
    found = Run.load(run)
    out = (Path(run) / "report" if out is None else Path(out)).resolve()
    _check_target(out)
    shown = sections(found)
    with storage.new_folder(out) as folder:
        body = "\n".join(_section(section, folder) for section in shown)
        storage.write_bytes(folder / PAGE, _page(found, shown, body).encode())
        names = sorted(path.name for path in folder.iterdir())
    return Report(out / PAGE, tuple(out / name for name in names), found.missing, found.notes)


def _check_target(out: Path) -> None:
    if out.is_file() or out.suffix in {".html", ".htm"}:
        raise ValueError(f"{out}: expected a folder; the page is {PAGE} in it, its figures beside it")
    if not out.exists():
        return
    page = out / PAGE
    if any(out.iterdir()) and not (page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:2000]):
        raise ValueError(f"{out}: holds files that are no report, and a report replaces its folder; choose another one")


def _section(section: Section, folder: Path) -> str:
    parts = [part if isinstance(part, str) else _exhibit(part, folder) for part in section.parts]
    return f'<section>\n<h2 id="{section.anchor}">{section.title}</h2>\n' + "\n".join(parts) + "\n</section>"


def _exhibit(exhibit: Exhibit, folder: Path) -> str:
    name, title = exhibit.name, escape(exhibit.title)
    storage.write_bytes(folder / f"{name}.csv", exhibit.rows.csv())
    kinds, drawing = ["csv"], ""
    if exhibit.figure is not None:
        svg = render(exhibit.figure, "svg")
        exhibit.figure.set_layout_engine("none")  # it stays as it was laid out, which takes as long as drawing it
        storage.write_bytes(folder / f"{name}.svg", svg)
        storage.write_bytes(folder / f"{name}.png", render(exhibit.figure, "png"))
        kinds = ["png", "svg", "csv"]
        inline = inline_svg(svg, name, f"{exhibit.title}. {exhibit.caption}")
        drawing = f'<div class="wide" tabindex="0" role="group" aria-label="{title}, figure">{inline}</div>\n'
    caption = paragraph(exhibit.caption, "caption") + "\n" if exhibit.caption else ""
    rows = table(exhibit.rows, exhibit.title)
    if drawing or len(exhibit.rows.rows) > MOST_UNFOLDED:
        rows = f"<details><summary>As a table, {count(len(exhibit.rows.rows), 'row')}</summary>{rows}</details>"
    links = ", ".join(f'<a href="{name}.{kind}">{kind.upper()}</a>' for kind in kinds)
    return (
        f'<figure aria-labelledby="{name}-title">\n<h3 id="{name}-title">{title}</h3>\n{drawing}{caption}{rows}\n'
        f'<p class="files">Beside this page: {links}</p>\n</figure>'
    )


def _page(run: Run, shown: list[Section], body: str) -> str:
    title, about = f"COBRA run {run.name}", subject(run)
    notes = [paragraph(note, "note") for note in cautions(run)]
    if run.missing:
        listed = "; ".join(f"{shows} ({name})" for name, shows in run.missing.items())
        notes.append(paragraph(f"Missing from the run, and from this page: {listed}.", "absent"))
    contents = "".join(f'<a href="#{s.anchor}">{s.title}</a>' for s in shown)
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
{paragraph(about, "subject") if about else ""}
{"".join(paragraph(text, "lead") for text in lead(run))}
<div class="cards">{"".join(map(_card, cards(run)))}</div>
{"".join(notes)}
<nav aria-label="Contents">{contents}</nav>
{body}
</main>
</body>
</html>
"""


def _card(card: Card) -> str:
    facts = "".join(
        f"<dt>{escape(fact.label)}<small>{escape(fact.note)}</small></dt><dd>{escape(fact.value)}</dd>" for fact in card.facts
    )
    return f"<section><h2>{escape(card.title)}</h2><dl>{facts}</dl></section>"
