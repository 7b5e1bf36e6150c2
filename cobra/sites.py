"""Which layers of a model an adapter can go to.

A *site* is one weight of one linear layer: nn.Linear (K -> N, weight (N, K)) or transformers' Conv1D (weight (K, N)). A module
registered under several names is one site, and so are several modules that share one weight.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cobra.config import TargetModules
from cobra.distributed import sharded

TASK_HEADS = frozenset(
    {"classifier", "pre_classifier", "classification_head", "score", "head", "heads", "qa_outputs", "logits_proj"}
)
LANGUAGE_HEADS = frozenset({"lm_head", "embed_out", "output_projection"})


@dataclass(frozen=True, eq=False)
class Site:
    """One adaptable weight.

    name: the first full name of the module
    modules: every (name, module) that computes with this weight, the first one first
    in_features, out_features: K and N
    """

    name: str
    modules: tuple[tuple[str, nn.Module], ...]
    in_features: int
    out_features: int

    @property
    def module(self) -> nn.Module:
        return self.modules[0][1]

    @property
    def weight(self) -> Tensor:
        """The weight as (N, K), a view."""
        return linear_weight(self.module)

    @property
    def distinct_modules(self) -> list[nn.Module]:
        return list({id(module): module for _, module in self.modules}.values())


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D; needs no import, a model that holds one has loaded it."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)


def _has_class_forward(module: nn.Module) -> bool:
    """Whether a call runs the forward of the module's class: not where another one was set on the module itself."""
    own = vars(module).get("forward")
    if hasattr(module, "_hf_hook"):  # accelerate's moves tensors and calls the one from before
        own = vars(module).get("_old_forward", own)
    return own is None or own == MethodType(type(module).forward, module)  # accelerate leaves it so when it is removed


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b by its own forward, so that an adapter can take its place."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight and never calls it
    if not _has_class_forward(module):
        return False
    return is_conv1d(module) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def quantised(module: nn.Module) -> str | None:
    """What a linear layer keeps in place of a floating-point weight; None for every other module."""
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(count, int) for count in features) or next(module.children(), None) is not None:
        return None
    kept = getattr(module, "weight", None)
    if kept is None:
        kept = next((t for t in [*module.parameters(), *module.buffers()] if not t.is_floating_point()), None)
    if kept is None or nn.parameter.is_lazy(kept) or sharded(kept):
        return None
    if kept.is_floating_point() and kept.element_size() > 1 and not is_traceable_wrapper_subclass(kept):
        return None
    kind = type(kept.data).__name__ if is_traceable_wrapper_subclass(kept) else kept.dtype
    return f"{kind} in a {type(module).__name__}"


def is_quantised_linear(module: nn.Module) -> bool:
    """Whether a quantised layer computes x Wᵀ + b by a forward of its own or its weight's (bitsandbytes, torchao)."""
    if not isinstance(module, nn.Linear) or quantised(module) is None:
        return False
    return type(module).forward is not nn.Linear.forward or is_traceable_wrapper_subclass(module.weight)


def keep_differentiable(name: str, module: nn.Module) -> None:
    """At the first evaluation bitsandbytes packs 4-bit weights for some CPUs in a form that has no backward; not from now on.

    Raises ValueError where it has done so: what it unpacks (0.50) is not what it packed.
    """
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"{name}.weight was packed for inference by bitsandbytes when the model was evaluated, and has no backward now: "
            "load the model again, and calibrate or attach before the first evaluation"
        )
    if getattr(module, "support_avx512bf16_for_cpu", False):
        module.support_avx512bf16_for_cpu = False


def linear_weight(module: nn.Module) -> Tensor:
    """The weight as (N, K), a view."""
    return module.weight.t() if is_conv1d(module) else module.weight


def block_of(name: str) -> str:
    """The transformer block a module belongs to: its name up to the first number, or the whole name where there is none."""
    match = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", name)
    return match[1] if match else name


