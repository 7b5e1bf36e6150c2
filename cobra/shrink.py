"""Cutting matrices and optimizer state to the kept ranks, in place: parameters stay the same objects."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cobra.distributed import whole
from cobra.group import Group
from cobra.linear import CobraLinear
from cobra.plan import RankPlan, SitePlan
from cobra.singular import singular_directions

FACTORED = {"exp_avg_sq_row": 0, "exp_avg_sq_col": 1}  # dimension of the matrix that a vector of Adafactor runs along


def fold_factors(site: SitePlan, fold: str) -> Tensor:
    """(rank,) fp64: what each kept rank is multiplied with from now on."""
    if fold == "one":
        return torch.ones(site.rank, dtype=torch.float64)
    return torch.tensor([site.posterior[k] for k in site.kept], dtype=torch.float64)


def kept_matrices(layer: CobraLinear, site: SitePlan, fold: str) -> tuple[Tensor, Tensor]:
    """lora_A (rank, K) and lora_B (N, rank) after the cut, folded."""
    kept = torch.tensor(site.kept, dtype=torch.long, device=layer.lora_A.device)
    if site.energy:
        lora_A, lora_B, _ = singular_directions(layer)
        return lora_A[kept].to(layer.lora_A), lora_B[:, kept].to(layer.lora_B)
    lora_A, lora_B = whole(layer.lora_A).detach(), whole(layer.lora_B).detach()
    return lora_A[kept], lora_B[:, kept] * fold_factors(site, fold).to(lora_B)


def holders(optimizer: Optimizer | Sequence[Optimizer] | None, groups: Sequence[Group], plan: RankPlan) -> list[Optimizer]:
    """The optimizers passed: none, one or several.

    Raises ValueError where none of those passed holds a matrix that trains on after the cut: the cut puts a new parameter in
    its place, which an optimizer that is not passed never sees, nor one that keeps a list of its own.
    """
    if optimizer is None:
        return []
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    _require_no_list_of_their_own(optimizers, groups)
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [
        f"{base.name}.{key}"
        for group, site in zip(groups, plan.sites, strict=True)
        for base, (first, *_) in zip(group.sites, group.layers, strict=True)
        for key, p in (("lora_A", first.lora_A), ("lora_B", first.lora_B))
        if site.kept and p.requires_grad and id(p) not in held
    ]
    if optimizers and missing:
        raise ValueError(
            f"apply(plan, optimizer): {len(missing)} matrices that train are not in it and would stand still from now on, e.g. "
            f"{missing[0]}; pass every optimizer that holds matrices, as apply(plan, [first, second]), or freeze with "
            "requires_grad_(False) what is not to train"
        )
    return optimizers


def _require_no_list_of_their_own(optimizers: Sequence[Optimizer], groups: Sequence[Group]) -> None:
    """Raises ValueError for LBFGS and its like: beside the groups' lists they step by one that no cut reaches."""
    layers = [layer for group in groups for layer in group.all_layers]
    cut = {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B, layer.lora_gate)}
    for optimizer in optimizers:
        for name, value in vars(optimizer).items():
            if isinstance(value, list) and any(isinstance(p, nn.Parameter) and id(p) in cut for p in value):
                raise ValueError(
                    f"apply(plan, optimizer): {optimizer_name(optimizer)} keeps a list of parameters of its own ({name}) "
                    "and a flat history, which cannot be cut: apply(plan) without it, and make a new optimizer after the cut"
                )


def shrink_layers(layers: list[CobraLinear], site: SitePlan, fold: str, optimizers: Sequence[Optimizer]) -> None:
    """Cuts the layers of one weight to a plan's ranks; their gates go, folded into lora_B. What is frozen stays so.

    In a singular basis the optimizers' state starts anew: moments of single entries do not turn with it.
    """
    first = layers[0]
    lora_A, lora_B = map(nn.Parameter, kept_matrices(first, site, fold))
    lora_A.requires_grad_(first.lora_A.requires_grad)
    lora_B.requires_grad_(first.lora_B.requires_grad)
    for optimizer in optimizers:
        _hand_over(optimizer, first.lora_A, lora_A, None if site.energy else (site, 0, "one"))
        _hand_over(optimizer, first.lora_B, lora_B, None if site.energy else (site, 1, fold))
    for layer in layers:
        layer.lora_A, layer.lora_B = lora_A, lora_B
        layer.lora_gate = layer.gate_noise = layer.gate_draw = None


