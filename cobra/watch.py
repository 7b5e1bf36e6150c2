"""Seeing what passes through a model's sites, and leaving the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cobra.sites import Site, is_quantised_linear

OnCall = Callable[[int, Tensor, Tensor], Tensor | None]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients within the block; every flag is restored after it.

    torch's fast path of transformer layers is off: under no_grad it would give the sites nested tensors.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    training = {module: module.training for module in model.modules()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for module in model.modules():
        if is_quantised_linear(module):
            module.training = True  # bitsandbytes' 8-bit layers have their backward there, and no noise
    for p in trainable:
        p.requires_grad_(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in training.items():
            module.training = flag
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def watching(sites: Sequence[Site], on_call: OnCall) -> Iterator[None]:
    """Calls on_call(site index, input, output) at every call of a site's module; what it returns replaces the output."""

    def on_output(index: int, _: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        output = _without_view(output)
        replaced = on_call(index, *args, *kwargs.values(), output)
        return output if replaced is None else replaced

    handles = [
        module.register_forward_hook(partial(on_output, index), with_kwargs=True)
        for index, site in enumerate(sites)
        for module in site.distinct_modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_view(output: Tensor) -> Tensor:
    """The output, fit for hooks: a write into a view (nn.Linear's output above two dimensions) would pass them by."""
    return _Alias.apply(output) if output.requires_grad and output._is_view() else output


class _Alias(torch.autograd.Function):
    """A tensor of its own in the same memory and with the same version counter; autograd does not take it for a view."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class Snapshot:
    """A tensor held until its gradient arrives, without a copy, and checked to be still what it was."""

    def __init__(self, tensor: Tensor, what: str, copy: bool):
        self._source = None if copy else tensor.detach()  # shares the version counter; the tensor itself would be a cycle
        self._tensor = tensor.detach().clone() if copy else tensor.detach()
        self._version = tensor._version
        self._what = what

    def take(self) -> Tensor:
        """The tensor; it is let go."""
        tensor, self._tensor, source, self._source = self._tensor, None, self._source, None
        if source is not None and source._version != self._version:
            raise RuntimeError(
                f"the model writes in place over the {self._what}; write that operation out of place for the calibration"
            )
        return tensor


class SavedBytes:
    """Counts what a forward saves for its backward, every storage once and parameters not at all: `total` bytes."""

    def __init__(self, model: nn.Module):
        self.total = 0
        self._counted = {p.untyped_storage().data_ptr() for p in model.parameters() if not is_traceable_wrapper_subclass(p)}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        if is_traceable_wrapper_subclass(tensor):
            return tensor  # a quantised weight, which has no storage of its own
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._counted:
            self._counted.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)


def writes_in_place(model: nn.Module) -> bool:
    """Whether a module declares that it overwrites its input (nn.ReLU(inplace=True) and the like)."""
    return any(getattr(module, "inplace", False) is True for module in model.modules())


def per_example(tensor: Tensor, rows: int, site: str) -> Tensor:
    """A site's tensor as (rows, tokens, features). Raises ValueError where its first dimension is not the batch."""
    if tensor.ndim >= 2 and tensor.shape[0] % rows == 0:
        return tensor.reshape(rows, -1, tensor.shape[-1])
    raise ValueError(
        f"{site} sees a tensor of shape {tuple(tensor.shape)} in a batch of {rows}: its first dimension must be the batch "
        "(or a multiple of it); leave it out with target_modules"
    )
