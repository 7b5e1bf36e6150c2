"""Modules trained whole beside the adapter: task heads, and what `modules_to_save` names."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from cobra.config import CobraConfig
from cobra.sites import Site, quantised, task_heads


def heads_to_train(model: nn.Module, config: CobraConfig, sites: list[Site]) -> dict[str, nn.Module]:
    """The modules trained whole."""
    adapted = {name for site in sites for name, _ in site.modules}
    if config.modules_to_save == "auto":
        adapted_modules = {id(module) for site in sites for _, module in site.modules}
        return {
            name: head
            for name, head in task_heads(model).items()
            if not any(id(part) in adapted_modules for part in head.modules())
        }
    wanted = config.modules_to_save
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    found: dict[str, nn.Module] = {}
    for ending in wanted:
        matches = {n: m for n, m in model.named_modules() if n == ending or n.endswith(f".{ending}")}
        if not matches:
            raise ValueError(f"modules_to_save: the model has no module {ending!r}")
        both = [a for a in adapted if any(a == n or a.startswith(f"{n}.") for n in matches)]
        if both:
            raise ValueError(f"modules_to_save and target_modules both name {sorted(both)[0]!r}; leave it out of one")
        found |= matches
    return found


def head_of_adapter(model: nn.Module, name: str, state: dict[str, torch.Tensor]) -> nn.Module:
    """The module whose weights the adapter brings."""
    found = dict(model.named_modules()).get(name)
    if found is None:
        raise ValueError(f"the adapter brings a head {name!r}, which this model lacks")
    shapes = {key: tuple(value.shape) for key, value in found.state_dict().items()}
    brought = {key: tuple(value.shape) for key, value in state.items()}
    if shapes != brought:
        raise ValueError(
            f"head {name!r} is {shapes} here and {brought} in the adapter; make the model with the adapter's labels"
        )
    return found


def check_trainable(heads: dict[str, nn.Module]) -> None:
    """Raises ValueError for heads whose weights are quantised: transformers' quantises a classifier with the rest."""
    for name, head in heads.items():
        for part in head.modules():
            if kept := quantised(part):
                raise ValueError(
                    f"modules_to_save: {name} is trained whole and its weight is {kept}, which has no gradient: keep it out of "
                    f"the quantisation (llm_int8_skip_modules=[{name!r}] in bitsandbytes' config), or attach with "
                    "modules_to_save=()"
                )


def warn_of_tied_heads(model: nn.Module, heads: dict[str, nn.Module]) -> None:
    """peft gives every module of modules_to_save weights of its own: what they are tied to would stay as in the base."""
    within = {id(part) for head in heads.values() for part in head.modules()}
    owners = {id(p): name for name, head in heads.items() for p in head.parameters()}
    for name, module in model.named_modules():
        tied = [owners[id(p)] for p in module.parameters(recurse=False) if id(p) in owners]
        if tied and id(module) not in within:
            warnings.warn(
                f"modules_to_save: {tied[0]} shares a weight with {name}, which is trained with it here and stays as in the "
                f"base where peft loads the saved adapter: name both of them, or leave {tied[0]} out",
                stacklevel=4,
            )
