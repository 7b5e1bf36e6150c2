"""Whether examples stand in the first dimension of what layers see: calibration and serving tell them apart there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cobra.batch import Batch
from cobra.entry import Entry
from cobra.sites import Site
from cobra.watch import watching


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
    """Raises ValueError for a site whose first dimension does not double with the batch: a multiple of it may be by chance."""
    once, twice = (_shapes(model, sites, entry, batch, alphas) for alphas in (None, torch.tensor([0.0, 1.0])))
    for index in sorted(once.keys() & twice.keys()):
        for shape, other in zip(once[index], twice[index], strict=False):  # how often it is called may depend on values
            if 2 * shape[0] != other[0]:
                second = batch_second(model)
                raise ValueError(
                    f"{sites[index].name} has an output of shape {tuple(shape)} in a batch of {batch.size} and {tuple(other)} "
                    f"in one of {2 * batch.size}: its first dimension must be the batch (or a multiple of it); "
                    + (f"make {second[0]} with batch_first=True, or " if second else "")
                    + "leave it out with target_modules"
                )


def _shapes(
    model: nn.Module, sites: list[Site], entry: Entry, batch: Batch, alphas: Tensor | None
) -> dict[int, list[torch.Size]]:
    """Of a site's outputs that depend on the path, call by call."""
    shapes: dict[int, list[torch.Size]] = {}

    def on_call(index: int, x: Tensor, h: Tensor) -> None:
        if h.requires_grad:
            shapes.setdefault(index, []).append(h.shape)

    nothing_kept = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda kept: kept)  # there is no backward
    with watching(sites, on_call), entry.at(batch, alphas, lambda x: None) as folded, nothing_kept:
        folded.forward(model)
    return shapes
