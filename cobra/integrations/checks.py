"""What must hold before a Trainer trains an adapter; each check says what to change."""

from __future__ import annotations

import warnings

from torch import nn
from torch.optim import Optimizer

from cobra.adapter import Adapter
from cobra.linear import adapters_of
from cobra.sites import peft_layers


def refuse_peft(model: nn.Module) -> None:
    """Raises ValueError where an adapter of peft lies on the model: peft freezes everything else."""
    if wrapped := peft_layers(model):
        raise ValueError(
            f"peft has put an adapter of its own on {wrapped[0]} ({len(wrapped)} layers), which freezes COBRA's: leave out "
            "peft_config= (None), or train peft's adapter without CobraCallback at the ranks of "
            "cobra.plan_ranks(scores, budget).to_peft_config()"
        )


def find_adapter(model: nn.Module) -> Adapter:
    found = adapters_of(model)
    if len(found) != 1 or found[0]._merged is not None:
        raise ValueError(
            f"CobraCallback trains one adapter, and this {type(model).__name__} has "
            f"{'a merged one' if len(found) == 1 else len(found)}: before the Trainer is made, call cobra.attach(model, "
            "config, scores), or adapter.unmerge() where it is merged; a copy of an adapted model has none"
        )
    return found[0]


def check_devices(args, search_share: float) -> None:
    if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        raise ValueError("CobraCallback works on one device or under DDP: take deepspeed= and fsdp= out of the arguments")
    if args.world_size > 1 and search_share < 1 and getattr(args, "torch_compile", False):
        raise ValueError(
            f"{args.world_size} processes, torch_compile and search_share={search_share}: a compiled wrapper cannot follow a "
            "cut in the middle of training; search to the end (search_share=1.0), or leave torch_compile out"
        )


def torch_optimizer(optimizer) -> Optimizer:
    """Without accelerate's wrappers."""
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        if not hasattr(optimizer, "optimizer"):
            raise ValueError(f"CobraCallback needs a torch.optim.Optimizer, found {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer


def check_trained(model: nn.Module, adapter: Adapter, optimizer: Optimizer) -> None:
    """Raises ValueError where matrices or heads are not trained; warns of gates that are not, and of others that are."""
    names = {id(p): name for name, p in model.named_parameters()}
    ours = {id(p): p for group in adapter.parameter_groups(1.0) for p in group["params"]}
    gates = {id(group.gate) for group in adapter.groups}
    frozen = [names[i] for i, p in ours.items() if not p.requires_grad]
    if frozen:
        raise ValueError(
            f"{len(frozen)} of the adapter's {len(ours)} parameters are frozen, e.g. {frozen[0]}: something called "
            "requires_grad_(False) after attach(); attach last, and let nothing else prepare the model for training"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [i for i in ours if i not in held]
    if any(i not in gates for i in missing):
        raise ValueError(
            f"the optimizer lacks {len(missing)} of the adapter's {len(ours)} parameters, e.g. {names[missing[0]]}: make it "
            "from adapter.parameter_groups(lr), or let the Trainer make it; after attach() in both cases"
        )
    if missing:
        warnings.warn(
            f"the optimizer lacks the gate logits, e.g. {names[missing[0]]}: they will not move from their prior; "
            "make it from adapter.parameter_groups(lr), or let the Trainer make it",
            stacklevel=3,
        )
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        warnings.warn(
            f"{len(others)} parameters outside the adapter are trained too, e.g. {others[0]}: they are no part of what the "
            "adapter saves; freeze them, or name their modules in modules_to_save",
            stacklevel=3,
        )
