"""Triton kernels of the gates' operators: all gates of a model in one launch forward and one backward.

The equations are in `gates_and_kl`, the functions on a gate in `gates_math_triton`; launches forbid contraction, as those ask.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cobra_kernels.gates_math_triton import (
    bernoulli_kl,
    concrete,
    concrete_slope,
    draw_noise,
    exp_of_negative,
    sampled_kl_slope,
    sigmoid,
    slope,
    surprise,
)
from cobra_kernels.gates_options import GateOptions, flat


@triton.jit
def _bounds(offsets_ptr, n, ranks, RAGGED: tl.constexpr):
    """First gate of the program's site, and the one after its last."""
    site = tl.program_id(0).to(tl.int64)
    if RAGGED:
        begin, end = tl.load(offsets_ptr + site), tl.load(offsets_ptr + site + 1)
    else:
        begin = site * ranks
        end = tl.minimum(begin + ranks, n)
    return begin, end


@triton.jit
def _noise(noise_ptr, gates, begin, mask, word, DRAWS: tl.constexpr):
    """v of `gates`, given or drawn; word: seed, step and site."""
    if DRAWS:
        v = draw_noise((gates - begin).to(tl.int32), word[0], word[1], word[2], word[3], word[4])
    else:
        v = tl.load(noise_ptr + gates, mask=mask, other=0.0)
    return v.to(tl.float64)


@triton.jit
def _temperature(temperature_ptr, heat, HEATED: tl.constexpr):
    return (tl.load(temperature_ptr) if HEATED else tl.full((), heat, tl.float32)).to(tl.float64)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step_low", "step_high", "first_site"])
