"""Where the path enters a model: the output of the input embeddings for token models, the input itself for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cobra.batch import Batch
from cobra_kernels import interpolate_path

Baseline = str | Tensor
TOKENS = "the token embeddings"
OnEntry = Callable[[Tensor], None]


@dataclass(frozen=True)
class Entry:
    """The model's entry, and the baseline of the path there.

    embeddings: the input-embedding module and those that share its weight (an encoder's and a decoder's); none where the path
        runs through the input
    key: of the input in the batch, where there are no `embeddings`
    baseline: "zero", "mean" (mean embedding of the vocabulary), "pad" (embedding of the padding token), or a tensor
        broadcastable to one example's entry (1, ...)
    """

    embeddings: tuple[nn.Module, ...]
    key: str | int | None
    baseline: Baseline = "zero"

    @property
    def words(self) -> str:
        """What the path runs through."""
        return TOKENS if self.embeddings else f"input {self.key!r}"

    @contextmanager
    def at(self, batch: Batch, alphas: Tensor | None, on_entry: OnEntry) -> Iterator[Batch]:
        """Within the block, a forward of the yielded batch runs at the given points of the path, folded point-major.

        alphas: (n,), or None for the input itself
        on_entry: called with each entry tensor (n B, ...), a leaf that requires grad
        """
        points = 1 if alphas is None else len(alphas)
        folded = batch.repeated(points)

        def enter(x: Tensor) -> Tensor:
            x = x.detach()
            if alphas is not None:
                x = x[: len(x) // points]
                x = interpolate_path(x, self._baseline_like(x), alphas)
            x = x.requires_grad_()
            on_entry(x)
            return x * 1  # a model may write into its input, which a leaf forbids

        if not self.embeddings:
            values = dict(folded.values) if isinstance(folded.values, Mapping) else list(folded.values)
            values[self.key] = enter(values[self.key])
            yield Batch(values if isinstance(values, dict) else tuple(values), folded.size)
            return
        handles = [module.register_forward_hook(lambda _, args, output: enter(output)) for module in self.embeddings]
        try:
            yield folded
        finally:
            for handle in handles:
                handle.remove()

    def _baseline_like(self, x: Tensor) -> Tensor:
        if isinstance(self.baseline, Tensor):
            return self.baseline.to(x)
        if self.baseline == "zero":
            return torch.zeros((), dtype=x.dtype, device=x.device)
        weight = self.embeddings[0].weight.detach() * getattr(self.embeddings[0], "embed_scale", 1.0)
        if self.baseline == "mean":
            return weight.float().mean(0).to(x)
        return weight[self.embeddings[0].padding_idx].to(x)


def find_entry(model: nn.Module, batch: Batch, baseline: Baseline = "zero") -> Entry:
    """The entry of a model for batches like this one.

    Raises ValueError where the input is neither token ids under an embedding nor floating point, or the baseline does not fit.
    """
    key, value = _main_input(model, batch)
    embedding = None
    if not value.is_floating_point():
        embedding = _input_embedding(model)
        if embedding is None:
            raise ValueError(
                f"input {key!r} is {value.dtype} and {type(model).__name__} has no input embeddings "
                "that can be told: define get_input_embeddings() on the model"
            )
    _check_baseline(baseline, f"input {key!r} is {value.dtype}", embedding is not None)
    if isinstance(baseline, str) and baseline == "pad" and getattr(embedding, "padding_idx", None) is None:
        raise ValueError("baseline='pad' needs input embeddings with a padding_idx; pass the embedding as a tensor instead")
    if embedding is None:
        return Entry((), key, baseline)
    sharing = [
        m for m in model.modules() if isinstance(m, nn.Embedding) and m is not embedding and m.weight is embedding.weight
    ]
    return Entry((embedding, *sharing), None, baseline)


def _check_baseline(baseline: Baseline, found: str, tokens: bool) -> None:
    """
    found: the input in words
    tokens: whether it goes through embeddings, whose mean and padding can be told
    """
    if isinstance(baseline, Tensor) or baseline == "zero":
        return
    if baseline not in ("mean", "pad"):
        raise ValueError(f"baseline={baseline!r} is not a tensor or one of zero, mean, pad")
    if not tokens:
        raise ValueError(f"baseline={baseline!r} needs token embeddings; {found} and takes 'zero' or a tensor")


def _main_input(model: nn.Module, batch: Batch) -> tuple[str | int, Tensor]:
    if not isinstance(batch.values, Mapping):
        return 0, batch.values[0]
    for key in ("inputs_embeds", getattr(model, "main_input_name", None), "input_ids", "pixel_values", "input_values"):
        if isinstance(batch.values.get(key), Tensor):
            return key, batch.values[key]
    tensors = {k: v for k, v in batch.values.items() if isinstance(v, Tensor) and "label" not in k and "mask" not in k}
    if len(tensors) != 1:
        raise ValueError(f"cannot tell the model's input among {sorted(batch.values)}; name it main_input_name on the model")
    return next(iter(tensors.items()))


def _input_embedding(model: nn.Module) -> nn.Module | None:
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if embedding is None:
        found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        embedding = found[0] if len(found) == 1 else None
    return embedding
