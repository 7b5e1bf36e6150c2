"""Which settings hold: the command line over a file, over what a resumed run began with."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from cobra.cli.training.configfile import read_config
from cobra.cli.training.folder import CONFIG, RESULT, RunFolder
from cobra.cli.training.options import given_settings
from cobra.cli.training.settings import TrainSettings
from cobra.storage import FormatError

CALIBRATION = ("estimator", "baseline", "calibration_examples", "calibration_steps", "calibration_batch_size")


def settle(given: dict[str, Any], config: Path | None, resume: bool) -> TrainSettings:
    """given: options of the command line; config: a YAML file

    Raises FileNotFoundError and ValueError: for keys and values that do not fit, a folder that is not new, and a resumed run
    that is told something else than it began with, naming the setting.
    """
    values = {} if config is None else read_config(config, TrainSettings)
    values |= given_settings(given, TrainSettings)
    out = Path(values.get("out", next(each.default for each in fields(TrainSettings) if each.name == "out")))
    if resume:
        return _resumed(values, out)
    settings = TrainSettings(**values)
    _check_calibrates(settings, given)
    if not RunFolder(out).empty():
        raise ValueError(f"{out} is there and not empty: name a new folder with --out, or go on with its run: --resume")
    return settings


def _check_calibrates(settings: TrainSettings, given: dict[str, Any]) -> None:
    """Raises ValueError for settings of a calibration that is not made: options, and keys of a file that are no defaults.

    Plain LoRA takes them and makes none: methods are compared by one option.
    """
    if settings.scores is not None:
        why = "the scores are measured already"
    elif not settings.config(0, total_steps=1).reads_scores:
        why = "nothing is calibrated for ranks and gates that read no scores"
    else:
        return
    for name in CALIBRATION:
        if name in given or getattr(settings, name) != getattr(TrainSettings, name):
            raise ValueError(f"{name}={getattr(settings, name)!r} changes nothing, as {why}: leave {name} out")


def _resumed(values: dict[str, Any], out: Path) -> TrainSettings:
    if not (out / CONFIG).is_file():
        raise FileNotFoundError(f"{out / CONFIG}: no such file; --resume goes on with the run in --out, and there is none")
    saved = read_config(out / CONFIG, TrainSettings)
    if "model" not in saved:
        raise FormatError(f"{out / CONFIG} is damaged, it names no model: put back a copy")
    free = {each.name for each in fields(TrainSettings) if each.metadata.get("free")}
    for name, value in values.items():
        if name not in free and value != saved.get(name):
            raise ValueError(
                f"{name} was {saved.get(name)!r} when the run in {out} began, and is {value!r} now: leave it out to go on, or "
                "begin a new run with another --out"
            )
    if (out / RESULT).is_file():
        _check_has(out, values, saved)
    return TrainSettings(**{**saved, **{name: value for name, value in values.items() if name in free}})


def _check_has(out: Path, values: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises ValueError for what is asked of a finished run and was not made, and says which command makes it."""
    adapter, ways = str(out / "adapter"), {}
    if values.get("merge") and not (out / "merged").is_dir():
        ways["merge"] = ["cobra", "merge", saved["model"], adapter, "--out", str(out / "merged")]
    layout = values.get("layout", saved.get("layout"))
    if layout != saved.get("layout"):
        ways["layout"] = ["cobra", "export", adapter, "--layout", layout, "--out", f"{adapter}-{layout}"]
    for name, made in (("report", (out / "report").is_dir()), ("report_to", values.get("report_to") == saved.get("report_to"))):
        if values.get(name) and not made:
            ways[name] = ["cobra", "report", str(out)]
    if ways:
        told = "; ".join(f"for {name}: {shlex.join(words)}" for name, words in ways.items())
        raise ValueError(f"the run in {out} is finished, without {', '.join(ways)}, and --resume adds nothing to it; {told}")
