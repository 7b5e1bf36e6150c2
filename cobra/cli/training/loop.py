"""The training itself: transformers' Trainer with COBRA's callback, from the start or from the newest checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch.optim import AdamW
from transformers import PrinterCallback, TrainingArguments

import cobra
from cobra import storage
from cobra.checkpoint import KIND
from cobra.cli.training.budget import number_of_steps
from cobra.cli.training.folder import RunFolder, step_of
from cobra.cli.training.prepare import Subject
from cobra.cli.training.recorder import Recorder
from cobra.cli.training.settings import TrainSettings
from cobra.cli.training.signals import Interruption
from cobra.cli.training.trainer import RunTrainer
from cobra.integrations.transformers import CHECKPOINT, CobraCallback


class Fault(Exception):
    """Something went wrong that is no input's fault, or shows only in training.

    passing: whether the same run may go on where it ended, once its cause is gone
    """

    def __init__(self, message: str, passing: bool = True):
        super().__init__(message)
        self.passing = passing


def train(
    settings: TrainSettings, subject: Subject, adapter: cobra.Adapter, folder: RunFolder, interruption: Interruption
) -> int:
    """Trains, or goes on; the number of steps that were skipped."""
    start = folder.newest()
    folder.rewind(-1 if start is None else step_of(start))
    steps = number_of_steps(settings, subject)
    callback = CobraCallback(settings.share_of_search, settings.max_bad_steps)
    recorder = Recorder(folder, callback, interruption, settings.log_every, settings.save_every)
    if start is not None and step_of(start) >= steps:
        _load_last(adapter, start / CHECKPOINT)
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
        if start is not None:
            _keep_basis(adapter, start / CHECKPOINT)
        with interruption.deferred():
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
    except ValueError as error:
        raise Fault(str(error), passing=False) from error
    finally:
        recorder.close()
    return recorder.bad_steps


def _load_last(adapter: cobra.Adapter, path: Path) -> None:
    """The end of training, where the process ended after it."""
    _keep_basis(adapter, path)
    length = storage.read_tensors(path, KIND)[1]["config"]["total_steps"]
    adapter.config = replace(adapter.config, total_steps=length)
    adapter.load_checkpoint(path)


def _keep_basis(adapter: cobra.Adapter, path: Path) -> None:
    """A run begun when budgets below an average rank of 1 were cut by gates ends so."""
    if path.is_file():
        adapter.config = replace(adapter.config, basis=storage.read_tensors(path, KIND)[1]["config"].get("basis", "gates"))


def _arguments(settings: TrainSettings, subject: Subject, folder: RunFolder, steps: int) -> TrainingArguments:
    on_gpu = next(subject.model.parameters()).is_cuda
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
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


def _loggers(settings: TrainSettings, folder: RunFolder) -> list:
    if settings.report_to is None:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))]
