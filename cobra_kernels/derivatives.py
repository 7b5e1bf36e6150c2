"""Derivatives that no operation here has a rule for, refused by name: second ones, and torch.func's transforms."""

import torch


def check_no_transforms(operation: str, way_out: str) -> None:
    """Raises RuntimeError under torch.func's transforms."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{operation} has no rule for torch.func's transforms (vmap, grad, jvp): {way_out}")


def check_differentiated_once(operation: str) -> None:
    """Raises RuntimeError in a backward that is to have a gradient itself: autograd records it under create_graph alone."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{operation} has no second derivative, which create_graph=True asks for: use {operation}_ref, plain torch"
        )
