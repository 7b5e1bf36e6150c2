"""Many adapters over one base model, unmerged: every row of a batch chooses its own.

    y_t = x_t Wᵀ + b + B_a (A_a x_t)         a the adapter of token t's row, or none

The ranks of all adapters lie side by side in one pair of matrices a layer, Σ r rows and no padding.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cobra.layout import batch_second
from cobra.linear import CobraLinear, hand_back_hooks, nesting_encoders, share_hooks
from cobra.lora import LoraAdapter, LoraLayer, check_forward, check_layer, check_names
from cobra.sites import find_sites, is_conv1d, linear_weight
from cobra_kernels.packed_lora import Segments, packed_lora_, segment_tokens

_IN_EXPERT = re.compile(r"(^|\.)experts?(_?\d+)?\.")  # as transformers' models name them; a shared expert gets whole rows


class PackedLinear(nn.Linear):
    """The base layer and the packed matrices of all adapters. State-dict keys and hooks are the base layer's.

    lora_A: (R, K), lora_B: (N, R), in the weight's dtype; ranks: of every adapter, in the order of `ServedAdapters.names`
    """

    def __init__(self, name: str, linear: nn.Module, rows: Rows):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.weight, self.bias, self.transposed = linear.weight, linear.bias, is_conv1d(linear)
        self.out_features, self.in_features = linear_weight(linear).shape
        self.rows, self.ranks = rows, ()
        self.expert = name if _IN_EXPERT.search(name) else None
        share_hooks(self, linear)
        self.register_buffer("lora_A", self.weight.new_empty(0, self.in_features), persistent=False)
        self.register_buffer("lora_B", self.weight.new_empty(0, self.out_features).t(), persistent=False)
        self.train(linear.training)

    def append(self, layer: LoraLayer | None) -> None:
        """One more adapter at the end; None where it lacks this layer."""
        self.ranks += (0 if layer is None else layer.rank,)
        if layer is not None:
            self.lora_A = torch.cat([self.lora_A, layer.lora_A.to(self.lora_A)])
            self.lora_B = torch.cat([self.lora_B.t(), layer.lora_B.t().to(self.lora_B)]).t()

    def remove(self, index: int) -> None:
        start, stop = sum(self.ranks[:index]), sum(self.ranks[: index + 1])
        self.ranks = self.ranks[:index] + self.ranks[index + 1 :]
        self.lora_A = torch.cat([self.lora_A[:start], self.lora_A[stop:]])
        self.lora_B = torch.cat([self.lora_B.t()[:start], self.lora_B.t()[stop:]]).t()

    def forward(self, input: Tensor) -> Tensor:
        """input (rows, ..., K) -> y (rows, ..., N)"""
        x = input
        y = F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)
        if self.expert and not any(self.ranks[i] for i in self.rows.ids or () if i >= 0):
            return y  # no row adapts it, so none need be told apart
        tokens = self.rows.of_tokens(x, self.expert)
        if tokens is None or not sum(self.ranks):
            return y
        x, lora_A, lora_B = (t.to(y.dtype) for t in (x, self.lora_A, self.lora_B))  # autocast's, where it is on
        packed_lora_(y.view(-1, self.out_features), x.reshape(-1, self.in_features), lora_A, lora_B, self.ranks, tokens)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {len(self.ranks)} adapters, {sum(self.ranks)} ranks in all"


class Rows:
    """Which adapter each row of the batch uses, seen by every layer."""

    def __init__(self):
        self.ids: tuple[int, ...] | None = None
        self._of_tokens: dict[tuple[int, torch.device], Segments] = {}

    def set(self, ids: tuple[int, ...] | None) -> None:
        self.ids, self._of_tokens = ids, {}

    def of_tokens(self, x: Tensor, expert: str | None = None) -> Segments | None:
        """Which tokens of x (rows, ..., K) each adapter takes; None outside of `ServedAdapters.use`.

        x may have n times as many rows (beams, or rows and tokens in one dimension): each row's stand together.

        expert: name of a layer that gets the tokens routed to it, whichever rows they are of
        """
        if self.ids is None:
            return None
        ids = self.ids
        if expert is not None:
            if len(set(ids)) > 1:
                raise ValueError(
                    f"{expert} belongs to an expert, which sees tokens of all rows mixed, and the rows use {len(set(ids))} "
                    "adapters (None is one): use('name') for batches of one adapter, or serve adapters without experts' layers"
                )
            ids = ids[:1]  # tokens in any number
        rows, tokens = len(ids), x[..., 0].numel()
        if x.ndim < 2 or x.shape[0] % rows:
            raise ValueError(
                f"{rows} rows have adapters, and the layer got an input of shape {tuple(x.shape)}: name one for each row"
            )
        key = (tokens, x.device)
        if key not in self._of_tokens:
            of_rows = torch.tensor(ids, device=x.device)
            self._of_tokens[key] = segment_tokens(of_rows.repeat_interleave(tokens // rows))
        return self._of_tokens[key]


class ServedAdapters:
    """The handle on a model's packed adapters. Made by `serve`."""

    def __init__(self, model: nn.Module, layers: dict[str, PackedLinear], modules: dict[str, nn.Module], rows: Rows):
        self.model, self._layers, self._modules, self._rows = model, layers, modules, rows
        self.names: tuple[str, ...] = ()
        self._detached = False
        self._nesting = nesting_encoders(model)
        self._set_nested_tensors(False)

    def _set_nested_tensors(self, allowed: bool) -> None:
        for encoder in self._nesting:
            encoder.use_nested_tensor = allowed

    @contextmanager
    def use(self, rows: str | Sequence[str | None]) -> Iterator[None]:
        """Within the block row i of every batch is computed with adapter rows[i], None meaning the base model alone.

        rows: one name for all rows, or a name or None for each

        Batches may have n times as many rows, as of beams: the first n take rows[0], and so on. Raises ValueError for unknown
        names, and after `detach`; the layers raise it for batches of other sizes, and those of experts for different adapters.
        """
        self._check_serving()
        chosen = [rows] if isinstance(rows, str) else list(rows)
        unknown = [name for name in chosen if name is not None and name not in self.names]
        if unknown or not chosen:
            raise ValueError(f"no adapter {unknown[0]!r}" if unknown else "no rows; the adapters are " + ", ".join(self.names))
        before = self._rows.ids
        self._rows.set(tuple(-1 if name is None else self.names.index(name) for name in chosen))
        try:
            yield
        finally:
            self._rows.set(before)

    def add(self, name: str, adapter: LoraAdapter) -> None:
        """Raises ValueError for a name that is taken, heads, layers that are not packed here or have other shapes, modules of
        which it holds one of several names, and after `detach`."""
        self._check_serving()
        if name in self.names:
            raise ValueError(f"an adapter {name!r} is served already; remove it first")
        _check(self.model, name, adapter, self._layers)
        for layer_name, layer in self._layers.items():
            found = adapter.layers.get(layer_name)
            layer.append(found if found is not None and found.rank else None)
        self.names += (name,)

    def remove(self, name: str) -> None:
        """Raises ValueError for an unknown name, and within `use`, whose rows name adapters by their places."""
        self._check_serving()
        if self._rows.ids is not None:
            raise ValueError(f"rows use adapters now: remove {name!r} after the block of use()")
        if name not in self.names:
            raise ValueError(f"no adapter {name!r}; there are {', '.join(self.names) or 'none'}")
        index = self.names.index(name)
        for layer in self._layers.values():
            layer.remove(index)
        self.names = self.names[:index] + self.names[index + 1 :]

    def detach(self) -> None:
        """Puts the base model's own modules back."""
        for name, module in self._modules.items():
            module.train(self.model.training)
            hand_back_hooks(self.model.get_submodule(name), module)
            self.model.set_submodule(name, module)
        self._set_nested_tensors(True)
        self._detached = True

    def _check_serving(self) -> None:
        if self._detached:
            raise ValueError("these adapters are detached: the model is its base again; serve() them anew")

    @property
    def parameters(self) -> int:
        """Elements of the packed matrices."""
        return sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in self._layers.values())

    def __repr__(self) -> str:
        return f"ServedAdapters({', '.join(self.names)}; {len(self._layers)} layers, {self.parameters:,} parameters)"


