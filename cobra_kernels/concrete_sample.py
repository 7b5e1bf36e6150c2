"""Gates that are drawn where they are used: those of `sample_gates` at one site, named by the words that they are drawn from.

All of it is tensors on the device of the gates, so that a step's gates follow without a wait for the device, a new compilation
or a new capture of a graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cobra_kernels.philox import MASK, noise_of_words, philox4x32_ref
from cobra_kernels.sample_gates import concrete_gates


def draw_words(seed: int, step: int, site: int) -> Tensor:
    """(5,) int32 on the CPU: seed low, seed high, step low, step high, site, as signed words of the same bits.

    seed, step: integers in [0, 2^64); site: in [0, 2^32)
    """
    words = (seed, seed >> 32, step, step >> 32, site)
    return torch.tensor([(word + 2**31) % 2**32 - 2**31 for word in words], dtype=torch.int32, device="cpu")


@dataclass(frozen=True, eq=False)
class ConcreteSample:
    """In the place of z in `gated_lora_linear`.

    logits: (r,) fp32
    draw: (5,) int32, from `draw_words`
    temperature: () fp32, greater than 0
    """

    logits: Tensor
    draw: Tensor
    temperature: Tensor

    @classmethod
    def of(cls, logits: Tensor, *, seed: int, step: int, site: int, temperature: float) -> "ConcreteSample":
        """The sample of one site; arguments as in `sample_gates`."""
        device = logits.device
        return cls(
            logits, draw_words(seed, step, site).to(device), torch.tensor(temperature, dtype=torch.float32, device=device)
        )

    def gates(self) -> Tensor:
        """z (r,), differentiable in the logits."""
        seed_low, seed_high, step_low, step_high, site = (self.draw.long() & MASK).unbind()
        r = len(self.logits)
        block = torch.arange(-(-r // 4), device=self.draw.device)
        rest = torch.stack((site, step_low, step_high)).expand(len(block), 3)
        words = philox4x32_ref(torch.cat((block[:, None], rest), 1), (seed_low, seed_high)).flatten()[:r]
        return concrete_gates(self.logits, noise_of_words(words), self.temperature)
