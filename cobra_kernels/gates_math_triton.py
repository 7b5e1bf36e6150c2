"""Triton functions on gates: Philox words, noise, concrete sample, KL and their derivatives, as `csrc/gates.h` has them.

The equations are in `gates_and_kl`. Every step is an fp64 operation, in the order of the C++. Kernels that call these must be
launched with `enable_fp_fusion=False`: then nothing is contracted, and the bits are those of the CPU.
"""

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """The four words of `philox4x32_ref`; all uint32."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def twice_atanh(x):
    """2 atanh(x) for |x| <= 1/3; fp64."""
    square = x * x
    total = tl.full(x.shape, 1.0 / 33, tl.float64)
    for k in tl.static_range(31, 0, -2):
        total = total * square + 1.0 / k
    return (x + x) * total


@triton.jit
def exp_of_negative(x):
    """exp(x) for x <= 0, and that of -700 below; fp64."""
    x = tl.where(x < -700.0, -700.0, x)
    shifted = x * 1.4426950408889634 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    total = tl.full(x.shape, 1.0, tl.float64)
    for k in tl.static_range(13, 0, -1):
        total = total * (r * (1.0 / k)) + 1.0
    return total * ((shifted.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def noise_of_words(words):
    """`noise_of_words`; words uint32, noise fp32."""
    p = (2 * (words >> 8) + 1).to(tl.float64)
    q = 33554432.0 - p
    biased = ((p / q).to(tl.int64, bitcast=True) + 2638147582215219) >> 52
    scaled = q * (biased << 52).to(tl.float64, bitcast=True)
    n = biased.to(tl.float64) - 1023.0
    rest = twice_atanh((p - scaled) / (p + scaled))
    return (n * 0.6931471803691238 + (n * 1.9082149292705877e-10 + rest)).to(tl.float32)


@triton.jit
def draw_noise(ranks, seed_low, seed_high, step_low, step_high, site):
    """Noise of gates `ranks` of a site, fp32, as `gate_noise` gives it."""
    zero = tl.full(ranks.shape, 0, tl.uint32)
    block = (ranks // 4).to(tl.uint32)
    step_0, step_1 = zero + step_low.to(tl.uint32), zero + step_high.to(tl.uint32)
    key_0, key_1 = zero + seed_low.to(tl.uint32), zero + seed_high.to(tl.uint32)
    w0, w1, w2, w3 = philox(block, zero + site.to(tl.uint32), step_0, step_1, key_0, key_1)
    words = tl.where(ranks % 4 < 2, tl.where(ranks % 4 == 0, w0, w1), tl.where(ranks % 4 == 2, w2, w3))
    return noise_of_words(words)


@triton.jit
def sigmoid(x, e):
    """e = exp(-|x|)"""
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def slope(e):
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def log1p(e):
    return twice_atanh(e / (2.0 + e))


@triton.jit
def surprise(v):
    """|v| + 2 log(1 + exp(-|v|))"""
    tail = log1p(exp_of_negative(-tl.abs(v)))
    return tl.abs(v) + (tail + tail)


@triton.jit
def concrete(logits, noise, temperature, LOW: tl.constexpr, WIDTH: tl.constexpr):
    """z fp64 of logits, noise and temperature in fp64; with LOW = 0 and WIDTH = 1 the sample itself, bit for bit"""
    score = (logits + noise) / temperature
    stretched = LOW + WIDTH * sigmoid(score, exp_of_negative(-tl.abs(score)))
    return tl.where(stretched < 0.0, 0.0, tl.where(stretched > 1.0, 1.0, stretched))


@triton.jit
def concrete_slope(logits, noise, temperature, LOW: tl.constexpr, WIDTH: tl.constexpr):
    score = (logits + noise) / temperature
    e = exp_of_negative(-tl.abs(score))
    stretched = LOW + WIDTH * sigmoid(score, e)
    return tl.where((stretched < 0.0) | (stretched > 1.0), 0.0, slope(e) / temperature * WIDTH)


@triton.jit
def bernoulli_kl(logits, prior):
    e, e_prior = exp_of_negative(-tl.abs(logits)), exp_of_negative(-tl.abs(prior))
    moved = sigmoid(logits, e) * (logits - prior)
    softplus = tl.where(logits < 0.0, 0.0, logits) + log1p(e)
    return moved - softplus + (tl.where(prior < 0.0, 0.0, prior) + log1p(e_prior))


@triton.jit
def sampled_kl_slope(v):
    e = exp_of_negative(-tl.abs(v))
    return (tl.where(v < 0.0, e, 1.0) + tl.where(v < 0.0, -1.0, -e)) / (1.0 + e)
