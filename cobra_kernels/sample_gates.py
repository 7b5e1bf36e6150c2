"""Concrete (relaxed Bernoulli) gates as a pure function of (logits, seed, step, site).

    u   = (n + 1/2) / 2^24           n: the top 24 bits of the gate's Philox word, so 0 < u < 1
    z_k = sigmoid((a_k + log u - log(1 - u)) / temperature)        P(z_k > 1/2) = sigmoid(a_k)
    dz_k/da_k = z_k (1 - z_k) / temperature

Maddison et al. 2017 and Jang et al. 2017; COBRA Eq. (10). With a stretch (l, h), l < 0 < 1 < h, the gates are hard-concrete
(Louizos et al. 2018): min(1, max(0, l + (h - l) z_k)), exactly 0 or 1 with some probability, and there without a gradient.

Logits are fp32 (or fp64); the noise and the sample are computed in fp64 and rounded once. What the bits depend on is said in
`gates_and_kl`, which gives gates and KL in one call.
"""

import torch
from torch import Tensor

from cobra_kernels import extension, gates_cpu, gates_ops
from cobra_kernels.derivatives import check_differentiated_once, check_no_transforms
from cobra_kernels.gates_ops import GateFunction, concrete
from cobra_kernels.gates_options import GateOptions, check_temperature, signed, stretch_of
from cobra_kernels.philox import gate_noise

Stretch = tuple[float, float]


def concrete_gates_ref(logits: Tensor, noise: Tensor, temperature: Tensor | float, *, stretch: Stretch | None = None) -> Tensor:
    """logits (..., r), noise (..., r), temperature scalar -> z (..., r)"""
    low, high = stretch_of(stretch)
    work = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no fp64
    options = GateOptions(low=low, high=high)
    return concrete(logits.to(work), noise.to(work), temperature, options).to(logits.dtype)


def _forward(logits, noise, temperature, low, high):
    return gates_ops.forward(logits, None, noise, None, temperature, GateOptions(low=low, high=high))[0]


def _backward(dz, logits, noise, temperature, low, high):
    return gates_ops.backward([dz, None, None], logits, None, noise, None, temperature, GateOptions(low=low, high=high))


def _forward_cpu(logits, noise, temperature, low, high):
    library = extension.load()
    if library is None or logits.dtype not in gates_cpu.DTYPES:
        return _forward(logits, noise, temperature, low, high)
    return gates_cpu.concrete(library, None, logits, noise, temperature, low, high)


def _backward_cpu(dz, logits, noise, temperature, low, high):
    library = extension.load()
    if library is None or logits.dtype not in gates_cpu.DTYPES:
        return _backward(dz, logits, noise, temperature, low, high)
    return gates_cpu.concrete(library, dz, logits, noise, temperature, low, high)


_OPERANDS = "Tensor logits, Tensor noise, Tensor temperature, float low, float high"
torch.library.define("cobra::concrete_gates", f"({_OPERANDS}) -> Tensor")
torch.library.define("cobra::concrete_gates_backward", f"(Tensor dz, {_OPERANDS}) -> Tensor")
torch.library.impl("cobra::concrete_gates", "default", _forward)
torch.library.impl("cobra::concrete_gates", "cpu", _forward_cpu)
torch.library.impl("cobra::concrete_gates_backward", "default", _backward)
torch.library.impl("cobra::concrete_gates_backward", "cpu", _backward_cpu)
torch.library.register_fake("cobra::concrete_gates", lambda logits, *rest: logits.new_empty(logits.shape))
torch.library.register_fake("cobra::concrete_gates_backward", lambda dz, logits, *rest: logits.new_empty(logits.shape))
_concrete_gates = torch.ops.cobra.concrete_gates.default
_concrete_gates_backward = torch.ops.cobra.concrete_gates_backward.default


class _ConcreteGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, noise, temperature, low, high):
        ctx.save_for_backward(logits, noise, temperature)
        ctx.stretch = low, high
        if gates_cpu.takes(logits, noise, temperature):
            return gates_cpu.concrete(extension.load(), None, logits, noise, temperature, low, high)
        return _concrete_gates(logits, noise, temperature, low, high)

    @staticmethod
    def backward(ctx, dz):
        check_differentiated_once("concrete_gates")
        operands = (dz, *ctx.saved_tensors)
        if gates_cpu.takes(*operands):
            gradient = gates_cpu.concrete(extension.load(), *operands, *ctx.stretch)
        else:
            gradient = _concrete_gates_backward(*operands, *ctx.stretch)
        return gradient, None, None, None, None


def concrete_gates(logits: Tensor, noise: Tensor, temperature: Tensor, *, stretch: Stretch | None = None) -> Tensor:
    """Gates from noise that is already drawn; differentiable in the logits.

    logits: (..., r) fp32 or fp64
    noise: (..., r)
    temperature: () tensor, greater than 0
    stretch: (low, high) of hard-concrete gates, as a rule (-0.1, 1.1)

    out: (..., r) in the dtype of logits, each in [0, 1]

    Raises ValueError where shapes differ, RuntimeError under torch.func's transforms and in backward under create_graph.
    """
    check_no_transforms("concrete_gates", "use concrete_gates_ref")
    if noise.shape != logits.shape:
        raise ValueError(f"noise {tuple(noise.shape)} and logits {tuple(logits.shape)} differ in shape")
    return _ConcreteGates.apply(logits, noise, temperature, *stretch_of(stretch))


def sample_gates_ref(
    logits: Tensor, *, seed: int, step: int, temperature: float, first_site: int = 0, stretch: Stretch | None = None
) -> Tensor:
    """logits (sites, r) -> z (sites, r); row i is site `first_site` + i"""
    noise = gate_noise(*logits.shape, seed=seed, step=step, first_site=first_site).to(logits.device)
    T = torch.tensor(check_temperature(temperature), dtype=torch.float32, device=logits.device)
    return concrete_gates_ref(logits, noise, T, stretch=stretch)


def sample_gates(
    logits: Tensor, *, seed: int, step: int, temperature: float, first_site: int = 0, stretch: Stretch | None = None
) -> Tensor:
    """Draws the gates of many sites; the same arguments always give the same gates.

    logits: (sites, r); row i is site `first_site` + i
    seed, step: integers in [0, 2^64)
    temperature: greater than 0
    stretch: (low, high) of hard-concrete gates, as a rule (-0.1, 1.1)

    out: (sites, r)

    Raises ValueError for shapes and numbers out of range, RuntimeError as `concrete_gates` does.
    """
    check_no_transforms("sample_gates", "draw with gate_noise outside of them, and use concrete_gates_ref")
    if logits.ndim != 2:
        raise ValueError(f"logits must be (sites, ranks), got shape {tuple(logits.shape)}")
    heat = check_temperature(temperature)
    options = GateOptions(signed(seed), signed(step), first_site, heat, *stretch_of(stretch))
    return GateFunction.apply(logits, None, None, None, None, options, None)[0]
