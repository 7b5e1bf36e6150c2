"""Parameters that an optimizer should have moved: it goes on without an error where it holds others."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


class StillParameters:
    """Remembers parameters as they are after a cut."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters, self.marks = parameters, _marks(parameters)

    def warn_if_still(self, parameters: Sequence[Tensor], stacklevel: int) -> None:
        """Warns where not one has moved since; not where all are frozen, or others in their places, as sharding makes them."""
        if not any(p.requires_grad for p in parameters):
            return
        if any(now is not then for now, then in zip(parameters, self.parameters, strict=True)):
            return
        pairs = zip(self.marks, _marks(parameters), strict=True)
        if all(then == now and torch.equal(old, new) for (then, old), (now, new) in pairs):
            warnings.warn(
                "no parameter moved in the step after apply(plan): the optimizer holds the parameters from before the cut; "
                "call apply(plan, optimizer), or make a new optimizer from parameter_groups()",
                stacklevel=stacklevel,
            )


def _marks(parameters: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Version and first values: fused optimizers leave the version as it is."""
    return [(p._version, p.detach().flatten()[:64].to("cpu", copy=True)) for p in parameters]
