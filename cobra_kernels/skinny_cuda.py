"""Products of many tokens with a few ranks, on the tensor cores of a CUDA device: csrc/skinny.cu.

    shrink   h = x matrixᵀ                    x (T, D)   matrix (r, D)   h (T, r)
    reduce   S = xᵀ h                         x (T, D)   h (T, r)        S (D, r) fp32
             and g = x matrix                 matrix (D, r)              g (T, r), of the same reading of x

What the low-rank branch needs beside the frozen layer's products: h = x Aᵀ; dB = dyᵀ h and dh = dy B in one pass over dy;
dAᵀ = xᵀ dh. Operands are bf16 or fp16 of any sizes and any addresses, r at most 64; sums are fp32, in a fixed order.
No gradient passes. The kernels have been run thread by thread on a CPU, and never on a GPU: nothing calls them unasked.
"""

import ctypes

import torch
from torch import Tensor

from cobra_kernels import cuda_extension

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/skinny.cu
MAX_RANK = 64
TILE = 64  # tokens or features of a stage: planes are multiples of it
REDUCE_FEATURES = 256  # of a block of reduce
BLOCKS = 264  # two for each multiprocessor of an H100


def shrink_ref(x: Tensor, matrix: Tensor) -> Tensor:
    """The equation as it is written; arguments as in `shrink`."""
    return x @ matrix.t()


def reduce_ref(x: Tensor, h: Tensor, matrix: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The equations as they are written; S in the dtype of x. Arguments as in `reduce`."""
    return x.t() @ h, None if matrix is None else x @ matrix


def shrink(x: Tensor, matrix: Tensor) -> Tensor:
    """x (T, D), matrix (r, D), bf16 or fp16 -> (T, r) in their dtype"""
    _check({"x": x, "matrix": matrix}, {"matrix": (matrix.shape[0], x.shape[1])}, rank=matrix.shape[0])
    library = cuda_extension.require(x, matrix)
    (tokens, features), rank = x.shape, matrix.shape[0]
    if not x.numel() or not rank:
        return x.new_zeros(tokens, rank)
    x, matrix = _dense_rows(x), _dense_rows(matrix)
    count, size = pick_planes(-(-tokens // TILE), features)
    planes = torch.empty(count, tokens, rank, dtype=torch.float32, device=x.device)
    operands = (*_rows(x), *_rows(matrix), tokens, features, rank, count, size, planes.data_ptr())
    _launch(library, "cobra_cuda_shrink", x, DTYPE_CODES[x.dtype], *operands)
    return _sum_planes(library, planes, x.dtype)


def reduce(x: Tensor, h: Tensor, matrix: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """S = xᵀ h, and with a matrix g = x matrix.

    x: (T, D), h: (T, r), matrix: (D, r), all bf16 or all fp16

    Returns S (D, r) fp32, and g (T, r) in the dtype of x or None
    """
    (tokens, features), rank = x.shape, h.shape[1]
    operands = {"x": x, "h": h} | ({} if matrix is None else {"matrix": matrix})
    _check(operands, {"h": (tokens, rank), "matrix": (features, rank)}, rank=rank)
    library = cuda_extension.require(*operands.values())
    if not x.numel() or not rank:
        g = None if matrix is None else x.new_zeros(tokens, rank)
        return torch.zeros(features, rank, dtype=torch.float32, device=x.device), g
    x, h = _dense_rows(x), _dense_rows(h)
    blocks = -(-features // REDUCE_FEATURES)
    count, size = pick_planes(blocks, tokens)
    planes = torch.empty(count, features, rank, dtype=torch.float32, device=x.device)
    row_planes, matrix_rows = None, (None, 0)
    if matrix is not None:
        matrix = _dense_rows(matrix)
        matrix_rows = _rows(matrix)
        row_planes = torch.empty(blocks, tokens, rank, dtype=torch.float32, device=x.device)
    pointers = (planes.data_ptr(), None if row_planes is None else row_planes.data_ptr())
    sizes = (tokens, features, rank, count, size)
    _launch(library, "cobra_cuda_reduce", x, DTYPE_CODES[x.dtype], *_rows(x), *_rows(h), *matrix_rows, *sizes, *pointers)
    g = None if row_planes is None else _sum_planes(library, row_planes, x.dtype)
    return _sum_planes(library, planes, torch.float32), g


def pick_planes(blocks: int, length: int) -> tuple[int, int]:
    """Parts that a sum is cut into, and the terms in each: as many as fill a device, each of 512 terms or more."""
    wanted = min(-(-BLOCKS // blocks), max(length // 512, 1))
    size = -(-length // (wanted * TILE)) * TILE
    return -(-length // size), size


def _check(operands: dict[str, Tensor], expected: dict[str, tuple[int, int]], *, rank: int) -> None:
    x = operands["x"]
    if rank > MAX_RANK:
        raise ValueError(f"the CUDA products take at most {MAX_RANK} ranks, not {rank}; use matrix products")
    for name, t in operands.items():
        if name in expected and tuple(t.shape) != expected[name]:
            raise ValueError(f"{name} is {tuple(t.shape)}, expected {expected[name]} beside x {tuple(x.shape)}")
        if t.dtype != x.dtype or t.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {t.dtype} and x {x.dtype}; the CUDA products take bfloat16 or float16, all the same")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} and x on {x.device}; move them to one device")


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _rows(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.stride(0)


def _sum_planes(library: ctypes.CDLL, planes: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(planes.shape[1:], dtype=dtype, device=planes.device)
    arguments = (planes.data_ptr(), planes.shape[0], out.numel(), out.data_ptr())
    _launch(library, "cobra_cuda_sum_planes", planes, DTYPE_CODES[dtype], *arguments)
    return out


def _launch(library: ctypes.CDLL, function: str, x: Tensor, *arguments: int | None) -> None:
    with torch.cuda.device_of(x):
        cuda_extension.check(getattr(library, function)(*arguments, cuda_extension.stream_of(x)), function)
