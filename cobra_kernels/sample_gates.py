"""Concrete (relaxed Bernoulli) gates as a pure function of (logits, seed, step, site).

    u   = (n + 1/2) / 2^24           n: the top 24 bits of the gate's Philox word, so 0 < u < 1
    z_k = sigmoid((a_k + log u - log(1 - u)) / temperature)        P(z_k > 1/2) = sigmoid(a_k)
    dz_k/da_k = z_k (1 - z_k) / temperature

Maddison et al. 2017 and Jang et al. 2017; COBRA Eq. (10). Logits are fp32 (or fp64); the noise and the sample are computed
in fp64 and rounded once, so that devices with different `log` and `exp` agree. Only z is saved for backward.
"""

import torch
from torch import Tensor

from cobra_kernels.philox import gate_words


def gate_noise(sites: int, ranks: int, *, seed: int, step: int, first_site: int = 0) -> Tensor:
    """Logistic noise of all gates at one step.

    out: (sites, ranks) fp32 on the CPU
    """
    words = gate_words(sites, ranks, seed, step, first_site)
    u = ((words >> 8).double() + 0.5) * 2.0**-24
    return (u.log() - (1 - u).log()).float()


def concrete_gates_ref(logits: Tensor, noise: Tensor, temperature: Tensor | float) -> Tensor:
    """logits (..., r), noise (..., r), temperature scalar -> z (..., r)"""
    work = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no fp64
    return torch.sigmoid((logits.to(work) + noise.to(work)) / temperature).to(logits.dtype)


class _ConcreteGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, noise, temperature):
        z = concrete_gates_ref(logits, noise, temperature)
        ctx.save_for_backward(z, temperature)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dz):
        z, temperature = ctx.saved_tensors
        return dz * z * (1 - z) / temperature.to(z.dtype), None, None


def concrete_gates(logits: Tensor, noise: Tensor, temperature: Tensor) -> Tensor:
    """Gates from noise that is already drawn; differentiable in the logits.

    logits: (..., r) fp32 or fp64
    noise: (..., r)
    temperature: () tensor, greater than 0

    out: (..., r) in the dtype of logits, each in [0, 1]
    """
    return _ConcreteGates.apply(logits, noise, temperature)


def sample_gates_ref(logits: Tensor, *, seed: int, step: int, temperature: float, first_site: int = 0) -> Tensor:
    """logits (sites, r) -> z (sites, r); row i is site `first_site` + i"""
    noise = gate_noise(*logits.shape, seed=seed, step=step, first_site=first_site)
    return concrete_gates_ref(logits, noise.to(logits.device), temperature)


def sample_gates(logits: Tensor, *, seed: int, step: int, temperature: float, first_site: int = 0) -> Tensor:
    """Draws the gates of many sites; the same arguments always give the same gates.

    logits: (sites, r); row i is site `first_site` + i
    seed, step: integers in [0, 2^64)
    temperature: greater than 0

    out: (sites, r)
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (sites, ranks), got shape {tuple(logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    noise = gate_noise(*logits.shape, seed=seed, step=step, first_site=first_site).to(logits.device)
    return concrete_gates(logits, noise, torch.tensor(temperature, device=logits.device))
