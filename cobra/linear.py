"""CobraLinear: a linear layer with a frozen weight and a gated low-rank branch, in the place of the layer it came from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cobra.distributed import whole
from cobra.lora import LoraLayer
from cobra.sites import is_conv1d, is_quantised_linear
from cobra_kernels import ConcreteSample, GatedLora, concrete_gates, gated_lora_linear
from cobra_kernels.backend import uses_triton

if TYPE_CHECKING:
    from cobra.adapter import Adapter


HARD_STRETCH = (-0.1, 1.1)  # of hard-concrete gates (Louizos et al. 2018)
HOOKS = (  # where nn.Module keeps those that a call runs
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def leave_fast_path(layer: nn.Module) -> None:
    """nn.TransformerEncoderLayer's fast path reads weights and calls no module, unless one of them has a hook."""
    layer.register_forward_pre_hook(_no_change)


def share_hooks(layer: nn.Module, module: nn.Module) -> None:
    """The layer runs the hooks of the module that it takes the place of; one added to or removed from either is so of both."""
    for name in HOOKS:
        setattr(layer, name, getattr(module, name))
    layer._is_full_backward_hook = module._is_full_backward_hook
    leave_fast_path(layer)


def hand_back_hooks(layer: nn.Module, module: nn.Module) -> None:
    """The module that takes its place back from the layer keeps their hooks, and the fast path."""
    if layer._backward_hooks is module._backward_hooks:  # nobody has put another module there
        module._is_full_backward_hook = layer._is_full_backward_hook
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _no_change]:
        del module._forward_pre_hooks[key]


def nesting_encoders(model: nn.Module) -> list[nn.TransformerEncoder]:
    """Those that pack their input for that fast path."""
    return [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]


