"""The launches of csrc/gates.cu: all gates of a model in one kernel forward and one backward, on torch's current stream."""

import torch
from torch import Tensor

from cobra_kernels import cuda_extension
from cobra_kernels.gates_cpu import DTYPES, flags_of
from cobra_kernels.gates_options import GateOptions, flat

BLOCK = 128  # gates of a block where nothing is drawn, and sites do not matter


def forward(logits, prior, noise, offsets, temperature, options: GateOptions) -> tuple[Tensor, Tensor, Tensor]:
    """z, kl and open, each like logits, or empty where it is not wanted."""
    library, held = _prepared(logits, prior, noise, offsets, temperature)
    outputs = [torch.empty_like(held[0]) if wanted else logits.new_empty(0) for wanted in options.wanted]
    written = [t.data_ptr() if wanted else None for t, wanted in zip(outputs, options.wanted, strict=True)]
    _run(library.cobra_cuda_gates_forward, (*map(_pointer, held), *written), logits, noise, offsets, options)
    return tuple(outputs)


def backward(gradients, logits, prior, noise, offsets, temperature, options: GateOptions) -> Tensor:
    """Gradient of the logits; wanted are those of z, kl and open that have one."""
    library, held = _prepared(logits, prior, noise, offsets, temperature)
    rows = [(None, 0) if t is None else flat(t.to(logits.dtype)) for t in gradients]
    out = torch.empty_like(held[0])
    each = [value for t, stride in rows for value in (_pointer(t), stride)]
    _run(library.cobra_cuda_gates_backward, (*map(_pointer, held), *each, out.data_ptr()), logits, noise, offsets, options)
    return out


def _prepared(logits, prior, noise, offsets, temperature):
    """The library, and contiguous operands, to be kept until the launch."""
    library = cuda_extension.require(logits)
    if logits.dtype not in DTYPES:
        raise ValueError(f"backend='cuda' takes gates in float32 and float64, not {logits.dtype}; cast them")
    floats = [None if t is None else t.to(logits.dtype).contiguous() for t in (logits, prior, noise)]
    return library, [
        *floats,
        None if offsets is None else offsets.contiguous(),
        None if temperature is None else temperature.float(),
    ]


def _run(function, pointers, logits, noise, offsets, options: GateOptions) -> None:
    if not logits.numel():
        return
    sites, ranks = options.grid(logits, noise, offsets, BLOCK)
    words = (options.seed & 2**64 - 1, options.step & 2**64 - 1, options.first_site)
    kind = (options.temperature(None), options.low, options.high - options.low, options.log_ratio, flags_of(logits, options))
    with torch.cuda.device_of(logits):
        stream = cuda_extension.stream_of(logits)
        error = function(*pointers, logits.numel(), sites, ranks, *words, *kind, stream)
    cuda_extension.check(error, function.__name__)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
