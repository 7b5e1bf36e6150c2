"""`cobra train`: calibrate, attach, train, cut, evaluate, save; every stage leaves its file, from which a run goes on."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers

import cobra
from cobra import LayerScores, storage
from cobra.cli.base import with_class
from cobra.cli.shell import note
from cobra.cli.training import folder as names
from cobra.cli.training.budget import adapter_config, number_of_steps
from cobra.cli.training.configfile import write_config
from cobra.cli.training.evaluation import evaluate
from cobra.cli.training.folder import RunFolder
from cobra.cli.training.loop import Fault, train
from cobra.cli.training.options import command_line
from cobra.cli.training.prepare import Subject, fit_head, prepare
from cobra.cli.training.settings import TrainSettings
from cobra.cli.training.signals import Interruption
from cobra.lora import class_name
from cobra.report.page import write_report


@dataclass
class Stages:
    """Wall-clock seconds by stage, this start's alone."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 2)


def run_training(settings: TrainSettings, resume: bool, interruption: Interruption) -> dict:
    """Trains as the settings say, and returns what result.json holds.

    Raises ValueError and OSError for input that does not fit, before anything is written; `Fault` for what happens later;
    `Interrupted`.
    """
    folder, stages = RunFolder(settings.out), Stages()
    if resume and (folder / names.RESULT).is_file():
        return folder.read(names.RESULT)
    if resume:
        folder.check_checkpoints()
        folder.check_files()
    with stages.of("load"):
        subject = prepare(settings)
        config = adapter_config(settings, subject)
        scores = None if settings.scores is None else LayerScores.load(settings.scores)
        cobra.attach(subject.model, config, scores).detach()  # what it refuses, it refuses before the long work
        if _calibrates(settings, config) and scores is None and not (folder / names.SCORES).is_file():
            _check_calibration(settings, subject, config)
    if resume:
        _check_same_data(folder, subject)
    else:
        folder.make()
    try:
        return _run(settings, subject, config, folder, stages, interruption)
    except FloatingPointError as error:
        raise Fault(str(error), passing=False) from error
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise Fault(str(error)) from error


def _run(
    settings: TrainSettings,
    subject: Subject,
    config: cobra.CobraConfig,
    folder: RunFolder,
    stages: Stages,
    interruption: Interruption,
) -> dict:
    folder.tidy()
    write_config(folder / names.CONFIG, settings)
    record = _record(settings, subject, config)
    storage.write_json(folder / names.RUN, record)
    with stages.of("fit the head"):
        notes = [*filter(None, (*subject.notes, fit_head(subject)))]
    for text in notes:
        note(text)
    test, architecture = subject.batches(subject.test, settings.eval_batch_size), class_name(type(subject.model))
    with stages.of("evaluate before"):
        before = _before(folder, subject, test)
    scores = None
    if settings.scores is not None or _calibrates(settings, config):
        with stages.of("calibrate"):
            scores = _scores(settings, subject, folder, config)
    adapter = cobra.attach(subject.model, config, scores)
    with stages.of("train"):
        bad_steps = train(settings, subject, adapter, folder, interruption)
    adapter.plan.save(folder / names.PLAN)
    with_class(adapter.to_lora(), architecture, subject.model.config).save_pretrained(folder / "adapter", settings.layout)
    with stages.of("evaluate"):
        after = evaluate(subject.model, test, subject.task, "evaluate")
    storage.write_json(folder / "eval.json", {**after.to_dict(), "before": before})
    result = {
        "run": str(folder.path),
        "model": subject.words,
        "architecture": architecture,
        "task": subject.task,
        "rows": {"train": len(subject.train), "test": len(subject.test)},
        "steps": number_of_steps(settings, subject),
        "bad_steps": bad_steps,
        "before": before,
        "after": after.metrics,
        "ranks": adapter.plan.total,
        "layers": {"all": len(adapter.plan.ranks), "without rank": sum(not r for r in adapter.plan.ranks.values())},
        "parameters": adapter.trainable_parameters(),
        "path residual": scores.completeness.path if scores is not None and scores.completeness.change else None,
        "notes": notes,
    }
    if settings.merge:
        with stages.of("merge"):
            result["merge"] = _merge(subject, adapter, folder, test[0])
    storage.write_json(folder / names.RUN, record | {"config": adapter.config.to_dict(), "seconds": stages.seconds})
    if settings.report:
        with stages.of("report"):
            result["report"] = str(folder / "report" / "index.html")
            write_report(folder.path)
    result["seconds"] = stages.seconds
    storage.write_json(folder / names.RESULT, result)
    return result