def _no_change(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing."""


class CobraLinear(nn.Linear):
    """y = x Wᵀ + b + scaling ((dropout(x) Aᵀ) ∘ z) Bᵀ

    Parameters keep the base layer's names (`weight`, `bias`: the same objects, Conv1D's weight as (K, N)), beside

    lora_A: (r, K), lora_B: (N, r), lora_gate: (r,) gate logits, or None for gates that are all open

    and buffers that are no part of the state and that `Adapter.step` draws anew: `gate_noise` (r,), `gate_draw` (5,), the words
    that it is made of (`cobra_kernels.draw_words`), and `gate_temperature` (). In training mode z is the concrete sample of
    (lora_gate, gate_noise, gate_temperature), or the mean gate where there is no noise; in evaluation mode z is the mean gate.

    straight_through: gates are rounded in the forward, and their gradient is the sample's
    stretch: (low, high) of hard-concrete gates, or None: samples s and means become min(1, max(0, low + (high - low) s))
    backend: of `gated_lora_linear`; where that is Triton, the sample is drawn within the product, and no z is made
    """

    def __init__(self, linear: nn.Module, *, scaling: float, dropout: float):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.weight, self.bias = linear.weight, linear.bias
        self.transposed = is_conv1d(linear)
        packed = is_quantised_linear(linear)
        # a quantised weight is read by its own layer alone, which is no submodule here: the parameters have one owner
        self.__dict__["quantised_base"] = linear if packed else None
        N, K = (linear.out_features, linear.in_features) if packed else self.linear_weight.shape
        self.out_features, self.in_features = N, K
        self.scaling, self.dropout = scaling, dropout
        self.straight_through = False
        self.stretch: tuple[float, float] | None = None
        self.backend = "auto"
        self.cut: tuple[Tensor, Tensor] | None = None
        self.adapter: Adapter | None = None  # the handle this layer belongs to
        leave_fast_path(self)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        *,
        scaling: float = 1.0,
        dropout: float = 0.0,
        gate_logit: float | Sequence[float] | None = None,
        generator: torch.Generator | None = None,
    ) -> CobraLinear:
        """The adapted form of an nn.Linear or Conv1D; its output is the base layer's until lora_B moves from 0.

        rank: gates, at most min(K, N)
        gate_logit: initial logit of every gate, or of each; None for no gates
        generator: of lora_A's initialisation, on the CPU
        """
        layer = cls(linear, scaling=scaling, dropout=dropout)
        weight, N, K = layer.weight, layer.out_features, layer.in_features
        if not 1 <= rank <= min(N, K):
            raise ValueError(f"rank={rank} for a layer of {K} -> {N} features: expected 1 to {min(N, K)}")
        # half-precision bases train fp32 adapters; fp64 stays fp64
        dtype = torch.promote_types(weight.dtype, torch.float32)
        bound = 1 / math.sqrt(K)
        lora_A = torch.empty(rank, K, dtype=dtype, device="cpu").uniform_(-bound, bound, generator=generator)
        layer.lora_A = nn.Parameter(lora_A.to(weight.device))
        layer.lora_B = nn.Parameter(torch.zeros(N, rank, dtype=dtype, device=weight.device))
        layer.lora_gate = None
        if gate_logit is not None:
            logits = torch.tensor(gate_logit, dtype=dtype, device=weight.device)
            layer.lora_gate = nn.Parameter(logits.expand(rank).clone())
        layer._add_gate_buffers()
        return layer

    @classmethod
    def from_lora(cls, linear: nn.Module, lora: LoraLayer, dropout: float = 0.0) -> CobraLinear:
        """The adapted form with matrices that exist, all gates open; of any rank, the scale is in lora_B."""
        layer = cls(linear, scaling=1.0, dropout=dropout)
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        layer.lora_A = nn.Parameter(lora.lora_A.detach().to(layer.weight.device, dtype, copy=True))
        layer.lora_B = nn.Parameter(lora.lora_B.detach().to(layer.weight.device, dtype, copy=True))
        layer.lora_gate = None
        layer._add_gate_buffers()
        return layer

    @classmethod
    def sharing(cls, linear: nn.Module, other: CobraLinear) -> CobraLinear:
        """The adapted form of a module that computes with the same weight as `other`: one adapter, two biases."""
        layer = cls(linear, scaling=other.scaling, dropout=other.dropout)
        layer.lora_A, layer.lora_B, layer.lora_gate = other.lora_A, other.lora_B, other.lora_gate
        layer.straight_through, layer.stretch, layer.backend = other.straight_through, other.stretch, other.backend
        layer._add_gate_buffers()
        return layer

    def _add_gate_buffers(self) -> None:
        device = self.weight.device
        self.register_buffer("gate_noise", None, persistent=False)
        self.register_buffer("gate_draw", None, persistent=False)
        self.register_buffer("gate_temperature", torch.ones((), dtype=torch.float32, device=device), persistent=False)

    def folded(self) -> tuple[Tensor, Tensor]:
        """lora_A, and lora_B with the scaling and the evaluation gates in it: ΔW = folded lora_B @ lora_A."""
        factor = self.scaling if self.lora_gate is None else self.scaling * self.mean_gates(whole(self.lora_gate))
        return whole(self.lora_A).detach(), (whole(self.lora_B) * factor).detach()

    def mean_gates(self, logits: Tensor) -> Tensor:
        """logits (...) -> sigmoid(logits), stretched and cut to [0, 1] where gates are hard"""
        mean = torch.sigmoid(logits)
        if self.stretch is None:
            return mean
        low, high = self.stretch
        return (low + (high - low) * mean).clamp(0, 1)

    def open_probability(self, logits: Tensor) -> Tensor:
        """logits (...) -> P(z > 0) of hard gates at the step's temperature; sigmoid(logits), P(z > 1/2), of others"""
        if self.stretch is None:
            return torch.sigmoid(logits)
        low, high = self.stretch
        return torch.sigmoid(logits - self.gate_temperature * math.log(-low / high))

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def linear_weight(self) -> Tensor:
        """(N, K), a view for Conv1D."""
        return self.weight.t() if self.transposed else self.weight

    def gates(self) -> Tensor | None:
        """z (r,) as this mode uses it; None where all gates are open."""
        if self.lora_gate is None:
            return None
        if self.training and self.gate_noise is not None:
            z = concrete_gates(self.lora_gate, self.gate_noise, self.gate_temperature, stretch=self.stretch)
            return z + ((z > 0.5).to(z.dtype) - z).detach() if self.straight_through else z
        return self.mean_gates(self.lora_gate)

    @torch.no_grad()
    def take_draw(self, noise: Tensor, draw: Tensor, temperature: Tensor) -> None:
        """The noise (r,) of a step, the words (5,) that it is made of, and the temperature ()."""
        if self.gate_noise is None:
            self.gate_noise, self.gate_draw = noise.to(self.lora_gate, copy=True), draw.clone()
        else:
            self.gate_noise.copy_(noise)
            self.gate_draw.copy_(draw)
        self.gate_temperature.copy_(temperature)

    def _draws_inside(self) -> bool:
        sampled = self.training and self.gate_draw is not None
        return sampled and not self.straight_through and self.stretch is None and uses_triton(self.backend, self.weight)

    def branch(self) -> tuple[Tensor, Tensor, Tensor | ConcreteSample | None]:
        """lora_A, lora_B and z as this mode uses them."""
        if self.cut is not None:
            return *self.cut, None
        drawn = self._draws_inside()
        z = ConcreteSample(self.lora_gate, self.gate_draw, self.gate_temperature) if drawn else self.gates()
        return self.lora_A, self.lora_B, z

    def joins_others(self) -> bool:
        """Whether the forward is `gated_lora_linear` on torch's path, which computes several layers of one input together."""
        dropped = self.training and self.dropout
        return not (dropped or self.quantised_base is not None or self.cut or uses_triton(self.backend, self.weight))

    def operands(self) -> GatedLora:
        return GatedLora(self.linear_weight, self.lora_A, self.lora_B, self.gates(), self.scaling, self.bias)

    @contextmanager
    def cut_to(self, lora_A: Tensor, lora_B: Tensor) -> Iterator[None]:
        """Within the block these matrices count in the place of the layer's own, and no gates; blocks nest."""
        before, self.cut = self.cut, (lora_A, lora_B)
        try:
            yield
        finally:
            self.cut = before

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name for it
        """input (..., K) -> y (..., N)"""
        x = input
        shared = None if self.adapter is None else self.adapter.shared_inputs
        if shared is not None and self.cut is None and not torch.compiler.is_compiling():
            y = shared.output(self, x)
            if y is not None:
                return y
        lora_A, lora_B, z = self.branch()
        dropout = self.dropout if self.training and len(lora_A) else 0.0  # without a rank no random number is drawn
        if not dropout and self.quantised_base is None:
            options = {"scaling": self.scaling, "bias": self.bias, "backend": self.backend}
            return gated_lora_linear(x, self.linear_weight, lora_A, lora_B, z, **options)
        if self.backend == "triton":
            what = "a quantised weight" if self.quantised_base is not None else f"dropout={dropout}"
            raise RuntimeError(f"backend='triton' has no kernel for {what}; use backend='auto' for this layer")
        h = F.linear(F.dropout(x, dropout) if dropout else x, lora_A.to(x.dtype))
        h = h if z is None else h * z.to(h.dtype)
        return self._base(x) + self.scaling * F.linear(h, lora_B.to(h.dtype))

    def _base(self, x: Tensor) -> Tensor:
        if self.quantised_base is None:
            return F.linear(x, self.linear_weight, self.bias)
        self.quantised_base.weight, self.quantised_base.bias = self.weight, self.bias  # where the model was moved since
        return self.quantised_base.forward(x)  # no call: this layer runs its hooks

    def __getstate__(self) -> dict:
        return self.__dict__ | {"adapter": None}  # a copied or pickled layer leaves the handle, and with it the model, behind

    def extra_repr(self) -> str:
        gates = "open" if self.lora_gate is None else "gated"
        return f"{self.in_features} -> {self.out_features}, rank {self.rank} ({gates}), scaling {self.scaling:g}"


def adapters_of(model: nn.Module) -> list[Adapter]:
    """The handles of the adapters attached to a model, found by its layers."""
    layers = (module for module in model.modules() if isinstance(module, CobraLinear))
    return list({id(layer.adapter): layer.adapter for layer in layers if layer.adapter is not None}.values())
