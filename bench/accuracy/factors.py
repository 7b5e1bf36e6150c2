"""The studies of factors and ablations: settings that differ from the reference in one thing, judged on validation."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.accuracy.cells import METRIC, Place, cell_of, differing, flat, higher_is_better, of_phase
from bench.accuracy.forms import REFERENCES, UNSAID
from bench.accuracy.intervals import Estimate, mean_of, seeds_estimate


@dataclass(frozen=True)
class Effect:
    """What a change of the reference's settings brings on validation.

    form: whose parts an ablation changes; "" in a study of factors, and for settings of no form
    changed: "name: reference → value", or "" for the reference itself
    gains: by task, positive where the change is better: accuracy as a fraction, or the relative fall of the loss; for the
        reference its level
    mean: over all tasks of the study, None where one is missing
    training: by how much the loss of the last training steps rises, relative to the reference's, averaged over pairs of runs;
        its level for the reference; None without pairs
    runs: pairs of runs compared; diverged: runs of these settings that did
    """

    place: Place
    kind: str
    form: str
    changed: str
    gains: dict[str, Estimate]
    mean: Estimate | None
    training: float | None
    runs: int
    diverged: int


def effects(rows: Sequence[dict], phase: str = "factor") -> list[Effect]:
    """For every place, kind of task and method of an ablation the reference, then its changes, best first.

    The reference is the form itself (`bench.accuracy.forms`), of several rates at that of the first row, which is the search's
    as a study begins with it; or where there is none the configuration from which the others differ in the fewest fields, of
    equal ones that with the fewest settings. It too must be of the phase.
    """
    studies, failed = _studies(rows, phase)
    found = []
    for study, configs in sorted(studies.items()):
        for reference, near in _references(configs).items():
            place = (*study[:2], _form(json.loads(reference)) if phase == "ablation" else "")
            effect = {config: _effect(place, configs, config, reference, failed[study[1], config]) for config in near}
            changes = [effect[config] for config in near if config != reference]
            changes.sort(key=lambda e: (e.mean is None, -e.mean.mean if e.mean else 0.0, e.changed))
            found += [effect[reference], *changes]
    return found


def row_lengths(rows: Sequence[dict]) -> list[tuple[str, Effect]]:
    """What another length of lora_A's rows brings alone, in every ablation that has it: beside the same settings without.

    Each with what those settings change of the form, "" for the form itself.
    """
    found = []
    for study, configs in sorted(_studies(rows, "ablation")[0].items()):
        form = _reference(configs)
        for config in configs:
            usual = json.loads(config)
            other = usual["settings"].pop("row_scale", None)
            beside = json.dumps(usual, sort_keys=True)
            if other is not None and beside in configs:
                place = (*study[:2], _form(json.loads(form)))
                parts = "" if beside == form else _changed(json.loads(form), usual)
                found.append((parts, _effect(place, configs, config, beside, 0)))
    return found


def _studies(rows: Sequence[dict], phase: str) -> tuple[dict, dict]:
    """Study -> settings -> (task, seed) -> row; and how many runs diverged, by kind and settings."""
    studies = defaultdict(lambda: defaultdict(dict))
    failed = defaultdict(int)
    for row in of_phase(rows, phase):
        studies[_study(row)][_settings(row)][row["task"], row["seed"]] = row
    for row in of_phase(rows, phase, diverged=True):
        studies[_study(row)].setdefault(_settings(row), {})
        failed[row["kind"], _settings(row)] += 1
    return studies, failed


def _study(row: dict) -> tuple[Place, str, str]:
    return cell_of(row).place, row["kind"], row["method"] if row["phase"] == "ablation" else ""


def _settings(row: dict) -> str:
    return json.dumps({k: v for k, v in row["config"].items() if k not in ("phase", "task", "seed")}, sort_keys=True)


def _reference(configs: dict[str, dict]) -> str:
    read = {text: json.loads(text) for text in configs}
    if forms := [text for text in configs if _form(read[text])]:
        return forms[0]

    def distance(text: str) -> tuple[int, int, int, str]:
        differences = sum(len(differing(read[text], other)) for other in read.values())
        return differences, -len(configs[text]), len(read[text]["settings"]), text

    return min(configs, key=distance)


def _references(configs: dict[str, dict]) -> dict[str, list[str]]:
    """The reference, and other forms that some settings are nearer to: each with the other forms and what is no nearer to
    those."""
    read, main = {text: json.loads(text) for text in configs}, _reference(configs)
    first = {_form(read[text]): text for text in reversed(configs)}
    forms = [main, *(text for name, text in sorted(first.items()) if name not in ("", _form(read[main])))]
    away = {text: [len(differing(read[form], read[text])) for form in forms] for text in configs if text not in forms}
    found = {}
    for i, form in enumerate(forms):
        alike = [text for text, steps in away.items() if steps[i] == min(steps)]
        if form == main or any(away[text].count(away[text][i]) == 1 for text in alike):
            found[form] = forms + alike
    return found


def _form(config: dict) -> str:
    return next((name for name, forms in REFERENCES.items() if config["settings"] in forms), "")


def _effect(study: tuple[Place, str, str], configs: dict, config: str, reference: str, diverged: int) -> Effect:
    ours, theirs = configs[config], configs[reference]
    by_task = defaultdict(list)
    for run in sorted(ours.keys() & theirs.keys()):
        by_task[run[0]].append(_value(theirs[run]) if config == reference else _gain(ours[run], theirs[run]))
    gains = {task: seeds_estimate(values) for task, values in by_task.items()}
    tasks = sorted({task for task, _ in theirs})
    mean = mean_of([gains[task] for task in tasks]) if gains and all(task in gains for task in tasks) else None
    changed = "" if config == reference else _changed(json.loads(reference), json.loads(config))
    pairs = [(ours[run]["train_loss"], theirs[run]["train_loss"]) for run in sorted(ours.keys() & theirs.keys())]
    training = fmean(mine if config == reference else mine / other - 1 for mine, other in pairs) if pairs else None
    return Effect(*study, changed, gains, mean, training, len(pairs), diverged)


def _value(row: dict) -> float:
    return row["validation"][METRIC[row["kind"]]]


def _gain(ours: dict, theirs: dict) -> float:
    if higher_is_better(ours["kind"]):
        return _value(ours) - _value(theirs)
    return 1 - _value(ours) / _value(theirs)


def _changed(reference: dict, config: dict) -> str:
    """Another method is named without its settings, which have no counterpart."""
    if reference["method"] != config["method"]:
        reference, config = {**reference, "settings": {}}, {**config, "settings": {}}
    ours, theirs = flat(config), flat(reference)
    return "; ".join(f"{name}: {_shown(theirs, name)} → {_shown(ours, name)}" for name in sorted(differing(reference, config)))


def _shown(config: dict, name: str) -> str:
    if name not in config:
        return str(UNSAID.get(name, "default"))
    return f"{config[name]:g}" if isinstance(config[name], float) else str(config[name])
