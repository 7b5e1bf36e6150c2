"""A run's folder: what training appends to it, and all of it read back and checked. Every file may be missing, none broken."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cobra.merge import MergeReport, SiteReport
from cobra.plan import RankPlan
from cobra.scores import LayerScores
from cobra.storage import FormatError

Gates = dict[str, list[float]]  # group -> probability of each gate

# what of the page is made of each
FILES = {
    "scores.safetensors": "gradient against contribution, the prior, completeness",
    "plan.json": "the ranks and the posterior of the gates",
    "history.jsonl": "terms of the ELBO, the search",
    "gates.jsonl": "gates over training",
    "merge.json": "the merge",
    "eval.json": "metrics and calibration",
    "run.json": "command and settings",
}
_SITE_NUMBERS = ("delta_norm", "weight_norm", "rounding_loss")


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram: mean confidence, share of right answers, examples."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Run:
    """What a folder holds; None or empty where the file is missing.

    history: one mapping a step, ascending
    gates: step -> group -> probability of each gate, ascending
    metrics: name -> number or text
    settings: run.json
    files: name -> SHA-256 of the files that were read
    notes: what a reader should know about them
    """

    name: str
    scores: LayerScores | None = None
    plan: RankPlan | None = None
    history: list[dict] = field(default_factory=list)
    gates: dict[int, Gates] = field(default_factory=dict)
    merge: MergeReport | None = None
    metrics: dict = field(default_factory=dict)
    bins: list[Bin] = field(default_factory=list)
    settings: dict = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> dict[str, str]:
        """File -> what cannot be shown without it."""
        found = {*self.files, *(["gates.jsonl"] if self.gates else [])}
        return {name: shows for name, shows in FILES.items() if name not in found}

    @property
    def cut(self) -> int | None:
        """The first step after the ranks were cut: the plan's own, else that of the first row of another phase."""
        if not self.history:
            return None
        step = None if self.plan is None else self.plan.provenance.get("step")
        if isinstance(step, int) and self.history[0]["step"] <= step <= self.history[-1]["step"]:
            return step
        phases = [(row["step"], row["phase"]) for row in self.history if row.get("phase")]
        return next((step for step, phase in phases if phase != phases[0][1]), None)

    @property
    def fusion(self) -> str:
        """How the run's prior was made, from run.json; the product where it does not say."""
        config = self.settings.get("config")
        return str(config.get("fusion", "product")) if isinstance(config, dict) else "product"

    @classmethod
    def load(cls, folder: Path | str) -> Run:
        """Reads a folder. Raises FileNotFoundError where there is nothing to read, FormatError for a broken or foreign file."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected the folder of a run")
        paths = {name: folder / name for name in FILES if (folder / name).is_file()}
        if not paths:
            raise FileNotFoundError(f"{folder}: holds none of a run's files: {', '.join(FILES)}")
        notes: list[str] = []
        found: dict = {
            "name": folder.resolve().name,
            "files": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()},
        }
        if path := paths.get("scores.safetensors"):
            found["scores"] = _read_scores(path)
        if path := paths.get("plan.json"):
            found["plan"] = _read_plan(path)
        if path := paths.get("history.jsonl"):
            found["history"], found["gates"] = _read_history(path, notes)
        if path := paths.get("gates.jsonl"):
            found["gates"] = dict(sorted({**found.get("gates", {}), **_read_gates(path, notes)}.items()))
        if path := paths.get("merge.json"):
            found["merge"] = _read_merge(path)
        if path := paths.get("eval.json"):
            found["metrics"], found["bins"] = _read_evaluation(path)
        if path := paths.get("run.json"):
            found["settings"] = _read_object(path)
        return cls(**found, notes=tuple(notes))


def append_step(folder: Path | str, step: int, **values: float | str | None) -> None:
    """One line of history.jsonl: nll (the data's term), kl (as it was added), loss, lr, temperature, expected_rank,
    undecided (share of gates), phase ("search", then another name after the cut), or any other number."""
    _append(Path(folder) / "history.jsonl", {"step": step, **values})


def append_gates(folder: Path | str, step: int, plan: RankPlan) -> None:
    """One line of gates.jsonl: the probabilities that `adapter.extract()` found at this step."""
    gates = {site.name: [round(p, 5) for p in site.posterior] for site in plan.sites}
    _append(Path(folder) / "gates.jsonl", {"step": step, "gates": gates})


def _append(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read_scores(path: Path) -> LayerScores:
    scores = LayerScores.load(path)
    for name in ("conductance", "gradient"):
        values = getattr(scores, name)
        if not (values.isfinite().all() and (values >= 0).all()):
            raise FormatError(f"{path}: {name} must be finite and not negative; calibrate again")
    for name in ("path", "sites", "change"):
        _expect(path, f"completeness.{name}", getattr(scores.completeness, name), _is_number, "a number")
    return scores


def _read_plan(path: Path) -> RankPlan:
    plan = RankPlan.load(path)
    for site in plan.sites:
        _expect(path, "name", site.name, lambda v: isinstance(v, str), "a group's name")
        _expect(path, f"cost of {site.name}", site.cost, lambda v: isinstance(v, int), "a whole number")
        _expect(path, f"posterior of {site.name}", list(site.posterior), _are_probabilities, "probabilities")
    return plan


def _read_history(path: Path, notes: list[str]) -> tuple[list[dict], dict[int, Gates]]:
    """Rows by step; a step that was logged again, by a resumed run or in parts, counts as one."""
    rows: dict[int, dict] = {}
    gates = {}
    for at, row in _read_lines(path, notes):
        for key, value in row.items():
            if key == "gates":
                gates[row["step"]] = _gates(at, value)
            elif key == "phase":
                _expect(at, key, value, lambda v: v is None or isinstance(v, str), "a name")
            else:
                _expect(at, key, value, lambda v: v is None or _is_number(v), "a number")
        rows.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k != "gates"})
    return [rows[step] for step in sorted(rows)], gates


def _read_gates(path: Path, notes: list[str]) -> dict[int, Gates]:
    return {row["step"]: _gates(at, row.get("gates")) for at, row in _read_lines(path, notes)}


def _gates(at: str, value: object) -> Gates:
    _expect(at, "gates", value, lambda v: isinstance(v, dict), "group -> probabilities")
    for group, probabilities in value.items():
        _expect(at, f"gates of {group}", probabilities, _are_probabilities, "probabilities")
    return value


def _read_lines(path: Path, notes: list[str]) -> list[tuple[str, dict]]:
    """(file and line, object) of a JSON-lines file; a run that was killed may have left half of its last line."""
    *lines, tail = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate([*lines, tail], 1):
        at = f"{path}: line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if line is tail:
                notes.append(f"{path.name} ends in the middle of line {number}; the lines before it are shown.")
                continue
            raise FormatError(f"{at}: expected a JSON object, found {line[:60]!r}") from error
        _expect(at, "the line", row, lambda v: isinstance(v, dict), "a JSON object")
        _expect(at, "step", row.get("step"), lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number")
        found.append((at, row))
    return found


def _read_merge(path: Path) -> MergeReport:
    value = _read_object(path)
    _expect(path, "sites", value.get("sites"), lambda v: isinstance(v, list) and all(isinstance(s, dict) for s in v), "a list")
    for site in value["sites"]:
        _expect(path, "name", site.get("name"), lambda v: isinstance(v, str), "a layer's name")
        _expect(path, f"rank of {site['name']}", site.get("rank"), lambda v: isinstance(v, int), "a whole number")
        for key in _SITE_NUMBERS:
            _expect(path, f"{key} of {site['name']}", site.get(key), _is_number, "a number")
    moved = value.get("logit_difference")
    _expect(path, "logit_difference", moved, lambda v: v is None or _is_number(v), "a number")
    sites = (
        SiteReport(s["name"], s["rank"], *(float(s[key]) for key in _SITE_NUMBERS), bool(s.get("merged", True)))
        for s in value["sites"]
    )
    return MergeReport(tuple(sites), moved)


def _read_evaluation(path: Path) -> tuple[dict, list[Bin]]:
    value = _read_object(path)
    rows = value.pop("bins", None) or []
    _expect(path, "bins", rows, lambda v: isinstance(v, list) and all(isinstance(b, dict) for b in v), "a list of objects")
    for number, row in enumerate(rows):
        for key in ("confidence", "accuracy"):
            _expect(path, f"{key} of bin {number}", row.get(key), lambda v: _are_probabilities([v]), "a share from 0 to 1")
        _expect(path, f"count of bin {number}", row.get("count"), lambda v: isinstance(v, int) and v >= 0, "a whole number")
    return flatten(value), [Bin(row["confidence"], row["accuracy"], row["count"]) for row in rows]


def _read_object(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise FormatError(f"{path}: expected a JSON object, found a truncated or foreign file: {error}") from error
    _expect(path, "the file", value, lambda v: isinstance(v, dict), "a JSON object")
    return value


def flatten(value: dict, prefix: str = "") -> dict:
    """Nested mappings as one, keys joined by dots; lists stay as text."""
    found = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found |= flatten(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(item, ensure_ascii=False) if isinstance(item, list) else item
    return found


def _expect(at: Path | str, what: str, value: object, holds: Callable[[object], bool], expected: str) -> None:
    if not holds(value):
        raise FormatError(f"{at}: {what} should be {expected}, found {str(value)[:60]!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_probabilities(values: object) -> bool:
    return isinstance(values, list) and all(_is_number(v) and math.isfinite(v) and 0 <= v <= 1 for v in values)