def _forward_kernel(
    logits_ptr,
    prior_ptr,
    noise_ptr,
    offsets_ptr,
    temperature_ptr,
    z_ptr,
    kl_ptr,
    open_ptr,
    n,
    ranks,
    heat,
    seed_low,
    seed_high,
    step_low,
    step_high,
    first_site,
    LOW: tl.constexpr,
    WIDTH: tl.constexpr,
    LOG_RATIO: tl.constexpr,
    SAMPLED: tl.constexpr,
    DRAWS: tl.constexpr,
    RAGGED: tl.constexpr,
    HEATED: tl.constexpr,
    WITH_Z: tl.constexpr,
    WITH_KL: tl.constexpr,
    WITH_OPEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (sites,): z, kl and open of a site's gates, those that are wanted."""
    begin, end = _bounds(offsets_ptr, n, ranks, RAGGED)
    for start in range(begin, end, BLOCK):
        gates = start + tl.arange(0, BLOCK)
        mask = gates < end
        a = tl.load(logits_ptr + gates, mask=mask, other=0.0).to(tl.float64)
        if WITH_Z or (WITH_KL and SAMPLED):
            word = seed_low, seed_high, step_low, step_high, first_site + tl.program_id(0)
            v = _noise(noise_ptr, gates, begin, mask, word, DRAWS)
        if WITH_Z or WITH_OPEN:
            temperature = _temperature(temperature_ptr, heat, HEATED)
        if WITH_Z:
            z = concrete(a, v, temperature, LOW, WIDTH)
            tl.store(z_ptr + gates, z.to(z_ptr.dtype.element_ty), mask=mask)
        if WITH_KL:
            p = tl.load(prior_ptr + gates, mask=mask, other=0.0).to(tl.float64)
            kl = surprise(v + (a - p)) - surprise(v) if SAMPLED else bernoulli_kl(a, p)
            tl.store(kl_ptr + gates, kl.to(kl_ptr.dtype.element_ty), mask=mask)
        if WITH_OPEN:
            x = a - temperature * LOG_RATIO
            opened = sigmoid(x, exp_of_negative(-tl.abs(x)))
            tl.store(open_ptr + gates, opened.to(open_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step_low", "step_high", "first_site"])
def _backward_kernel(
    dz_ptr,
    dkl_ptr,
    dopen_ptr,
    logits_ptr,
    prior_ptr,
    noise_ptr,
    offsets_ptr,
    temperature_ptr,
    out_ptr,
    n,
    ranks,
    heat,
    stride_dz,
    stride_dkl,
    stride_dopen,
    seed_low,
    seed_high,
    step_low,
    step_high,
    first_site,
    LOW: tl.constexpr,
    WIDTH: tl.constexpr,
    LOG_RATIO: tl.constexpr,
    SAMPLED: tl.constexpr,
    DRAWS: tl.constexpr,
    RAGGED: tl.constexpr,
    HEATED: tl.constexpr,
    WITH_Z: tl.constexpr,
    WITH_KL: tl.constexpr,
    WITH_OPEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (sites,): da of a site's gates, from the gradients that there are; noise that was drawn is drawn again."""
    begin, end = _bounds(offsets_ptr, n, ranks, RAGGED)
    for start in range(begin, end, BLOCK):
        gates = start + tl.arange(0, BLOCK)
        mask = gates < end
        a = tl.load(logits_ptr + gates, mask=mask, other=0.0).to(tl.float64)
        total = tl.full((BLOCK,), 0.0, tl.float64)
        if WITH_Z or (WITH_KL and SAMPLED):
            word = seed_low, seed_high, step_low, step_high, first_site + tl.program_id(0)
            v = _noise(noise_ptr, gates, begin, mask, word, DRAWS)
        if WITH_Z or WITH_OPEN:
            temperature = _temperature(temperature_ptr, heat, HEATED)
        if WITH_Z:
            dz = tl.load(dz_ptr + gates * stride_dz, mask=mask, other=0.0).to(tl.float64)
            total += dz * concrete_slope(a, v, temperature, LOW, WIDTH)
        if WITH_KL:
            p = tl.load(prior_ptr + gates, mask=mask, other=0.0).to(tl.float64)
            dkl = tl.load(dkl_ptr + gates * stride_dkl, mask=mask, other=0.0).to(tl.float64)
            change = sampled_kl_slope(v + (a - p)) if SAMPLED else slope(exp_of_negative(-tl.abs(a))) * (a - p)
            total += dkl * change
        if WITH_OPEN:
            x = a - temperature * LOG_RATIO
            dopen = tl.load(dopen_ptr + gates * stride_dopen, mask=mask, other=0.0).to(tl.float64)
            total += dopen * slope(exp_of_negative(-tl.abs(x)))
        tl.store(out_ptr + gates, total.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class GatesConfig:
    """Gates that a program takes at once, one a thread."""

    BLOCK: int
    num_warps: int
    num_stages: int = 1


CONFIGS = (GatesConfig(32, 1), GatesConfig(64, 2), GatesConfig(128, 4))


def pick_config(ranks: int) -> GatesConfig:
    """ranks: the most of a site; 0 where they are uneven"""
    if not ranks:
        return CONFIGS[1]
    return next((config for config in CONFIGS if ranks <= config.BLOCK), CONFIGS[-1])


def forward(logits, prior, noise, offsets, temperature, options: GateOptions) -> tuple[Tensor, Tensor, Tensor]:
    """z, kl and open, each like logits, or empty where it is not wanted."""
    operands = [None if t is None else t.contiguous() for t in (logits, prior, noise, offsets, temperature)]
    like = operands[0]
    outputs = [torch.empty_like(like) if wanted else like.new_empty(0) for wanted in options.wanted]
    if like.numel():
        grid, numbers, constants = _launch(logits, noise, offsets, temperature, options)
        _forward_kernel[grid](*_or(like, operands), *outputs, *numbers, *_words(options), **constants)
    return tuple(outputs)


def backward(gradients, logits, prior, noise, offsets, temperature, options: GateOptions) -> Tensor:
    """Gradient of the logits; wanted are those of z, kl and open that have one."""
    operands = [None if t is None else t.contiguous() for t in (logits, prior, noise, offsets, temperature)]
    like = operands[0]
    each, strides = zip(*((None, 0) if t is None else flat(t) for t in gradients), strict=True)
    out = torch.empty_like(like)
    if like.numel():
        grid, numbers, constants = _launch(logits, noise, offsets, temperature, options)
        numbers = (*numbers, *strides, *_words(options))
        _backward_kernel[grid](*_or(like, each), *_or(like, operands), out, *numbers, **constants)
    return out


def _launch(logits, noise, offsets, temperature, options: GateOptions) -> tuple[tuple[int], tuple[int, int, float], dict]:
    """Grid, (n, ranks, heat) and constants."""
    sites, ranks = options.grid(logits, noise, offsets, CONFIGS[-1].BLOCK)
    constants = {
        "LOW": options.low,
        "WIDTH": options.high - options.low,
        "LOG_RATIO": options.log_ratio,
        "SAMPLED": options.sampled,
        "DRAWS": options.noisy and noise is None,
        "RAGGED": offsets is not None,
        "HEATED": temperature is not None,
        **dict(zip(("WITH_Z", "WITH_KL", "WITH_OPEN"), options.wanted, strict=True)),
        **vars(pick_config(ranks)),
        "enable_fp_fusion": False,
    }
    return (sites,), (logits.numel(), ranks, options.heat), constants


def _words(options: GateOptions) -> tuple[int, ...]:
    """(seed low, seed high, step low, step high, first site) as signed words of 32 bits."""
    words = (options.seed, options.seed >> 32, options.step, options.step >> 32, options.first_site)
    return tuple((word + 2**31) % 2**32 - 2**31 for word in words)


def _or(like: Tensor, tensors) -> list[Tensor]:
    """`like` in the place of operands that the kernel does not read."""
    return [like if t is None else t for t in tensors]
