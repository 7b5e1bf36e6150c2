"""How results show themselves in a notebook."""

from __future__ import annotations

from html import escape


def folded_table(result: object, table: str) -> str:
    """HTML: what `repr` says, and the table behind a line that opens it."""
    return f"<p>{escape(repr(result))}</p><details><summary>table</summary><pre>{escape(table)}</pre></details>"
