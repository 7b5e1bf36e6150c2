"""Cutting matrices and optimizer state to the kept ranks, in place: parameters stay the same objects."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cobra.linear import CobraLinear
from cobra.plan import SitePlan
from cobra.singular import singular_directions


def fold_factors(site: SitePlan, fold: str) -> Tensor:
    """(rank,) fp64: what each kept rank is multiplied with from now on."""
    if fold == "one":
        return torch.ones(site.rank, dtype=torch.float64)
    return torch.tensor([site.posterior[k] for k in site.kept], dtype=torch.float64)


def kept_matrices(layer: CobraLinear, site: SitePlan, fold: str) -> tuple[Tensor, Tensor]:
    """lora_A (rank, K) and lora_B (N, rank) after the cut, folded."""
    kept = torch.tensor(site.kept, dtype=torch.long, device=layer.lora_A.device)
    if site.energy:
        lora_A, lora_B, _ = singular_directions(layer, fold)
        return lora_A[kept].to(layer.lora_A), lora_B[:, kept].to(layer.lora_B)
    return layer.lora_A.detach()[kept], layer.lora_B.detach()[:, kept] * fold_factors(site, fold).to(layer.lora_B)


def shrink_layers(layers: list[CobraLinear], site: SitePlan, fold: str, optimizer: Optimizer | None) -> None:
    """Cuts the layers of one weight to a plan's ranks; their gates go, folded into lora_B.

    In a singular basis the optimizer's state starts anew: moments of single entries do not turn with it.
    """
    first = layers[0]
    lora_A, lora_B = map(nn.Parameter, kept_matrices(first, site, fold))
    if optimizer is not None:
        kept = torch.tensor(site.kept, device=first.lora_A.device)
        factors = fold_factors(site, fold).to(first.lora_B)
        cuts = ((first.lora_A, lora_A, 0, torch.ones_like(factors)[:, None]), (first.lora_B, lora_B, 1, factors))
        for old, new, dim, scale in cuts:
            _replace(optimizer, old, new)
            state = optimizer.state.pop(old, None)
            if state is not None and not site.energy:
                optimizer.state[new] = {k: _cut_state(k, v, old.shape, dim, kept, scale) for k, v in state.items()}
    for layer in layers:
        layer.lora_A, layer.lora_B = lora_A, lora_B
        layer.lora_gate = layer.gate_noise = layer.gate_draw = None


def forget(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Takes parameters out of an optimizer, with their state. Groups left empty stay: schedulers count them."""
    gone = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for p in parameters:
        optimizer.state.pop(p, None)


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises ValueError for state that cannot be cut (8-bit optimizers)."""
    for values in optimizer.state.values():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and not value.is_floating_point():
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} as {value.dtype}, which cannot be cut rank by rank; "
                    "call apply(plan) without it and make a new optimizer from parameter_groups()"
                )


def _replace(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """A new object: graphs of earlier steps still know the old shape."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]


def _cut_state(key: str, value: object, shape: torch.Size, dim: int, kept: Tensor, factors: Tensor) -> object:
    if isinstance(value, Tensor) and value.shape == shape[dim : dim + 1]:
        value, factors = value.index_select(0, kept), factors.flatten()
    elif isinstance(value, Tensor) and value.ndim == len(shape) and value.shape[dim] == shape[dim]:
        value = value.index_select(dim, kept)
    else:
        return value  # a counter, or a moment averaged over the ranks
    # B' = c B has the gradient dL/dB / c: first moments scale by 1/c, second moments by 1/c²
    return value / factors.square() if "sq" in key or "var" in key or key == "sum" else value / factors
