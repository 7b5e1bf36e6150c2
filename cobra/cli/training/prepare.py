"""From settings to a model and its rows: what `cobra train` and `cobra calibrate` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from cobra.cli.subject import Source, find_model
from cobra.cli.training.data import Split, check_task, find_targets, read_rows, read_split
from cobra.cli.training.model import HEAD_EXAMPLES, fit_new_head, load_model
from cobra.cli.training.settings import SubjectSettings, TrainSettings
from cobra.cli.training.tokens import (
    Collator,
    Row,
    batches_of,
    collator_of,
    cut_rows,
    labelled_rows,
    language_rows,
    padded_tokenizer,
)


@dataclass(frozen=True)
class Subject:
    """What is trained or measured.

    words: the model's name; outputs: of a new head, None where the model has its own
    notes: what a reader should know about the rows
    """

    words: str
    task: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    train: list[Row]
    test: list[Row]
    collator: Collator
    outputs: int | None
    fingerprints: dict[str, str]
    notes: tuple[str, ...]

    def batches(self, rows: Sequence[Row], size: int) -> list[dict[str, Tensor]]:
        return batches_of(rows, self.collator, size)


def prepare(settings: SubjectSettings) -> Subject:
    """Reads and checks everything, the data before the model is loaded. Raises FileNotFoundError and ValueError."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = find_model(settings.model)
    check_task(settings, source)
    split = read_split(settings, source) if isinstance(settings, TrainSettings) else read_rows(settings, source)
    targets = find_targets(settings, source, split)
    tokenizer = padded_tokenizer(source.tokenizer(), source.padding_side)
    longest = min(settings.longest, source.most_tokens)
    parts = ((split.train, targets.train), (split.test, targets.test))
    if targets.task == "causal-lm":
        train, test = (language_rows(examples, tokenizer, longest, settings.chat) for examples, _ in parts)
    else:
        train, test = (labelled_rows(examples, labels, tokenizer, longest) for examples, labels in parts)
    model = load_model(settings.model, source, targets, settings.seed)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # classifiers on decoders look for it
    outputs = None if targets.task in ("causal-lm", source.task) else len(targets.classes or (None,))
    return Subject(
        words=source.words,
        task=targets.task,
        model=model.to(_device(settings)),
        tokenizer=tokenizer,
        train=train,
        test=test,
        collator=collator_of(targets.task, tokenizer),
        outputs=outputs,
        fingerprints=split.fingerprints,
        notes=tuple(_notes(source, split, train, test, longest)),
    )


def fit_head(subject: Subject) -> str | None:
    """Fits a new head on rows to train on, if there is one; what was done, in words."""
    if subject.outputs is None:
        return None
    rows = subject.train[:HEAD_EXAMPLES]
    if not fit_new_head(subject.model, subject.outputs, subject.batches(rows, 64)):
        return "the new head is random: this model's sees every token, and is not fitted on frozen features"
    return f"the new head was fitted on frozen features of {len(rows):,} rows"


def _device(settings: SubjectSettings) -> torch.device:
    return torch.device("cuda" if settings.device == "auto" and torch.cuda.is_available() else "cpu")


def _notes(source: Source, split: Split, train: list[Row], test: list[Row], longest: int) -> list[str]:
    rows, given = train + test, len(split.train) + len(split.test)
    notes = []
    if len(rows) < given:
        notes.append(f"{given - len(rows):,} of {given:,} rows have no token to learn within {longest} tokens: left out")
    cut = cut_rows(rows, longest)
    if cut:
        notes.append(f"{cut:,} of {len(rows):,} rows reach {longest} tokens and may be cut; longest is the limit")
    return notes
