"""The folder of a run: its files, its checkpoints, and what a resumed run may find there."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cobra import storage
from cobra.integrations.transformers import CHECKPOINT
from cobra.storage import FormatError

CONFIG, RUN, BEFORE, RESULT = "config.yaml", "run.json", "before.json", "result.json"
SCORES, PLAN, HISTORY, GATES = "scores.safetensors", "plan.json", "history.jsonl", "gates.jsonl"
HALF_WRITTEN = ".*.tmp"  # as cobra.storage names what is not yet whole
# of damaged files -> the way out
MENDED = {
    RUN: "put back a copy, or delete it: its data is then taken for unchanged",
    BEFORE: "put back a copy, or delete it: it is then measured again",
    RESULT: "put back a copy, or delete it: --resume then ends the run again, from its last checkpoint",
}
KEPT = 2  # the one before the newest is whole while that is written


class RunFolder:
    """Paths of a run and what is done to its files."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def empty(self) -> bool:
        """Whether it is not there yet, or holds nothing but what a kill left half written."""
        if not self.path.is_dir():
            return not self.path.exists()
        return set(self.path.iterdir()) == set(self.path.glob(HALF_WRITTEN))

    def make(self) -> None:
        """Raises OSError, naming the option, where no run can be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{self.path}: {error.strerror or error}; name a folder that can be made with --out") from error
        if not os.access(self.path, os.W_OK):
            raise PermissionError(f"{self.path} is not writable; name another folder with --out")

    def complete(self) -> list[Path]:
        """Checkpoints from which training goes on, oldest first: their last file is there, and whole."""
        return [folder for folder in self._all() if _whole(folder / CHECKPOINT)]

    def newest(self) -> Path | None:
        return (self.complete() or [None])[-1]

    def check_checkpoints(self) -> None:
        """Warns of damaged checkpoints after the newest complete one; raises ValueError where all of them are damaged."""
        newest = self.newest()
        for folder in self._all():
            if not (folder / CHECKPOINT).is_file() or (newest is not None and step_of(folder) <= step_of(newest)):
                continue
            if newest is None:
                raise ValueError(
                    f"{folder / CHECKPOINT} is damaged, and no other checkpoint is whole: put back a copy, or delete "
                    f"{self.checkpoints} to train from the first step"
                )
            warnings.warn(f"{folder / CHECKPOINT} is damaged: going on from step {step_of(newest):,}", stacklevel=2)

    def check_files(self) -> None:
        """Raises FormatError for a damaged file that going on reads, before the work, and deletes nothing."""
        for name in (RUN, BEFORE):
            if (self.path / name).is_file():
                self.read(name)
        for name in (HISTORY, GATES):
            self._lines(name)

    def read(self, name: str) -> dict:
        """A JSON object of the run. Raises FormatError naming the file and the way out."""
        path = self.path / name
        try:
            value = json.loads(path.read_bytes())
        except ValueError as error:
            raise FormatError(f"{path} is damaged, {error}: {MENDED[name]}") from error
        if not isinstance(value, dict):
            raise FormatError(f"{path}: expected a JSON object, found {str(value)[:40]!r}: {MENDED[name]}")
        return value

    def prune(self) -> None:
        """Leaves the newest complete checkpoints, and nothing that was begun and not finished."""
        kept = self.complete()[-KEPT:]
        for folder in self._all():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def tidy(self) -> None:
        """Takes away what a kill left half written, of checkpoints and of files."""
        self.prune()
        for path in self.path.glob(HALF_WRITTEN):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def rewind(self, step: int) -> None:
        """Takes out of history and gates what was written after a step, and what a kill left half written."""
        for name in (HISTORY, GATES):
            if (self.path / name).is_file():
                kept = [line for row, line in self._lines(name) if row["step"] <= step]
                storage.write_bytes(self.path / name, b"".join(line + b"\n" for line in kept))

    def history(self) -> list[dict]:
        return [row for row, _ in self._lines(HISTORY)]

    def _lines(self, name: str) -> list[tuple[dict, bytes]]:
        """Rows of a file of lines, and the lines; the one that a kill left half written is left out.

        Raises FormatError naming the first that is no row, and the way out.
        """
        path = self.path / name
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        return [(_row(line, f"{path}: line {number}"), line) for number, line in enumerate(lines, 1) if line.strip()]

    def _all(self) -> list[Path]:
        return sorted(self.checkpoints.glob("checkpoint-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _whole(path: Path) -> bool:
    """Whether a safetensors file is there, with a header that says its length."""
    try:
        with safe_open(path, framework="numpy"):
            return True
    except (SafetensorError, FileNotFoundError):
        return False


def _row(line: bytes, at: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
        raise FormatError(f"{at} is damaged, {line[:40]!r}: put back a copy of the file, or delete the line and lose it alone")
    return row
