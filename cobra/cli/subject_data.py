"""What a model is measured on: texts with labels as its batches, random images, and a head for a bare encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from cobra.cli.encoder import fit_head
from cobra.cli.subject import Source
from cobra.cli.textfile import Example, as_numbers


@dataclass(frozen=True)
class TextBatches:
    """Texts of like length together, padded batch by batch; labels None: the tokens are the labels.

    A loader for `calibrate`: examples are in the order of their length.
    """

    encodings: list[list[int]]
    labels: list[int] | list[float] | None
    batch_size: int
    pad_token_id: int

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = sorted(range(len(self.encodings)), key=lambda i: len(self.encodings[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            ids = [torch.tensor(self.encodings[i]) for i in chosen]
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
            labels = (
                padded.masked_fill(mask == 0, -100) if self.labels is None else torch.tensor([self.labels[i] for i in chosen])
            )
            yield {"input_ids": padded, "attention_mask": mask, "labels": labels}


def text_batches(examples: list[Example], labels: list | None, tokenizer, batch_size: int, longest: int) -> TextBatches:
    encodings = tokenizer([e.text for e in examples], truncation=True, max_length=longest)["input_ids"]
    short = next((e.text for e, ids in zip(examples, encodings, strict=True) if len(ids) < 1 + (labels is None)), None)
    if short is not None:
        raise ValueError(f"the text {short[:40]!r} has too few tokens")
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # the mask covers it, whatever it is
    return TextBatches(encodings, labels, batch_size, pad)


def image_batches(config: PreTrainedConfig, examples: int, batch_size: int, seed: int) -> list[dict[str, Tensor]]:
    """Normal noise with random labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (examples, config.num_channels, config.image_size, config.image_size)
    pixels = torch.randn(shape, generator=generator)
    labels = torch.randint(config.num_labels, (examples,), generator=generator)
    starts = range(0, examples, batch_size)
    return [{"pixel_values": pixels[i : i + batch_size], "labels": labels[i : i + batch_size]} for i in starts]


def label_values(source: Source, examples: list[Example]) -> list[int] | list[float]:
    """Class numbers, or numbers for regression: for an encoder by whether the labels are whole or words.

    A classifier's labels are names in its label2id. Where names are numbers, as "1" to "5", labels are too, and 1.0 is "1"; no
    label is a class number then. Where no name is a number, labels may be class numbers, from 0.

    Raises ValueError for labels that the task or the model's classes do not have.
    """
    labels = [example.label for example in examples]
    numbers = as_numbers(labels)
    fractional = next((label for label, v in zip(labels, numbers or [], strict=False) if v != int(v)), None)
    if source.task == "regression" or (source.task == "encoder" and fractional is not None):
        if numbers is None:
            raise ValueError(f"{source.words} is a regression model, and a label is not a number")
        return numbers
    if source.task == "encoder":
        ids = {label: i for i, label in enumerate(sorted(set(labels)))}
        if len(ids) < 2:
            raise ValueError(f"all labels are {labels[0]!r}; a head needs two classes")
        return [ids[label] for label in labels]
    return _class_numbers(source.config, labels)


def _class_numbers(config: PreTrainedConfig, labels: list[str]) -> list[int]:
    """Of a classifier's labels, by the rule of `label_values`."""
    names = config.label2id
    numerals = {float(name): i for name, i in names.items() if as_numbers([name])}
    numbers = as_numbers(labels)
    if numbers is None or names.keys() >= set(labels):
        ids = names
    else:
        known = numerals or {float(i): i for i in range(config.num_labels)}
        ids = {label: known[v] for label, v in zip(labels, numbers, strict=True) if v in known}
    bad = sorted(set(labels) - ids.keys())
    if bad:
        listed = ", ".join(list(names)[:8])
        by_number = "" if numerals else f", or their numbers from 0 to {config.num_labels - 1}"
        raise ValueError(
            f"label {bad[0]!r} is none of the model's {config.num_labels} classes: {listed}{by_number}; "
            "classes are named by id2label and label2id in its config.json"
        )
    return [ids[label] for label in labels]


class Pooled(nn.Module):
    """Encoder, mean over the tokens of the mask, linear head."""

    def __init__(self, encoder: nn.Module, outputs: int):
        super().__init__()
        self.config = encoder.config
        self.prefix = encoder.base_model_prefix or "encoder"  # names of layers as in transformers' own classifiers
        self.add_module(self.prefix, encoder)
        self.classifier = nn.Linear(encoder.config.hidden_size, outputs)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self.prefix).get_input_embeddings()

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) ids and mask -> (B, d) mean of the last hidden states"""
        encoder = self.get_submodule(self.prefix)
        hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        logits = self.classifier(self.features(input_ids, attention_mask))
        loss = F.mse_loss(logits[:, 0], labels) if labels.is_floating_point() else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits)


def with_head(encoder: nn.Module, batches: TextBatches, outputs: int) -> Pooled:
    """The encoder with a head fitted on its frozen features: logistic, or ridge regression where labels are real."""
    model = Pooled(encoder, outputs).eval()
    fit_head(model, batches)
    return model