def serve(model: nn.Module, adapters: Mapping[str, LoraAdapter]) -> ServedAdapters:
    """Packs adapters over a model for inference, side by side; no row uses any until `ServedAdapters.use`.

    Adapters added later must not have layers that none of these has.

    Raises ValueError for no adapters, heads (rows cannot choose a head), layers the model lacks or has in another shape or with
    a forward of their own, modules of which an adapter holds one of several names, an adapter already attached, and attention
    that takes batches second.
    """
    if not adapters:
        raise ValueError("no adapters to serve")
    if any(isinstance(module, (CobraLinear, PackedLinear)) for module in model.modules()):
        raise ValueError("an adapter is attached already; detach() or merge() it first")
    if second := batch_second(model):
        raise ValueError(
            f"{second[0]} takes batches in its second dimension; rows are told apart in the first (batch_first=True)"
        )
    names = {name for adapter in adapters.values() for name, layer in adapter.layers.items() if layer.rank}
    for key, adapter in adapters.items():
        _check(model, key, adapter, names)
    for name in names:
        check_forward(model, name)
    rows, layers, modules = Rows(), {}, {}
    for site in find_sites(model, lambda name, module: name in names):
        packed: dict[int, PackedLinear] = {}
        for name, module in site.modules:
            if id(module) not in packed:
                packed[id(module)] = layers[name] = PackedLinear(name, module, rows)
            modules[name] = module
            model.set_submodule(name, packed[id(module)])
    served = ServedAdapters(model, layers, modules, rows)
    for key, adapter in adapters.items():
        served.add(key, adapter)
    return served


def _check(model: nn.Module, key: str, adapter: LoraAdapter, packed: Container[str]) -> None:
    if adapter.heads:
        head = next(iter(adapter.heads))
        raise ValueError(f"adapter {key!r} brings a head ({head}), and rows cannot choose heads; merge it instead")
    for name, layer in adapter.layers.items():
        if layer.rank and name not in packed:
            raise ValueError(f"adapter {key!r} adapts {name}, which is not packed; serve it from the start")
        if layer.rank:
            check_layer(model, name, layer)
    check_names(model, {name for name, layer in adapter.layers.items() if layer.rank})
