"""Batches as models take them: a mapping of tensors, or an (inputs, labels) pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One batch and how many examples it has.

    values: what the loader gave, on the model's device
    size: examples, the length of the first dimension
    """

    values: Mapping[str, Any] | tuple
    size: int

    @classmethod
    def from_loader(cls, values: Any, device: torch.device, index: int) -> Batch:
        if isinstance(values, list):
            values = tuple(values)
        if not isinstance(values, (Mapping, tuple)) or (isinstance(values, tuple) and len(values) != 2):
            raise TypeError(
                f"batch {index} is {type(values).__name__}; expected a mapping of tensors or an (inputs, labels) pair"
            )
        if isinstance(values, tuple) and not isinstance(values[0], Tensor):
            raise TypeError(
                f"batch {index} is a pair whose inputs are {type(values[0]).__name__}; pass one mapping with 'labels'"
            )
        items = values.items() if isinstance(values, Mapping) else enumerate(values)
        sizes = {key: value.shape[0] for key, value in items if isinstance(value, Tensor) and value.ndim}
        if not sizes:
            raise ValueError(
                f"batch {index} holds no tensors with a batch dimension; wrap the dataset in a DataLoader whose collate_fn "
                "makes them (for tokens transformers' DataCollatorWithPadding)"
            )
        return cls(values, next(iter(sizes.values()))).map(lambda t: t.to(device))

    def check_batched(self, model: nn.Module, index: int) -> None:
        """Raises ValueError for a row of a dataset: a label without dimensions, or token ids (T,) of a transformers model."""
        ids = self.values.get("input_ids") if isinstance(self.values, Mapping) else self.values[0]
        one_label = isinstance(self.labels, (int, float)) or (isinstance(self.labels, Tensor) and not self.labels.ndim)
        one_text = hasattr(model, "config") and isinstance(ids, Tensor) and ids.ndim == 1 and not ids.is_floating_point()
        if one_label or one_text:
            raise ValueError(
                f"batch {index} looks like one example without a batch dimension; wrap the dataset in a DataLoader"
            )

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with a function applied to every tensor."""
        if isinstance(self.values, Mapping):
            values = {k: function(v) if isinstance(v, Tensor) else v for k, v in self.values.items()}
        else:
            values = tuple(function(v) if isinstance(v, Tensor) else v for v in self.values)
        return Batch(values, self.size)

    def rows(self, start: int, stop: int) -> Batch:
        """Examples start to stop; tensors without the batch dimension stay whole."""
        part = self.map(lambda t: t[start:stop] if t.ndim and t.shape[0] == self.size else t)
        return Batch(part.values, min(stop, self.size) - start)

    def repeated(self, times: int) -> Batch:
        """The batch repeated along its first dimension, all examples of the first copy first."""
        fold = self.map(lambda t: t.repeat(times, *[1] * (t.ndim - 1)) if t.ndim and t.shape[0] == self.size else t)
        return Batch(fold.values, self.size * times)

    @property
    def labels(self) -> Tensor | None:
        return self.values.get("labels") if isinstance(self.values, Mapping) else self.values[1]

    def forward(self, model: nn.Module) -> Any:
        """The model's outputs; a pair's labels are not passed to the model."""
        return model(**self.values) if isinstance(self.values, Mapping) else model(self.values[0])


def model_device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