def blocks_of(names: Iterable[str], among: Iterable[str]) -> dict[str, str]:
    """Name -> its transformer block: the one of `block_of`, or within it, where most of that repeats below another number, as
    in the stages of a Swin or in an nn.Sequential around a model. A number that all of `among` begin with is no block where
    another one follows.

    among: of the model's linear layers, whichever of them are adapted
    """
    among = list(among)
    outer, holder_in = _around(among), cache(partial(_holder_of_blocks, among=among))

    def block(name: str) -> str:
        found = outer + block_of(name.removeprefix(outer))
        while (holder := holder_in(found)) is not None and name.startswith(f"{holder}."):
            found = f"{holder}.{name.removeprefix(f'{holder}.').partition('.')[0]}"
        return found

    return {name: block(name) for name in names}


def _around(names: list[str]) -> str:
    """The numbers that all names begin with, where another one follows."""
    outer = ""
    while True:
        first, names = {name.partition(".")[0] for name in names}, [name.partition(".")[2] for name in names]
        if len(first) != 1 or not min(first).isdigit() or not any(re.search(r"(?:^|\.)\d+(?:\.|$)", name) for name in names):
            return outer
        outer += f"{min(first)}."


def _holder_of_blocks(block: str, among: list[str]) -> str | None:
    """The module within a block whose numbered children are blocks themselves: they hold most of its linear layers and have two
    or more of them in common. Parts of a block differ (T5's `layer.0` attends, `layer.1` feeds forward); experts are parts."""
    within = [name.removeprefix(f"{block}.") for name in among if name.startswith(f"{block}.")]
    children: dict[str, dict[str, set[str]]] = {}
    for name in within:
        if split := re.match(r"(?:(.*?)\.)?(\d+)(?:\.(.+))?$", name):
            children.setdefault(split[1] or "", {}).setdefault(split[2], set()).add(split[3] or "")
    for inner, parts in children.items():
        if 2 * sum(map(len, parts.values())) > len(within) and "expert" not in inner:
            holder = f"{block}.{inner}".removesuffix(".")
            if len(parts) == 1:
                return _holder_of_blocks(f"{holder}.{min(parts)}", among)
            return holder if len(set.intersection(*parts.values())) > 1 else None
    return None


def linear_names(model: nn.Module) -> list[str]:
    """Of all its linear layers, quantised ones too."""
    return [name for name, module in model.named_modules() if is_linear(module) or is_quantised_linear(module)]


