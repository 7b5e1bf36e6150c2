"""Rows on disk: one JSON object a line, appended whole under a lock, and the runs that somebody is at."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROWS = Path(__file__).parent / "rows"
CLAIMS = Path("runs/evidence-claims")


def read_rows(folder: Path = ROWS) -> list[dict]:
    """Rows of every run in the folder. Raises ValueError naming file and line of one that is not JSON."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(_lines(path), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}:{number} is not a row ({error}); delete the line and run it again") from error
            if "phase" in row:  # the folder holds the diagnosis too
                rows.append(row)
    return rows


def _lines(path: Path) -> list[str]:
    """Whole lines: no writer is in the middle of one."""
    with open(path, encoding="utf-8") as f:
        fcntl.flock(f, fcntl.LOCK_SH)
        return list(f)


def append_row(row: dict, folder: Path = ROWS) -> None:
    """Adds one line to the phase's file; concurrent writers take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{row['phase']}.jsonl", "a", encoding="utf-8") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(json.dumps(row, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def claim(key: str, folder: Path = CLAIMS) -> Iterator[bool]:
    """Whether this process may run the key now; the claim ends with the block or with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / key, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
