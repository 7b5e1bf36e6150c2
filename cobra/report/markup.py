"""Pieces of a page: text that is escaped, numbers with sensible digits, tables, and figures that follow the theme."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from html import escape

from cobra.report.style import VARIABLES

MOST_ROWS = 1000
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
        cells = [f'<th scope="row"{_class("number" * numeric[0])}>{escape(number(row[0]))}</th>']
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


def inline_svg(svg: bytes, name: str, title: str) -> str:
    """matplotlib's SVG as part of a page: no outside names, ids of its own, colours of the theme, a title for readers."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    width = float(re.search(r'width="([\d.]+)pt"', text)[1]) * 4 / 3
    text = re.sub(r"<[^>]*>", lambda tag: _themed(tag[0], name), text)
    size = f"width:100%;min-width:{min(width, 520):.0f}px;max-width:{width:.0f}px"
    opened = f'<svg role="img" aria-labelledby="{name}-title" style="{size}" '
    text = re.sub(
        r"<svg ([^>]*)>", lambda m: f'{opened}{m[1]}>\n<title id="{name}-title">{escape(title)}</title>', text, count=1
    )
    return text.strip()


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