# stages


def _calibrates(settings: TrainSettings, config: cobra.CobraConfig) -> bool:
    return settings.method == "cobra" and config.reads_scores


def _check_calibration(settings: TrainSettings, subject: Subject, config: cobra.CobraConfig) -> None:
    """Raises ValueError where the model cannot be calibrated, as one step on two rows tells, with what needs no calibration."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one step
            cobra.calibrate(
                subject.model,
                subject.batches(subject.train[:2], 2),
                steps=1,
                estimator=settings.estimator,
                baseline=settings.baseline,
                target_modules=config.target_modules,
                progress=False,
            )
    except ValueError as error:
        raise ValueError(f"{error}; or train without a calibration: --preset singular, or --method lora") from error


def _before(folder: RunFolder, subject: Subject, test: list) -> dict:
    path = folder / names.BEFORE
    if not path.is_file():
        storage.write_json(path, evaluate(subject.model, test, subject.task, "evaluate before").metrics)
    return folder.read(names.BEFORE)


def _scores(settings: TrainSettings, subject: Subject, folder: RunFolder, config: cobra.CobraConfig) -> LayerScores:
    path = folder / names.SCORES
    if not path.is_file():
        if settings.scores is not None:
            scores = LayerScores.load(settings.scores)
        else:
            rows = subject.train[: settings.calibration_examples]
            scores = cobra.calibrate(
                subject.model,
                subject.batches(rows, settings.calibration_batch_size),
                steps=settings.calibration_steps,
                estimator=settings.estimator,
                baseline=settings.baseline,
                granularity=settings.granularity,
                max_examples=settings.calibration_examples,
                target_modules=config.target_modules,
                directions=config.r_max if config.init != "uniform" or config.prior_level == "rank" else 0,
            )
        scores.save(path)
    return LayerScores.load(path)


def _merge(subject: Subject, adapter: cobra.Adapter, folder: RunFolder, probe: dict) -> dict:
    """Writes merged/ and merge.json."""
    report = adapter.merge(probe=probe)
    with storage.new_folder(folder / "merged") as fresh:
        subject.model.save_pretrained(fresh)
        subject.tokenizer.save_pretrained(fresh)
    storage.write_json(folder / "merge.json", asdict(report))
    return {"rounding loss": report.worst_rounding_loss, "logit difference": report.logit_difference}


# run.json


def _record(settings: TrainSettings, subject: Subject, config: cobra.CobraConfig) -> dict:
    return {
        "command": command_line("train", settings),
        "config": config.to_dict(),
        "settings": asdict(settings),
        "seed": settings.seed,
        "data": subject.fingerprints,
        "versions": {
            "cobra-peft": cobra.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _check_same_data(folder: RunFolder, subject: Subject) -> None:
    saved = (folder.read(names.RUN) if (folder / names.RUN).is_file() else {}).get("data", {})
    for name, fingerprint in subject.fingerprints.items():
        older = saved.get(Path(name).name, fingerprint)  # files were told apart by their names alone once
        if saved.get(name, older if len(saved) == len(subject.fingerprints) else fingerprint) != fingerprint:
            raise ValueError(f"{name} has changed since {folder.path} began: its SHA-256 is another; begin a new run")
