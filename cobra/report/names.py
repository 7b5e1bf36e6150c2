"""Layers in figures: names short enough to print, and the grid they stand in."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cobra.sites import block_of

MOST_COLUMNS = 40
_LONGEST = 34


def plain(name: object) -> str:
    """One line that matplotlib prints as it is: no mathematics between dollar signs, nothing longer than an axis."""
    text = "".join(c if c.isprintable() else " " for c in str(name))
    longest = _LONGEST * len(text) // max(1, letters(text))
    if len(text) > longest:
        text = f"{text[: longest // 2 - 1]}…{text[-longest // 2 :]}"
    return text.replace("$", r"\$")


def letters(text: str) -> int:
    """Width in Latin letters; letters of East Asia take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def short_names(names: Iterable[str]) -> list[str]:
    """Block number and module, or the whole names where that does not tell them apart."""
    names = list(names)
    blocks = _short_blocks([block_of(name) for name in names])
    short = [name if block_of(name) == name else f"{b}.{within_block(name)}" for name, b in zip(names, blocks, strict=True)]
    return [plain(name) for name in (short if len(set(short)) == len(set(names)) else names)]


def within_block(name: str) -> str:
    return name[len(block_of(name)) :].lstrip(".") or name


def _short_blocks(blocks: list[str]) -> list[str]:
    """Numbers alone where all numbered blocks stand in one stack; encoder.0 and decoder.0 where there are several."""
    numbered = {block: re.fullmatch(r"(?:(.*)\.)?(\d+)", block) for block in blocks}
    stacks = {match[1] for match in numbered.values() if match}
    if len(stacks) <= 1:
        return [match[2] if (match := numbered[block]) else block for block in blocks]
    return [f"{(match[1] or '').split('.')[0]}.{match[2]}" if (match := numbered[block]) else block for block in blocks]


@dataclass(frozen=True)
class Grid:
    """values: (rows, columns), NaN where there is no layer; columns: None where a column has no meaning of its own"""

    values: np.ndarray
    rows: list[str]
    columns: list[str] | None
    row_label: str
    column_label: str


def grid(values: dict[str, float]) -> Grid:
    """Blocks by modules where names make such a grid; blocks by position where they do not; else a list, folded if long."""
    blocks = list(dict.fromkeys(map(block_of, values)))
    modules = list(dict.fromkeys(map(within_block, values)))
    sizes = Counter(map(block_of, values))
    if len(blocks) == len(values):
        return _folded(values)
    labels = [plain(b) for b in _short_blocks(blocks)]
    if len(modules) <= MOST_COLUMNS and len(blocks) * len(modules) <= 4 * len(values):
        cells = np.full((len(blocks), len(modules)), np.nan)
        for name, value in values.items():
            cells[blocks.index(block_of(name)), modules.index(within_block(name))] = value
        return Grid(cells, labels, [plain(m) for m in modules], "block", "")
    if len(blocks) * max(sizes.values()) <= 4 * len(values) and max(sizes.values()) <= MOST_COLUMNS * len(blocks):
        cells, seen = np.full((len(blocks), max(sizes.values())), np.nan), Counter()
        for name, value in values.items():
            cells[blocks.index(block_of(name)), seen[block_of(name)]] = value
            seen[block_of(name)] += 1
        return Grid(cells, labels, None, "block", "layer within the block")
    return _folded(values)


def _folded(values: dict[str, float]) -> Grid:
    if len(values) <= MOST_COLUMNS:
        return Grid(np.array([*values.values()], float)[:, None], short_names(values), [""], "", "")
    width = math.ceil(math.sqrt(2 * len(values)))
    cells = np.full(-(-len(values) // width) * width, np.nan)
    cells[: len(values)] = [*values.values()]
    rows = [str(i) for i in range(0, len(values), width)]
    return Grid(cells.reshape(-1, width), rows, None, "index of the row's first layer", "layers in the model's order")