def forget(optimizers: Sequence[Optimizer], parameters: list[nn.Parameter]) -> None:
    """Takes parameters out of optimizers, with their state. Groups left empty stay: schedulers count them."""
    gone = {id(p) for p in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for p in parameters:
            optimizer.state.pop(p, None)


def renew_uncuttable(optimizers: Sequence[Optimizer], matrices: Iterable[nn.Parameter]) -> None:
    """Where an optimizer keeps state of the matrices that cannot be cut (8-bit ones), its state of them all starts anew, with
    a warning."""
    matrices = list(dict.fromkeys(matrices))
    for optimizer in optimizers:
        held = [p for p in matrices if p in optimizer.state]
        uncuttable = ((k, v) for p in held for k, v in optimizer.state[p].items() if not _can_be_cut(v, p.shape))
        key, value = next(uncuttable, (None, None))
        if key is None:
            continue
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"
        warnings.warn(
            f"{optimizer_name(optimizer)} keeps {key!r} as {type(value).__name__} ({found}), which cannot be cut rank by rank: "
            "its state of the adapter's matrices starts anew at the cut; to carry it over take an optimizer with plain "
            "moments, as torch.optim.AdamW",
            stacklevel=3,
        )
        for p in held:
            del optimizer.state[p]


def optimizer_name(optimizer: Optimizer) -> str:
    """With the library it comes from: 8-bit optimizers are called as the plain ones are."""
    return f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}"


def _can_be_cut(value: object, shape: torch.Size) -> bool:
    """Whether it is a number, or floating point with the shape of its parameter or of what is left of it by averaging.

    shape: the parameter's
    """
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, (bool, int, float, str))
    if is_traceable_wrapper_subclass(value):
        return False
    if value.numel() == 1:
        return True
    if not value.is_floating_point():
        return False
    if value.ndim == 1:
        return value.shape[0] in shape
    return value.ndim == len(shape) and all(n in (1, full) for n, full in zip(value.shape, shape, strict=True))


def _hand_over(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, cut: tuple[SitePlan, int, str] | None) -> None:
    """The new parameter in the old one's place: graphs of earlier steps still know the old shape.

    cut: what of the state goes over, by plan, dimension of the ranks and fold; None leaves it behind
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None and cut is not None:
        site, dim, fold = cut
        kept, factors = torch.tensor(site.kept, device=old.device), fold_factors(site, fold).to(new)
        factors = factors if dim else factors[:, None]
        optimizer.state[new] = {
            key: _cut_state(key, value, old.shape, dim, kept, factors.pow(_power(key, state))) for key, value in state.items()
        }


def _power(key: str, state: dict) -> int:
    """B' = c B has the gradient dL/dB / c: what first moments are divided by is c, and c² for second moments."""
    if key == "acc_delta":  # Adadelta's squares of steps, which are c times as long
        return -2
    if key == "ax":  # ASGD's mean of the weights
        return -1
    if key == "step_size" or (key == "momentum_buffer" and "square_avg" in state):  # Rprop's; RMSprop's, of gradients over size
        return 0
    return 2 if "sq" in key or "var" in key or key in ("sum", "state2") else 1


def _cut_state(key: str, value: object, shape: torch.Size, dim: int, kept: Tensor, factors: Tensor) -> object:
    if isinstance(value, Tensor) and value.shape == shape[dim : dim + 1] and FACTORED.get(key, dim) == dim:
        value, factors = value.index_select(0, kept), factors.flatten()
    elif isinstance(value, Tensor) and value.ndim == len(shape) and value.shape[dim] == shape[dim]:
        value = value.index_select(dim, kept)
    else:
        return value  # a counter, or a moment averaged over the ranks
    return value / factors
