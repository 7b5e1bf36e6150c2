"""Gates of many sites on the CPU, through the compiled extension: one call forward and one backward (`csrc/gates.cpp`)."""

import ctypes

import torch
from torch import Tensor

from cobra_kernels.gates_options import GateOptions

FP64, HARD, SAMPLED = 1, 2, 4  # flags of csrc/gates.h
DTYPES = (torch.float32, torch.float64)
_WORD = 2**64 - 1


def forward(
    library: ctypes.CDLL,
    logits: Tensor,
    prior: Tensor | None,
    noise: Tensor | None,
    offsets: Tensor | None,
    temperature: Tensor | None,
    options: GateOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """z, kl and open, each like logits, or empty where it is not wanted."""
    operands = _held(logits, prior, noise, offsets)
    outputs = [torch.empty_like(operands[0]) if wanted else logits.new_empty(0) for wanted in options.wanted]
    written = [t.data_ptr() if wanted else None for t, wanted in zip(outputs, options.wanted, strict=True)]
    library.cobra_gates_forward(*_pointers(operands), *written, *_numbers(logits, offsets, temperature, options))
    return tuple(outputs)


def backward(
    library: ctypes.CDLL,
    gradients: list[Tensor | None],
    logits: Tensor,
    prior: Tensor | None,
    noise: Tensor | None,
    offsets: Tensor | None,
    temperature: Tensor | None,
    options: GateOptions,
) -> Tensor:
    """Gradient of the logits, from those of z, kl and open that there are."""
    operands = _held(logits, prior, noise, offsets)
    held = [None if t is None else t.to(logits.dtype).contiguous() for t in gradients]
    out = torch.empty_like(operands[0])
    numbers = _numbers(logits, offsets, temperature, options)
    library.cobra_gates_backward(*_pointers(operands), *_pointers(held), out.data_ptr(), *numbers)
    return out


def concrete(
    library: ctypes.CDLL, dz: Tensor | None, logits: Tensor, noise: Tensor, temperature: Tensor, low: float, high: float
) -> Tensor:
    """z of given noise, or with its gradient that of the logits; a layer calls it, so it does little else."""
    held = [t if t.is_contiguous() and t.dtype == logits.dtype else t.to(logits.dtype).contiguous() for t in (logits, noise)]
    gradient = None if dz is None else dz.to(logits.dtype).contiguous()
    out = torch.empty_like(held[0])
    kind = FP64 * (logits.dtype == torch.float64) + HARD * (low < 0)
    pointers = (held[0].data_ptr(), held[1].data_ptr(), _pointer(gradient), out.data_ptr())
    library.cobra_concrete(*pointers, logits.numel(), temperature.item(), low, high - low, kind)
    return out


def flags_of(logits: Tensor, options: GateOptions) -> int:
    return FP64 * (logits.dtype == torch.float64) + HARD * options.hard + SAMPLED * options.sampled


def _held(logits, prior, noise, offsets) -> list[Tensor | None]:
    """Contiguous operands of one dtype, to be kept until the call is over."""
    floats = [None if t is None else t.to(logits.dtype).contiguous() for t in (logits, prior, noise)]
    return [*floats, offsets]


def _pointers(tensors: list[Tensor | None]) -> list[int | None]:
    return [_pointer(t) for t in tensors]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _numbers(logits, offsets, temperature, options: GateOptions) -> tuple:
    sites, ranks = options.layout(logits, offsets)
    heat = 1.0 if temperature is None else temperature.item()
    draw = (sites, ranks, options.seed & _WORD, options.step & _WORD, options.first_site)
    return *draw, heat, options.low, options.high - options.low, options.log_ratio, flags_of(logits, options)
