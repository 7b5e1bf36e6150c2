"""What the gates of one call have in common, as the registered operators take it."""

import ctypes
import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GateOptions:
    """
    seed, step: as signed integers of 64 bits; first_site: the site of the first row
    low, high: the stretch of hard gates, low < 0 and high > 1; 0 and 1 for gates that are not hard
    heat: the temperature where it is no tensor; counts as fp32
    sampled: the KL is that of concrete densities at the draw, else of Bernoullis
    wanted: which of z, kl and open
    """

    seed: int = 0
    step: int = 0
    first_site: int = 0
    heat: float = 1.0
    low: float = 0.0
    high: float = 1.0
    sampled: bool = False
    wanted: tuple[bool, bool, bool] = (True, False, False)

    @property
    def hard(self) -> bool:
        return self.low < 0

    @property
    def log_ratio(self) -> float:
        """A hard gate is open where its score exceeds this; 0 for others."""
        return math.log(-self.low / self.high) if self.hard else 0.0

    @property
    def noisy(self) -> bool:
        """Whether what is wanted depends on noise."""
        return self.wanted[0] or (self.wanted[1] and self.sampled)

    @property
    def operation(self) -> str:
        """The public function that asks with these."""
        if self.wanted == (False, True, False):
            return "gate_kl_sampled" if self.sampled else "gate_kl"
        return "sample_gates" if self.wanted == (True, False, False) else "gates_and_kl"

    def temperature(self, tensor: Tensor | None) -> float:
        """What the arithmetic takes."""
        return ctypes.c_float(self.heat).value if tensor is None else tensor.item()

    def layout(self, logits: Tensor, offsets: Tensor | None) -> tuple[int, int]:
        """Sites, and gates of each where there are no offsets."""
        if offsets is not None:
            return len(offsets) - 1, 0
        return logits.shape if logits.ndim == 2 else (1, logits.numel())

    def grid(self, logits: Tensor, noise: Tensor | None, offsets: Tensor | None, block: int) -> tuple[int, int]:
        """The same for launches: where nothing is drawn, sites are blocks of gates."""
        if offsets is None and not (self.noisy and noise is None):
            return -(-logits.numel() // block), block
        return self.layout(logits, offsets)


def flat(gradient: Tensor) -> tuple[Tensor, int]:
    """A gradient and its stride as one row; that of a sum, one number for all gates, is read as it is."""
    return (gradient.contiguous(), 1) if any(gradient.stride()) else (gradient, 0)


def signed(word: int) -> int:
    """An integer in [0, 2^64) as the signed one of the same bits. Raises ValueError for others."""
    if not 0 <= word < 2**64:
        raise ValueError(f"seed and step must be integers from 0 to 2**64 - 1, got {word}")
    return word - 2**64 if word >= 2**63 else word


def stretch_of(stretch: tuple[float, float] | None) -> tuple[float, float]:
    """(low, high) of hard gates, or (0, 1). Raises ValueError for a stretch that never gives 0 and 1."""
    if stretch is None:
        return 0.0, 1.0
    low, high = stretch
    if not (low < 0 and high > 1 and math.isfinite(high - low)):
        raise ValueError(f"stretch {stretch}: expected (low, high) with low < 0 and high > 1, as a rule (-0.1, 1.1)")
    return float(low), float(high)


def check_cover(offsets: Tensor, count: int) -> None:
    """Raises ValueError unless offsets lead from 0 to count, the number of logits."""
    if not (bool(offsets[0] == 0) and bool(offsets[-1] == count) and bool((offsets.diff() >= 0).all())):
        raise ValueError(f"offsets must begin at 0, never fall and end at {count}, the number of logits")


def check_temperature(temperature: float) -> float:
    """Raises ValueError unless greater than 0, in fp32 too."""
    if not temperature > 2.0**-126:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    return float(temperature)