def language_head(model: nn.Module) -> nn.Module | None:
    """What `get_output_embeddings` returns."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def task_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules under a customary head name that hold a linear layer, but for a language head."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        numbered = re.search(r"(?:^|\.)\d+(?:\.|$)", name)  # a block's own part, not the model's head
        if inside or numbered or name.split(".")[-1] not in TASK_HEADS or module is language_head(model):
            continue
        if any(is_linear(part) or is_quantised_linear(part) for part in module.modules()):
            found[name] = module
    return found


def head_names(model: nn.Module) -> set[str]:
    """Full names of the linear layers that are output heads or part of one."""
    heads = {id(part) for head in task_heads(model).values() for part in head.modules()} | {id(language_head(model))}
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {n for n, m in modules.items() if is_linear(m) or is_quantised_linear(m)}
    return {n for n in linears if id(modules[n]) in heads or n.split(".")[-1] in LANGUAGE_HEADS}


def find_sites(model: nn.Module, target_modules: TargetModules = "all-linear", *, allow_quantised: bool = False) -> list[Site]:
    """The sites of a model, in the order of its modules.

    target_modules: "all-linear" leaves out the output heads and weights tied to an embedding; otherwise as in `CobraConfig`
    allow_quantised: also layers whose weight cannot be read, but which compute with it (`is_quantised_linear`)

    Raises ValueError for names that match no linear layer (with close names), a model without linear layers, weights that
    are quantised, sharded or empty, weights tied to an embedding, and a model in DistributedDataParallel or torch.compile.
    """
    _refuse_wrapped(model)
    allowed = is_quantised_linear if allow_quantised else lambda module: False
    _check_quantised(model, target_modules, allowed)
    for name, module in model.named_modules():
        if allowed(module):
            keep_differentiable(name, module)
    named = model.named_modules(remove_duplicate=False)
    linears = [(n, m) for n, m in named if n and (is_linear(m) or allowed(m))]
    if not linears:
        if is_linear(model):
            raise ValueError("the model is itself one linear layer; wrap it, e.g. nn.Sequential(model), so it can be replaced")
        raise ValueError(f"{type(model).__name__} has no linear layers (nn.Linear or transformers' Conv1D) to adapt")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    automatic = isinstance(target_modules, str) and target_modules == "all-linear"
    if automatic:
        heads = head_names(model)
        chosen = [(n, m) for n, m in linears if n not in heads and id(m.weight) not in embeddings]
        if not chosen:
            raise ValueError("all-linear leaves out output heads, and no other linear layer is left; name target_modules")
    else:
        chosen = _matching(linears, target_modules)
    modules = {id(module) for _, module in chosen}
    weights = {id(module.weight) for _, module in chosen}
    chosen = [(name, module) for name, module in linears if id(module) in modules]  # under all of its names
    for name, module in linears:
        if id(module) not in modules and id(module.weight) in weights:
            raise ValueError(
                f"{name} shares its weight with a target layer, and a merge would change it too; target both or none"
            )
    for name, module in chosen:
        _check_weight(name, module, tied=id(module.weight) in embeddings)
    return list(_group_by_weight(chosen))


def refuse_peft_layers(model: nn.Module) -> None:
    """Raises ValueError where peft has adapters on the model: their matrices would be layers of it."""
    if names := peft_layers(model):
        raise ValueError(f"peft has an adapter on {names[0]}: unload() it, or merge_and_unload() it into the weights first")


def peft_layers(model: nn.Module) -> list[str]:
    """Names of the modules that peft has an adapter on."""
    loaded = sys.modules.get("peft.tuners.tuners_utils")  # without it there are none
    return [name for name, module in model.named_modules() if loaded and isinstance(module, loaded.BaseTunerLayer)]


def fingerprint(sites: list[Site]) -> str:
    """A hash of names, shapes and 64 sampled values of each weight, equal for fp32 and bf16 copies of one checkpoint.

    Of quantised weights it holds the kind and no values.
    """
    digest = hashlib.sha256()
    for site in sites:
        if is_quantised_linear(site.module):
            digest.update(f"{site.name} {(site.out_features, site.in_features)} {quantised(site.module)}".encode())
            continue
        weight = site.weight.detach()
        rows = torch.arange(64, device="cpu") * 7919 % weight.shape[0]
        columns = torch.arange(64, device="cpu") * 104729 % weight.shape[1]
        values = weight[rows.to(weight.device), columns.to(weight.device)].to("cpu", torch.float32)
        digest.update(f"{site.name} {tuple(weight.shape)}".encode())
        digest.update(values.bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _refuse_wrapped(model: nn.Module) -> None:
    """Wrappers are part of the names of layers, under which nothing could be loaded into the model itself."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("the model is wrapped in DistributedDataParallel; give COBRA model.module, and wrap it after attach()")
    for name, module in model.named_modules():
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            raise ValueError(
                f"{name or 'the model'} is wrapped by torch.compile; give COBRA the model itself, and compile it after attach()"
            )


def _matching(linears: list[tuple[str, nn.Module]], targets: TargetModules) -> list[tuple[str, nn.Module]]:
    if callable(targets):
        chosen = [(n, m) for n, m in linears if targets(n, m)]
        if not chosen:
            raise ValueError(f"target_modules accepted none of the {len(linears)} linear layers")
        return chosen
    if isinstance(targets, str):
        chosen = [(n, m) for n, m in linears if re.fullmatch(targets, n)]
        if not chosen:
            raise ValueError(
                f"target_modules={targets!r} (a regular expression) matches no linear layer{_wider(targets, linears)}"
            )
        return chosen
    unknown = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n, _ in linears)]
    if unknown or not targets:
        hints = "; ".join(f"{t!r}{_close(t, linears)}" for t in unknown) or "the list is empty"
        raise ValueError(f"target_modules that match no linear layer: {hints}")
    return [(n, m) for n, m in linears if any(n == t or n.endswith(f".{t}") for t in targets)]


