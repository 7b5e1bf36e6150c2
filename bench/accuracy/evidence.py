"""python -m bench.accuracy.evidence: writes what the committed rows say into docs/evidence.md; its prose stays.

Everything between `<!-- table: NAME -->` or `<!-- figure: NAME -->` and `<!-- end -->` is replaced; figures go to
docs/evidence/. With --check nothing is written, and the exit status is 1 where the document or a figure is not what the rows
say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.accuracy import diagnosis, equal_time, figures, repeats, searches, starts, tables
from bench.accuracy.forms import TIGHT
from bench.accuracy.metrics import SCALED
from bench.accuracy.rows import ROWS, read_rows
from bench.accuracy.statistics import Summary, check_equal_budget, summarise
from cobra import storage

DOCUMENT = Path(__file__).parents[2] / "docs" / "evidence.md"
RULE = "over tasks"
# DoRA's adapters are larger by design; EVA and AdaLoRA count in ranks: EVA's are a few per cent smaller or larger, AdaLoRA's up
# to 2 % smaller, as the next rank in its order no longer fits; below rank 1 whole singular directions leave up to 4 % unspent;
# "full" is no adapter but a ceiling. The budget table has them
UNEQUAL = ("dora", "eva", "adalora", "full", ("singular", TIGHT), ("cobra+singular", TIGHT))
TABLES: dict[str, Callable[[Sequence[dict], Summary], str]] = {
    "runs": tables.runs,
    "main": tables.main,
    "means": tables.means,
    "replication": tables.replication,
    "wins": tables.wins,
    "pairs": tables.pairs,
    "calibration": tables.calibration,
    "calibration-gains": tables.calibration_gains,
    "scaled-gains": lambda rows, summary: tables.calibration_gains(rows, summary, SCALED),
    "secondary": tables.secondary,
    "factors": tables.factors,
    "ablations": lambda rows, summary: tables.factors(rows, summary, "ablation"),
    "row-lengths": tables.row_lengths,
    "equal-time": equal_time.table,
    "repeats": repeats.table,
    "starts": lambda rows, summary: starts.markdown(starts.read_rows()),
    "search": lambda rows, summary: tables.search(rows, RULE, searches.chosen(rows)),
    "budget": tables.budget,
    "cost": tables.cost,
    "diagnosis": lambda rows, summary: diagnosis.markdown(diagnosis.read_rows()),
}
BLOCK = re.compile(r"(<!-- (table|figure): ([^ ]*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MARKER = re.compile(r"<!-- (?:table|figure): ([^ ]*) -->|<!-- (end) -->")


def render(text: str, rows: Sequence[dict], summary: Summary, points: dict[str, figures.Points]) -> str:
    """The document with its blocks filled. Raises ValueError for unknown names and markers that do not pair."""
    _check_markers(text)

    def block(match: re.Match) -> str:
        start, what, name, _, end = match.groups()
        known = TABLES if what == "table" else figures.FIGURES
        if name not in known:
            raise ValueError(f"docs/evidence.md asks for {what} {name!r}; there are {', '.join(known)}")
        filled = TABLES[name](rows, summary) if what == "table" else _figure(name, points[name])
        return f"{start}\n{filled}\n\n{end}"

    return BLOCK.sub(block, text)


def stale(document: Path, rows: Sequence[dict]) -> list[str]:
    """Names of what is not as the rows say."""
    summary = summarise(rows)
    points = {name: make(rows, summary) for name, (make, *_) in figures.FIGURES.items()}
    text = document.read_text(encoding="utf-8")
    wanted = render(text, rows, summary, points)
    ours, theirs = BLOCK.findall(text), BLOCK.findall(wanted)
    found = [f"{what} {name}" for (_, what, name, old, _), (*_, new, _) in zip(ours, theirs, strict=True) if old != new]
    folder = _folder(document)
    return found + [
        f"{name}.svg"
        for name, drawn in points.items()
        if (drawn and not figures.is_current(name, drawn, folder)) or (not drawn and (folder / f"{name}.svg").exists())
    ]


def write(document: Path, rows: Sequence[dict]) -> None:
    """Fills the document and draws the figures."""
    check_equal_budget([row for row in rows if row["phase"] == "final"], exempt=UNEQUAL)
    summary = summarise(rows)
    points = {name: make(rows, summary) for name, (make, *_) in figures.FIGURES.items()}
    text = render(document.read_text(encoding="utf-8"), rows, summary, points)
    folder = _folder(document)
    for name, drawn in points.items():
        if drawn:
            figures.write(name, drawn, folder)
        else:
            for kind in ("svg", "png"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
    storage.write_bytes(document, text.encode())


def _folder(document: Path) -> Path:
    return document.with_suffix("")


def _figure(name: str, points: figures.Points) -> str:
    return f"![{figures.FIGURES[name][2]}](evidence/{name}.svg)" if points else tables.EMPTY


def _check_markers(text: str) -> None:
    inside = None
    for match in MARKER.finditer(text):
        if bool(match[2]) == (inside is None):
            raise ValueError(f"docs/evidence.md: {match[0]} after {inside or 'no open block'}; blocks end with <!-- end -->")
        inside = None if match[2] else match[0]
    if inside:
        raise ValueError(f"docs/evidence.md: {inside} has no <!-- end -->")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where the document is not what the rows say")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of .jsonl files")
    options = parser.parse_args()
    rows = read_rows(options.rows)
    if options.check:
        found = stale(options.document, rows)
        print(f"not what the rows say: {', '.join(found)}; run make evidence" if found else "the document is what the rows say")
        return int(bool(found))
    write(options.document, rows)
    print(f"{options.document.name}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
