"""Philox4x32-10, the one random stream of COBRA, and the logistic noise of gates that is made of it.

A counter-based generator (Salmon et al., SC 2011): the words are a pure function of (counter, key), so any element can be
computed alone, in any order and on any device, and nothing has to be stored to draw it again.

    counter (..., 4), key (2,)  ->  words (..., 4)          all 32-bit words, held in int64
    u = (n + 1/2) / 2^24, noise = log u - log(1 - u)        n: the top 24 bits of the gate's word, so 0 < u < 1

`csrc/philox.h` is the same definition for C++ and CUDA; `tests/test_philox.py` holds both to the Random123 vectors. The noise
is made in fp64 and rounded once: for each of the 2^24 u the fp32 number nearest to the true value, here as in `csrc/gates.h`.
"""

import torch
from torch import Tensor

from cobra_kernels import extension

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32_ref(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox4x32 in plain torch.

    counter: (..., 4) int64, each element in [0, 2^32)
    key: two integers in [0, 2^32)

    out: (..., 4) int64, each element in [0, 2^32)
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, which leaves all 64 bits right; the mask undoes the sign of the shift
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & MASK ^ c1 ^ k0, p1 & MASK, (p0 >> 32) & MASK ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def gate_words_ref(sites: int, ranks: int, seed: int, step: int, first_site: int = 0) -> Tensor:
    """Random words of all gates of one step: gate k of a site reads word k mod 4 of block k // 4.

    counter = (k // 4, site, step low, step high), key = (seed low, seed high)

    out: (sites, ranks) int64 in [0, 2^32)
    """
    blocks = (ranks + 3) // 4
    counter = torch.empty(sites, blocks, 4, dtype=torch.int64, device="cpu")
    counter[..., 0] = torch.arange(blocks, device="cpu")
    counter[..., 1] = torch.arange(first_site, first_site + sites, device="cpu")[:, None]
    counter[..., 2], counter[..., 3] = step & MASK, step >> 32 & MASK
    return philox4x32_ref(counter, (seed & MASK, seed >> 32 & MASK)).reshape(sites, 4 * blocks)[:, :ranks]


def gate_words(sites: int, ranks: int, seed: int, step: int, first_site: int = 0) -> Tensor:
    """`gate_words_ref` through the compiled extension where it was built; the integers are the same.

    out: (sites, ranks) int64 in [0, 2^32), on the CPU
    """
    library = extension.load()
    if library is None:
        return gate_words_ref(sites, ranks, seed, step, first_site)
    words = torch.empty(sites, ranks, dtype=torch.int64, device="cpu")
    library.cobra_gate_words(words.data_ptr(), sites, ranks, seed, step, first_site)
    return words


def noise_of_words(words: Tensor) -> Tensor:
    """words (...) int64 -> logistic noise (...) fp32"""
    u = ((words >> 8).double() + 0.5) * 2.0**-24
    return (u.log() - (1 - u).log()).float()


def gate_noise(sites: int, ranks: int, *, seed: int, step: int, first_site: int = 0) -> Tensor:
    """Logistic noise of all gates at one step.

    out: (sites, ranks) fp32 on the CPU
    """
    library = extension.load()
    if library is None:
        return noise_of_words(gate_words_ref(sites, ranks, seed, step, first_site))
    noise = torch.empty(sites, ranks, dtype=torch.float32, device="cpu")
    library.cobra_gate_noise(noise.data_ptr(), sites, ranks, seed, step, first_site, extension.CPU_LEVEL)
    return noise