def _wider(pattern: str, linears: list[tuple[str, nn.Module]]) -> str:
    """What to write in the place of a regular expression that fits a part of a name, or else close ones."""
    name = next((n for n, _ in linears if re.search(pattern, n)), None)
    if name is None:
        return _close(pattern, linears, ".*")
    must = f": it must match the full name, such as {name!r}"
    if not re.fullmatch(r"[\w.]+", pattern):
        return f"{must}; write it between '.*(' and ').*'"
    full = next(w for w in (f".*{pattern}", f"{pattern}.*", f".*{pattern}.*") if re.fullmatch(w, name))
    ending = any(n.endswith(f".{pattern}") for n, _ in linears)
    return f"{must}; write {full!r}" + (f" or the tuple {(pattern,)!r}" if ending else "")


def _close(target: str, linears: list[tuple[str, nn.Module]], before: str = "") -> str:
    """before: what goes before each name, so that it can be typed as it stands"""
    endings = {".".join(n.split(".")[-depth:]) for n, _ in linears for depth in (1, 2, 99)}
    close = (
        difflib.get_close_matches(target, sorted(endings), n=3, cutoff=0.4)
        or sorted({n.split(".")[-1] for n, _ in linears})[:6]
    )
    return f" (did you mean {', '.join(repr(before + name) for name in close)}?)"


def _check_quantised(model: nn.Module, targets: TargetModules, allowed: Callable[[nn.Module], bool]) -> None:
    """Before anything is chosen: a quantised layer that a target would mean is not to be left out in silence."""
    found = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if n and quantised(m) and not allowed(m)]
    if isinstance(targets, str) and targets == "all-linear":
        meant = [n for n, m in found if m is not language_head(model) and n.split(".")[-1] not in LANGUAGE_HEADS | TASK_HEADS]
    elif isinstance(targets, str):
        meant = [n for n, _ in found if re.fullmatch(targets, n)]
    elif callable(targets):
        meant = [n for n, m in found if targets(n, m)]
    else:
        meant = [n for n, _ in found if any(n == t or n.endswith(f".{t}") for t in targets)]
    if meant:
        raise ValueError(
            f"{meant[0]}.weight is {quantised(model.get_submodule(meant[0]))} ({len(meant)} such layers), and adapters need "
            "floating-point weights: load the model unquantised or leave the layer out with target_modules. To train on the "
            "quantised model, calibrate a bf16 copy and give plan_ranks(scores, budget).to_peft_config() to peft"
        )


def _check_weight(name: str, module: nn.Module, tied: bool) -> None:
    if "weight" not in module._parameters:
        raise ValueError(f"{name}.weight is computed (a parametrization); remove it first, or leave the layer out")
    if getattr(module, "bias", None) is not None and "bias" not in module._parameters | module._buffers:
        raise ValueError(f"{name}.bias is computed (a parametrization); remove it first, or leave the layer out")
    weight = module.weight
    if sharded(weight):
        raise ValueError(
            f"{name}.weight lies in parts on the ranks ({sharded(weight)}); calibrate and attach before sharding it"
        )
    if not weight.numel():
        raise ValueError(f"{name}.weight is empty, shape {tuple(weight.shape)}; leave it out with target_modules")
    if tied:
        raise ValueError(f"{name}.weight is tied to an embedding, which a merge would change too; leave it out")


def _group_by_weight(chosen: list[tuple[str, nn.Module]]) -> Iterator[Site]:
    groups: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in chosen:
        groups.setdefault(id(module.weight), []).append((name, module))
    for members in groups.values():
        module = members[0][1]
        packed = is_quantised_linear(module)
        N, K = (module.out_features, module.in_features) if packed else linear_weight(module).shape
        yield Site(members[0][0], tuple(members), K, N)
