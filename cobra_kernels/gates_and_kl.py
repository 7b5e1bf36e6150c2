"""Gates of a whole model in one call: their sample, their KL and the probability that they are open, forward and backward.

    v    = log u - log(1 - u)           u of the gate's Philox word, `sample_gates`
    s    = sigmoid((a + v) / T)         z = s, the concrete sample
    z    = min(1, max(0, l + (h - l) s))                           hard-concrete, with a stretch (l, h), l < 0 < 1 < h
    kl   = alpha (a - p) - softplus(a) + softplus(p)               of Bernoullis, alpha = sigmoid(a)
    kl   = f(v + a - p) - f(v),  f(x) = |x| + 2 log(1 + exp(-|x|)) of concrete densities at the draw, with kl="concrete"
    open = sigmoid(a - T log(-l / h))                              P(z > 0) of a hard gate
    open = alpha                                                   P(z > 1/2) of one that is not

    dz/da = s (1 - s) / T, times h - l within the stretch and 0 where it was cut
    dkl/da = alpha (1 - alpha) (a - p)  or  tanh((v + a - p) / 2)            dopen/da = open (1 - open)

    a logits, p prior logits   (sites, r), or (n,) with offsets (sites + 1,)

Louizos et al. 2018 for hard-concrete; its KL is that of the variables before the cut, which is no smaller. Nothing but the
operands is saved: backward draws the same words again. The prior and T get no gradient; double backward and torch.func's
transforms are refused.

All arithmetic is fp64, each result rounded once. C++ and CUDA (`csrc/gates.h`) and the Triton kernels do the same IEEE
operations in the same order, without contraction: the same bits by construction. Their noise is the fp32 number nearest to
log(u / (1 - u)) for each of the 2^24 u, and torch's is too. What torch computes, where nothing is compiled, can differ: z and
open in their last bit, where fp64 ends beside a rounding boundary of fp32; kl, a difference, by 1e-15 before it is rounded. MPS
has no fp64, and computes in fp32.

The Triton and CUDA paths have been compiled for sm_80 and sm_90, and run on the CPU, interpreted and thread by thread. Neither
has run on a GPU: they are off unless asked for.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cobra_kernels import cuda_extension
from cobra_kernels.backend import require_triton
from cobra_kernels.derivatives import check_no_transforms
from cobra_kernels.gates_ops import GateFunction, bernoulli_kl, concrete, drawn_noise, open_probability, sampled_kl
from cobra_kernels.gates_options import GateOptions, check_cover, check_temperature, signed, stretch_of

KL = Literal["bernoulli", "concrete"]


class Gates(NamedTuple):
    """z, kl, open: each of the shape of the logits."""

    z: Tensor
    kl: Tensor
    open: Tensor


def gates_and_kl_ref(
    logits: Tensor,
    prior_logits: Tensor,
    *,
    seed: int,
    step: int,
    temperature: float,
    first_site: int = 0,
    offsets: Tensor | None = None,
    kl: KL = "bernoulli",
    stretch: tuple[float, float] | None = None,
) -> Gates:
    """The equations as they are written, in the dtype of the logits; arguments as in `gates_and_kl`."""
    heat = check_temperature(temperature)
    options = GateOptions(signed(seed), signed(step), first_site, heat, *stretch_of(stretch), kl == "concrete")
    noise = drawn_noise(logits, offsets, options).to(logits.dtype)
    T = torch.tensor(heat, dtype=torch.float32, device=logits.device).to(logits.dtype)
    divergence = sampled_kl(logits, prior_logits, noise) if options.sampled else bernoulli_kl(logits, prior_logits)
    return Gates(concrete(logits, noise, T, options), divergence, open_probability(logits, T, options))


def gates_and_kl(
    logits: Tensor,
    prior_logits: Tensor,
    *,
    seed: int,
    step: int,
    temperature: float,
    first_site: int = 0,
    offsets: Tensor | None = None,
    kl: KL = "bernoulli",
    stretch: tuple[float, float] | None = None,
    backend: Literal["triton", "cuda"] | None = None,
) -> Gates:
    """Sample, KL and open probability of every gate of a model; the same arguments always give the same bits.

    logits: (sites, r); or (n,) with offsets, where sites have gates of uneven number
    prior_logits: the same shape; gets no gradient
    seed, step: integers in [0, 2^64)
    temperature: greater than 0
    first_site: the site of the first row; gate k of a site has the same noise whatever is drawn with it
    offsets: (sites + 1,) int64 from 0 to n on the device of the logits; site i has gates offsets[i] to offsets[i + 1] - 1;
        on the CPU they are checked, and a compiled graph checks them where it runs
    kl: "bernoulli" is the closed form, "concrete" the one-sample estimate at this draw, which may be negative
    stretch: (low, high) of hard-concrete gates, as a rule (-0.1, 1.1)
    backend: "triton" (fp32) and "cuda" (the library of `cuda_extension`) need a CUDA device; nothing else is tried where they
        cannot run

    out: z, kl, open, each of the shape and dtype of the logits; sums of open over a site are its expected rank

    Raises ValueError for shapes and numbers out of range, RuntimeError for a backend that cannot run, under torch.func's
    transforms, and in backward under create_graph.
    """
    check_no_transforms("gates_and_kl", "draw with gate_noise outside of them, and use concrete_gates_ref and gate_kl_ref")
    _check(logits, prior_logits, offsets, kl, backend)
    heat = check_temperature(temperature)
    options = GateOptions(signed(seed), signed(step), first_site, heat, *stretch_of(stretch), kl == "concrete", (True,) * 3)
    return Gates(*GateFunction.apply(logits, prior_logits, None, offsets, None, options, backend))


def _check(logits, prior_logits, offsets, kl, backend) -> None:
    if offsets is None and logits.ndim != 2:
        raise ValueError(f"logits must be (sites, ranks), or (n,) with offsets; got shape {tuple(logits.shape)}")
    if offsets is not None and (logits.ndim != 1 or offsets.ndim != 1 or not len(offsets) or offsets.dtype != torch.int64):
        raise ValueError(
            f"offsets must be (sites + 1,) of int64 beside logits (n,), got {tuple(offsets.shape)} of {offsets.dtype} beside "
            f"{tuple(logits.shape)}"
        )
    if offsets is not None and offsets.device != logits.device:
        raise ValueError(f"offsets are on {offsets.device} and logits on {logits.device}; move them to one device")
    if offsets is not None and offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        check_cover(offsets, len(logits))
    if prior_logits.shape != logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and prior_logits {tuple(prior_logits.shape)} differ in shape")
    if kl not in ("bernoulli", "concrete"):
        raise ValueError(f"no KL {kl!r}; there are 'bernoulli' and 'concrete'")
    if backend not in (None, "triton", "cuda"):
        raise ValueError(f"no backend {backend!r}; there are 'triton', 'cuda', and None for the one that runs everywhere")
    if backend == "cuda":
        cuda_extension.require(logits)
    if backend == "triton":
        require_triton(logits)
        if logits.dtype != torch.float32:
            raise ValueError(
                f"backend='triton' takes gates in float32, not {logits.dtype}; the default backend takes float64 too"
            )
