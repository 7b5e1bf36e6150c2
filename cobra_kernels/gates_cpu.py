"""Gates of many sites on the CPU, through the compiled extension: one call forward and one backward (`csrc/gates.cpp`)."""

import ctypes

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cobra_kernels import extension
from cobra_kernels.gates_options import GateOptions

FP64, SAMPLED = 1, 2  # flags of csrc/gates.h
DTYPES = (torch.float32, torch.float64)
PLAIN = (Tensor, nn.Parameter)
_WORD = 2**64 - 1


def takes(*tensors: Tensor | None) -> bool:
    """Whether the numbers are where the pointers say, and nobody asks torch what it does: then the dispatcher can be left out,
    which costs as much as the gates."""
    return not torch.compiler.is_compiling() and (
        all(t is None or (type(t) in PLAIN and t.is_cpu and t.dtype in DTYPES and _has_numbers(t)) for t in tensors)
        and _get_current_dispatch_mode() is None
        and extension.load() is not None
    )


def _has_numbers(t: Tensor) -> bool:
    return not (t.is_neg() or t._is_zerotensor())


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
    held = [None if t is None else _ready(t, logits.dtype) for t in gradients]
    out = torch.empty_like(operands[0])
    numbers = _numbers(logits, offsets, temperature, options)
    library.cobra_gates_backward(*_pointers(operands), *_pointers(held), out.data_ptr(), *numbers)
    return out


def concrete(
    library: ctypes.CDLL, dz: Tensor | None, logits: Tensor, noise: Tensor, temperature: Tensor, low: float, high: float
) -> Tensor:
    """z of given noise, or with its gradient that of the logits; a layer calls it, so it does little else."""
    held = [_ready(t, logits.dtype) for t in (logits, noise)]
    gradient = None if dz is None else _ready(dz, logits.dtype)
    out = torch.empty_like(held[0])
    pointers = (held[0].data_ptr(), held[1].data_ptr(), _pointer(gradient), out.data_ptr())
    kind = (temperature.item(), low, high - low, FP64 * (logits.dtype == torch.float64), extension.CPU_LEVEL)
    library.cobra_concrete(*pointers, logits.numel(), *kind)
    return out


def flags_of(logits: Tensor, options: GateOptions) -> int:
    return FP64 * (logits.dtype == torch.float64) + SAMPLED * options.sampled


def _held(logits, prior, noise, offsets) -> list[Tensor | None]:
    """Contiguous operands of one dtype, to be kept until the call is over."""
    return [*(None if t is None else _ready(t, logits.dtype) for t in (logits, prior, noise)), _dense(offsets)]


def _dense(offsets: Tensor | None) -> Tensor | None:
    return None if offsets is None else offsets.contiguous()


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, of the dtype; asks first, since a call of torch costs more."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def _pointers(tensors: list[Tensor | None]) -> list[int | None]:
    return [_pointer(t) for t in tensors]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _numbers(logits, offsets, temperature, options: GateOptions) -> tuple:
    sites, ranks = options.layout(logits, offsets)
    draw = (sites, ranks, options.seed & _WORD, options.step & _WORD, options.first_site)
    kind = (options.temperature(temperature), options.low, options.high - options.low, options.log_ratio)
    return *draw, *kind, flags_of(logits, options), extension.CPU_LEVEL
