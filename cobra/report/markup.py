"""Pieces of a page: text that is escaped, numbers with sensible digits, tables, and figures that follow the theme."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from html import escape

from cobra.report.plots.canvas import SMALLEST_TYPE
from cobra.report.style import VARIABLES

MOST_ROWS = 1000
SMALLEST_PIXELS = 9  # of type in a figure, however narrow the screen
_PIXELS = 4 / 3  # a point
_DIGEST = re.compile(r"[0-9a-f]{16,}")


@dataclass(frozen=True)
class Table:
    """Rows behind a figure; the first column names the row."""

    header: tuple[str, ...]
    rows: list[tuple]

    def csv(self) -> bytes:
        """Every digit; what is missing is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.header, *self.rows])
        return text.getvalue().encode()


def number(value: object) -> str:
    """Three significant digits, thousands apart; a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}"
    return f"{value:.2e}"


def count(items: int, one: str, many: str | None = None) -> str:
    """1 layer, 2 layers."""
    return f"{items:,} {one if items == 1 else many or one + 's'}"


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{_class(kind)}>{escape(text)}</p>"


def table(content: Table, caption: str) -> str:
    """The first rows of a long table, and a line that says so."""
    shown = content.rows[:MOST_ROWS]
    numeric = [all(r[i] is None or isinstance(r[i], int | float) for r in content.rows) for i in range(len(content.header))]
    head = "".join(
        f'<th scope="col"{_class("number" * right)}>{escape(name)}</th>'
        for name, right in zip(content.header, numeric, strict=True)
    )
    lines = []
    for row in shown:
        name = escape(number(row[0])) if numeric[0] else escape(str(row[0])).replace(".", ".<wbr>")
        cells = [f'<th scope="row"{_class("number" * numeric[0])}>{name}</th>']
        cells += [f"<td{_class('number' * r)}>{_cell(v)}</td>" for v, r in zip(row[1:], numeric[1:], strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    if len(content.rows) > len(shown):
        caption += f" (the first {len(shown):,} of {len(content.rows):,} rows)"
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def inline_svg(svg: bytes, name: str, label: str) -> str:
    """matplotlib's SVG as part of a page: no outside names, ids of its own, colours of the theme, a label for readers."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="patch_1">.*?</g>', "", text, count=1, flags=re.DOTALL)  # the ground, which the page has
    width = float(re.search(r'width="([\d.]+)pt"', text)[1]) * _PIXELS
    text = re.sub(r"<[^>]*>", lambda tag: _themed(tag[0], name), text)
    least = width * SMALLEST_PIXELS / (SMALLEST_TYPE * _PIXELS)
    size = f"width:100%;min-width:{least:.0f}px;max-width:{width:.0f}px"
    return re.sub(r"^<svg ", f'<svg role="img" aria-label="{escape(label)}" style="{size}" ', text.strip())


def _themed(tag: str, name: str) -> str:
    if tag.startswith("<svg"):
        tag = re.sub(r' (?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", tag)
    tag = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', tag)
    tag = re.sub(r'href="#([^"]*)"', rf'href="#{name}-\1"', tag)
    tag = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var({VARIABLES[m[0]]})" if m[0] in VARIABLES else m[0], tag)


def _cell(value: object) -> str:
    text = escape(number(value))
    return f"<code>{text}</code>" if isinstance(value, str) and _DIGEST.fullmatch(value) else text


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
