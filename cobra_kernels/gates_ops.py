"""Registered operators on the gates of many sites, of which `sample_gates`, `gate_kl` and `gates_and_kl` are made.

    gates_forward   logits a, prior p, noise v or a draw, temperature T  ->  z, kl, open
    gates_backward  dz, dkl, dopen and the same operands                 ->  da

The equations are in `gates_and_kl`. Nothing but the operands is kept for backward: noise that was drawn is drawn again.

    torch.ops.cobra.gates_*          C++ on the CPU where it was built (`gates_cpu`), else torch
    torch.ops.cobra.gates_*_triton   Triton kernels (`gates_triton`), for fp32
    torch.ops.cobra.gates_*_cuda     CUDA kernels (`gates_cuda`), for fp32 and fp64

Everything is computed in fp64 and rounded once.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cobra_kernels import extension, gates_cpu, gates_cuda
from cobra_kernels.derivatives import check_differentiated_once
from cobra_kernels.gates_options import GateOptions, check_cover
from cobra_kernels.philox import gate_noise


def concrete(logits: Tensor, noise: Tensor, temperature: Tensor | float, options: GateOptions) -> Tensor:
    """z of every gate; differentiable."""
    s = torch.sigmoid((logits + noise) / temperature)
    return (options.low + (options.high - options.low) * s).clamp(0, 1) if options.hard else s


def bernoulli_kl(logits: Tensor, prior: Tensor) -> Tensor:
    """Exactly 0 where both are equal; differentiable."""
    return torch.sigmoid(logits) * (logits - prior) + logsigmoid(-logits) - logsigmoid(-prior)


def sampled_kl(logits: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
    """log q - log p of two logistic densities at the draw; differentiable."""
    v = noise + (logits - prior)
    return (v - 2 * logsigmoid(v)) - (noise - 2 * logsigmoid(noise))


def open_probability(logits: Tensor, temperature: Tensor | float, options: GateOptions) -> Tensor:
    """Of a hard gate to be above 0, else of a gate to be above 1/2; differentiable."""
    return torch.sigmoid(logits - temperature * options.log_ratio if options.hard else logits)


def drawn_noise(logits: Tensor, offsets: Tensor | None, options: GateOptions) -> Tensor:
    """Noise of every gate, on the device of the logits."""
    sites, ranks = options.layout(logits, offsets)
    lengths = None if offsets is None else offsets.diff().tolist()
    longest = ranks if lengths is None else max(lengths, default=0)
    noise = gate_noise(sites, longest, seed=options.seed, step=options.step, first_site=options.first_site)
    if lengths:
        noise = torch.cat([row[:length] for row, length in zip(noise, lengths, strict=True)])
    return noise.reshape(logits.shape).to(logits.device)


def forward(logits, prior, noise, offsets, temperature, chosen: GateOptions) -> tuple[Tensor, Tensor, Tensor]:
    """z, kl and open by torch, each like logits, or empty where it is not wanted."""
    a, p, v, T = _widened(logits, prior, noise, offsets, temperature, chosen)
    z, kl, opened = chosen.wanted
    values = (
        concrete(a, v, T, chosen) if z else None,
        (sampled_kl(a, p, v) if chosen.sampled else bernoulli_kl(a, p)) if kl else None,
        open_probability(a, T, chosen) if opened else None,
    )
    return tuple(logits.new_empty(0) if t is None else t.to(logits.dtype) for t in values)


def backward(gradients, logits, prior, noise, offsets, temperature, chosen: GateOptions) -> Tensor:
    """Gradient of the logits by torch."""
    dz, dkl, dopen = gradients
    a, p, v, T = _widened(logits, prior, noise, offsets, temperature, chosen)
    da = torch.zeros_like(a)
    if dz is not None:
        s = torch.sigmoid((a + v) / T)
        change = s * torch.sigmoid(-(a + v) / T) / T
        stretched = chosen.low + (chosen.high - chosen.low) * s
        inside = (stretched >= 0) & (stretched <= 1)
        da += dz * (torch.where(inside, change * (chosen.high - chosen.low), 0) if chosen.hard else change)
    if dkl is not None:
        da += dkl * (torch.tanh((v + (a - p)) / 2) if chosen.sampled else torch.sigmoid(a) * torch.sigmoid(-a) * (a - p))
    if dopen is not None:
        opened = open_probability(a, T, chosen)
        da += dopen * opened * open_probability(-a, -T, chosen)
    return da.to(logits.dtype)


def _widened(logits, prior, noise, offsets, temperature, options):
    """a, p, v and T in the dtype of the arithmetic; the noise is drawn where it is needed and not given."""
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no fp64
    if noise is None and options.noisy:
        noise = drawn_noise(logits, offsets, options)
    if temperature is None:
        temperature = torch.tensor(options.heat, dtype=torch.float32, device=logits.device)
    prior = None if prior is None else prior.to(logits.dtype)
    return tuple(None if t is None else t.to(dtype) for t in (logits, prior, noise, temperature))


def _forward(logits, prior, noise, offsets, temperature, *options):
    return forward(logits, prior, noise, offsets, temperature, GateOptions(*options))


def _backward(dz, dkl, dopen, logits, prior, noise, offsets, temperature, *options):
    return backward([dz, dkl, dopen], logits, prior, noise, offsets, temperature, GateOptions(*options))


def _forward_cpu(logits, prior, noise, offsets, temperature, *options):
    if offsets is not None:
        check_cover(offsets, len(logits))  # while a graph is traced offsets have no values to check
    library = extension.load()
    if library is None or logits.dtype not in gates_cpu.DTYPES:
        return _forward(logits, prior, noise, offsets, temperature, *options)
    return gates_cpu.forward(library, logits, prior, noise, offsets, temperature, GateOptions(*options))


def _backward_cpu(dz, dkl, dopen, logits, prior, noise, offsets, temperature, *options):
    library = extension.load()
    if library is None or logits.dtype not in gates_cpu.DTYPES:
        return _backward(dz, dkl, dopen, logits, prior, noise, offsets, temperature, *options)
    return gates_cpu.backward(library, [dz, dkl, dopen], logits, prior, noise, offsets, temperature, GateOptions(*options))


def _forward_triton(logits, prior, noise, offsets, temperature, *options):
    from cobra_kernels import gates_triton

    return gates_triton.forward(logits, prior, noise, offsets, temperature, GateOptions(*options))


def _backward_triton(dz, dkl, dopen, logits, prior, noise, offsets, temperature, *options):
    from cobra_kernels import gates_triton

    return gates_triton.backward([dz, dkl, dopen], logits, prior, noise, offsets, temperature, GateOptions(*options))


def _forward_cuda(logits, prior, noise, offsets, temperature, *options):
    return gates_cuda.forward(logits, prior, noise, offsets, temperature, GateOptions(*options))


def _backward_cuda(dz, dkl, dopen, logits, prior, noise, offsets, temperature, *options):
    return gates_cuda.backward([dz, dkl, dopen], logits, prior, noise, offsets, temperature, GateOptions(*options))


def _forward_fake(logits, prior, noise, offsets, temperature, *options):
    return tuple(logits.new_empty(logits.shape if wanted else 0) for wanted in GateOptions(*options).wanted)


def _backward_fake(dz, dkl, dopen, logits, prior, noise, offsets, temperature, *options):
    return logits.new_empty(logits.shape)


_OPERANDS = (
    "Tensor logits, Tensor? prior, Tensor? noise, Tensor? offsets, Tensor? temperature, SymInt seed, SymInt step,"
    " SymInt first_site, float heat, float low, float high, bool sampled, bool[] wanted"
)
for _suffix in ("", "_triton", "_cuda"):
    torch.library.define(f"cobra::gates_forward{_suffix}", f"({_OPERANDS}) -> (Tensor z, Tensor kl, Tensor open)")
    torch.library.define(f"cobra::gates_backward{_suffix}", f"(Tensor? dz, Tensor? dkl, Tensor? dopen, {_OPERANDS}) -> Tensor")
    torch.library.register_fake(f"cobra::gates_forward{_suffix}", _forward_fake)
    torch.library.register_fake(f"cobra::gates_backward{_suffix}", _backward_fake)
for _name, _key, _implementation in (
    ("forward", "default", _forward),
    ("backward", "default", _backward),
    ("forward", "cpu", _forward_cpu),
    ("backward", "cpu", _backward_cpu),
    ("forward_triton", "default", _forward_triton),
    ("backward_triton", "default", _backward_triton),
    ("forward_cuda", "default", _forward_cuda),
    ("backward_cuda", "default", _backward_cuda),
):
    torch.library.impl(f"cobra::gates_{_name}", _key, _implementation)


_FORWARD, _BACKWARD = (
    {
        backend: getattr(torch.ops.cobra, f"gates_{way}{suffix}").default
        for backend, suffix in ((None, ""), ("triton", "_triton"), ("cuda", "_cuda"))
    }
    for way in ("forward", "backward")
)


class GateFunction(torch.autograd.Function):
    """The wanted ones of z, kl and open, differentiable in the logits; backend as in `gates_and_kl`."""

    @staticmethod
    def forward(ctx, logits, prior, noise, offsets, temperature, options, backend):
        operands = (logits, prior, noise, offsets, temperature)
        ctx.save_for_backward(*operands)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend = options, backend
        if backend is None and gates_cpu.takes(logits, prior, noise, temperature):
            outputs = gates_cpu.forward(extension.load(), *operands, options)
        else:
            outputs = _FORWARD[backend](*operands, *_plain(options))
        return tuple(t for t, wanted in zip(outputs, options.wanted, strict=True) if wanted)

    @staticmethod
    def backward(ctx, *gradients):
        check_differentiated_once(ctx.options.operation)
        found = iter(gradients)
        each = [next(found) if wanted else None for wanted in ctx.options.wanted]
        needed = tuple(t is not None for t in each)
        if not any(needed):
            return (None,) * 7
        options = replace(ctx.options, wanted=needed)
        operands = ctx.saved_tensors
        logits, prior, noise, _, temperature = operands
        if ctx.backend is None and gates_cpu.takes(*each, logits, prior, noise, temperature):
            gradient = gates_cpu.backward(extension.load(), each, *operands, options)
        else:
            gradient = _BACKWARD[ctx.backend](*each, *operands, *_plain(options))
        return gradient, *(None,) * 6


def _plain(options: GateOptions) -> tuple:
    return (
        options.seed,
        options.step,
        options.first_site,
        options.heat,
        options.low,
        options.high,
        options.sampled,
        options.wanted,
    )
