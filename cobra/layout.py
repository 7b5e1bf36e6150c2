"""Whether examples stand in the first dimension of what layers see: calibration and serving tell them apart there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from cobra.batch import Batch
from cobra.entry import Entry
from cobra.sites import Site
from cobra.watch import watching

T = TypeVar("T")


def batch_second(model: nn.Module) -> list[str]:
    """Names of the modules that take (tokens, batch, features), as torch's attention and recurrent layers do by default."""
    return [name for name, module in model.named_modules() if getattr(module, "batch_first", True) is False]


def refuse_batch_second(model: nn.Module, sites: list[Site]) -> None:
    """Raises ValueError where sites are in a transformer layer of torch that takes its batch in the second dimension."""
    targets = {id(module) for site in sites for module in site.distinct_modules}
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) or not batch_second(layer):
            continue
        if any(id(part) in targets for part in layer.modules()):
            raise ValueError(
                f"{name or type(layer).__name__} takes its batch in the second dimension, and examples are told apart in the "
                "first: make it with batch_first=True, or leave its layers out with target_modules"
            )


def check_layout(model: nn.Module, sites: list[Site], entry: Entry, batch: Batch) -> None:
    """Raises ValueError for a site whose first dimension does not double with the batch: a multiple of it may be by chance;
    and for one whose rows are every example's first token, then every second one."""
    once, twice = (_seen(model, sites, entry, batch, _shape, alphas) for alphas in (None, torch.tensor([0.0, 1.0])))
    for index in sorted(once.keys() & twice.keys()):
        for shape, other in zip(once[index], twice[index], strict=False):  # how often it is called may depend on values
            if 2 * shape[0] != other[0]:
                raise ValueError(
                    f"{sites[index].name} has an output of shape {tuple(shape)} in a batch of {batch.size} and {tuple(other)} "
                    f"in one of {2 * batch.size}: its first dimension must be the batch (or a multiple of it); {_remedy(model)}"
                )
    several = [sites[index] for index, shapes in sorted(once.items()) if any(shape[0] > batch.size for shape in shapes)]
    _check_order(model, several, entry, batch)


def _check_order(model: nn.Module, sites: list[Site], entry: Entry, batch: Batch) -> None:
    """Of sites with several rows an example: where the first one's are, told by what it computes alone. Beside one that is
    alone in its batch stands its baseline, as another point of the path."""
    if not sites:
        return
    rows, alphas = (batch.size, None) if batch.size > 1 else (2, torch.tensor([1.0, 0.0]))
    whole = _seen(model, sites, entry, batch, Tensor.detach, alphas)
    alone = _seen(model, sites, entry, batch.rows(0, 1), Tensor.detach)
    for index in sorted(whole.keys() & alone.keys()):
        for h, own in zip(whole[index], alone[index], strict=False):
            if len(h) != rows * len(own):
                continue
            in_front, in_turn = ((part - own).norm() / own.norm() for part in (h[: len(own)], h[::rows]))
            if in_turn < 0.01 and in_front > 0.1:
                raise ValueError(
                    f"{sites[index].name} sees the first token of all {rows} examples, then the second one, in its "
                    f"{len(h)} rows: those of an example must stand together; {_remedy(model)}"
                )


def _remedy(model: nn.Module) -> str:
    second = batch_second(model)
    return (f"make {second[0]} with batch_first=True, or " if second else "") + "leave it out with target_modules"


def _shape(h: Tensor) -> torch.Size:
    return h.shape


def _seen(
    model: nn.Module, sites: list[Site], entry: Entry, batch: Batch, what: Callable[[Tensor], T], alphas: Tensor | None = None
) -> dict[int, list[T]]:
    """What there is of a site's outputs that depend on the path, call by call."""
    seen: dict[int, list[T]] = {}

    def on_call(index: int, x: Tensor, h: Tensor) -> None:
        if h.requires_grad:
            seen.setdefault(index, []).append(what(h))

    nothing_kept = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda kept: kept)  # there is no backward
    with watching(sites, on_call), entry.at(batch, alphas, lambda x: None) as folded, nothing_kept:
        folded.forward(model)
    return seen
