"""`cobra train`: calibrate, attach, train, cut, evaluate, save; every stage leaves its file, from which a run goes on."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import transformers
from torch.optim import AdamW
from transformers import PrinterCallback, TrainingArguments

import cobra
from cobra import Budget, LayerScores, storage
from cobra.checkpoint import KIND
from cobra.cli.shell import note
from cobra.cli.training import folder as names
from cobra.cli.training.configfile import write_config
from cobra.cli.training.evaluation import evaluate
from cobra.cli.training.folder import RunFolder, step_of
from cobra.cli.training.options import command_line
from cobra.cli.training.prepare import Subject, fit_head, prepare
from cobra.cli.training.recorder import Recorder
from cobra.cli.training.settings import AVERAGE_RANK, TrainSettings
from cobra.cli.training.signals import Interruption
from cobra.cli.training.trainer import RunTrainer
from cobra.integrations.transformers import CHECKPOINT, CobraCallback
from cobra.plan import rank_cost
from cobra.report.page import write_report
from cobra.sites import block_of, find_sites


class Fault(Exception):
    """Something went wrong that is no input's fault, or shows only in training.

    passing: whether the same run may go on where it ended, once its cause is gone
    """

    def __init__(self, message: str, passing: bool = True):
        super().__init__(message)
        self.passing = passing


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
        return json.loads((folder / names.RESULT).read_bytes())
    with stages.of("load"):
        subject = prepare(settings)
        config = _config(settings, subject)
        scores = None if settings.scores is None else LayerScores.load(settings.scores)
        cobra.attach(subject.model, config, scores).detach()  # what it refuses, it refuses before the long work
    if resume:
        _check_same_data(folder, subject)
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
    write_config(folder / names.CONFIG, settings)
    record = _record(settings, subject, config)
    storage.write_json(folder / names.RUN, record)
    with stages.of("fit the head"):
        notes = [*filter(None, (*subject.notes, fit_head(subject)))]
    for text in notes:
        note(text)
    test = subject.batches(subject.test, settings.eval_batch_size)
    with stages.of("evaluate before"):
        before = _before(folder, subject, test)
    scores = None
    if settings.method == "cobra":
        with stages.of("calibrate"):
            scores = _scores(settings, subject, folder)
    adapter = cobra.attach(subject.model, config, scores)
    with stages.of("train"):
        bad_steps = _train(settings, subject, adapter, folder, interruption)
    adapter.plan.save(folder / names.PLAN)
    adapter.save_pretrained(folder / "adapter", settings.layout)
    with stages.of("evaluate"):
        after = evaluate(subject.model, test, subject.task, "evaluate")
    storage.write_json(folder / "eval.json", {**after.to_dict(), "before": before})
    result = {
        "run": str(folder.path),
        "model": subject.words,
        "task": subject.task,
        "rows": {"train": len(subject.train), "test": len(subject.test)},
        "steps": _steps(settings, subject),
        "bad_steps": bad_steps,
        "before": before,
        "after": after.metrics,
        "ranks": adapter.plan.total,
        "layers": {"all": len(adapter.plan.ranks), "without rank": sum(not r for r in adapter.plan.ranks.values())},
        "parameters": adapter.trainable_parameters(),
        "path residual": None if scores is None else scores.completeness.path,
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


# budget


def _config(settings: TrainSettings, subject: Subject) -> cobra.CobraConfig:
    """The adapter's, with the whole budget; raises ValueError where it does not reach for one rank a layer of plain LoRA."""
    search = max(1, round(settings.search_share * _steps(settings, subject)))
    plain = settings.config(0, total_steps=search)
    shapes: dict[str, list[tuple[int, int]]] = {}
    for site in find_sites(subject.model, plain.target_modules):
        group = block_of(site.name) if settings.granularity == "block" else site.name
        shapes.setdefault(group, []).append((site.in_features, site.out_features))
    costs = [rank_cost(settings.unit, group) for group in shapes.values()]
    amount = AVERAGE_RANK * sum(costs) if settings.budget is None else settings.budget
    if settings.method == "cobra":
        budget = Budget(amount, settings.unit, multiple=settings.multiple, tied=settings.tied)
        return replace(plain, rank_budget=budget)
    rank = amount // sum(costs)
    if rank < 1:
        raise ValueError(f"budget={amount} {settings.unit}: one rank in each of {len(costs)} layers takes {sum(costs)}")
    ranks = sum(min(rank, *(min(shape) for shape in group)) for group in shapes.values())
    return replace(plain, rank_budget=ranks, r_max=rank)


def _steps(settings: TrainSettings, subject: Subject) -> int:
    a_pass = math.ceil(math.ceil(len(subject.train) / settings.batch_size) / settings.accumulation)
    return settings.steps or max(1, math.ceil(settings.epochs * a_pass))


# stages


def _before(folder: RunFolder, subject: Subject, test: list) -> dict:
    path = folder / names.BEFORE
    if not path.is_file():
        storage.write_json(path, evaluate(subject.model, test, subject.task, "evaluate before").metrics)
    return json.loads(path.read_bytes())


def _scores(settings: TrainSettings, subject: Subject, folder: RunFolder) -> LayerScores:
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
                target_modules=settings.config(0, total_steps=1).target_modules,
            )
        scores.save(path)
    return LayerScores.load(path)


def _train(
    settings: TrainSettings, subject: Subject, adapter: cobra.Adapter, folder: RunFolder, interruption: Interruption
) -> int:
    """Trains, or goes on; the number of steps that were skipped."""
    folder.prune()
    start = folder.newest()
    folder.rewind(-1 if start is None else step_of(start))
    steps = _steps(settings, subject)
    callback = CobraCallback(settings.search_share, settings.max_bad_steps)
    recorder = Recorder(folder, callback, interruption, settings.log_every, settings.save_every)
    if start is not None and step_of(start) >= steps:
        _load(adapter, start / CHECKPOINT)
        return recorder.bad_steps
    trainer = RunTrainer(
        model=subject.model,
        args=_arguments(settings, subject, folder, steps),
        data_collator=subject.collator,
        train_dataset=subject.train,
        callbacks=[callback, recorder, *_loggers(settings, folder)],
        optimizers=(AdamW(adapter.parameter_groups(settings.lr, settings.weight_decay)), None),
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with interruption.deferred():
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
    except ValueError as error:
        raise Fault(str(error), passing=False) from error
    finally:
        recorder.close()
    return recorder.bad_steps


def _load(adapter: cobra.Adapter, path: Path) -> None:
    """The end of training, where the process ended after it."""
    length = storage.read_tensors(path, KIND)[1]["config"]["total_steps"]
    adapter.config = replace(adapter.config, total_steps=length)
    adapter.load_checkpoint(path)


def _arguments(settings: TrainSettings, subject: Subject, folder: RunFolder, steps: int) -> TrainingArguments:
    on_gpu = next(subject.model.parameters()).is_cuda
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule if settings.warmup_steps == 0 else _with_warmup(settings.schedule),
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        bf16=settings.precision == "bf16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
    )


def _with_warmup(schedule: str) -> str:
    return "constant_with_warmup" if schedule == "constant" else schedule


def _loggers(settings: TrainSettings, folder: RunFolder) -> list:
    if settings.report_to is None:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))]


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
    path = folder / names.RUN
    saved = json.loads(path.read_bytes()) if path.is_file() else {}
    for name, fingerprint in subject.fingerprints.items():
        if saved.get("data", {}).get(name, fingerprint) != fingerprint:
            raise ValueError(f"{name} has changed since {folder.path} began: its SHA-256 is another; begin a new run")
