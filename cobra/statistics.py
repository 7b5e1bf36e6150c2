"""What training moves of a base model though its weights are frozen: the running statistics of normalisation over a batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def running_statistics(model: nn.Module, heads: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Buffers of the modules that keep any, by full name, outside of the heads, whose own are saved with them."""
    within = {id(module) for head in heads.values() for module in head.modules()}
    return {
        f"{name}.{key}": buffer
        for name, module in model.named_modules()
        if id(module) not in within and getattr(module, "running_mean", None) is not None
        for key, buffer in module.named_buffers(recurse=False)
    }


def warn_of_moved_statistics(before: Mapping[str, Tensor], now: Mapping[str, Tensor], stacklevel: int) -> None:
    """No adapter's file has a place for them, and with the base's own it computes something else."""
    moved = sorted({name.rpartition(".")[0] for name in before.keys() & now.keys() if not _same(before[name], now[name])})
    if moved:
        warnings.warn(
            f"running statistics of {moved[0]}{f' and {len(moved) - 1} more' if moved[1:] else ''} moved in training and are "
            "not in the adapter's folder: keep normalisation in eval() while you train, or save the model after merge()",
            stacklevel=stacklevel + 1,
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other.to(one.device))
