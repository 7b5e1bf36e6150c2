"""The optional CUDA library: launchers over raw pointers and a stream, loaded with ctypes.

Built from `csrc/*.cu` by `pip install` where there is an nvcc. No kernel of it is used unless backend="cuda" asks for it.
"""

import ctypes
import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_GATES = [_INT] * 3 + [ctypes.c_uint64] * 2 + [_INT] + [ctypes.c_double] * 4 + [ctypes.c_int, _POINTER]
SIGNATURES = {  # name -> result, arguments; launchers return a cudaError_t
    "cobra_cuda_merge_tiles": (_INT, [_INT] * 2),
    "cobra_cuda_merge": (ctypes.c_int, [_POINTER] * 2 + [_INT] * 2 + [_POINTER] * 3),
    "cobra_cuda_shrink": (ctypes.c_int, [_INT] + [_POINTER, _INT] * 2 + [_INT] * 5 + [_POINTER] * 2),
    "cobra_cuda_reduce": (ctypes.c_int, [_INT] + [_POINTER, _INT] * 3 + [_INT] * 5 + [_POINTER] * 3),
    "cobra_cuda_gates_forward": (ctypes.c_int, [_POINTER] * 8 + _GATES),
    "cobra_cuda_gates_backward": (ctypes.c_int, [_POINTER] * 5 + [_POINTER, _INT] * 3 + [_POINTER] + _GATES),
    "cobra_cuda_sum_planes": (ctypes.c_int, [_INT, _POINTER] + [_INT] * 2 + [_POINTER] * 2),
}


@cache
def report() -> dict:
    """What the build left behind: `built`, `reason`, `nvcc`, `kernels` with registers; empty where none was tried."""
    try:
        return json.loads((_FOLDER / "_cuda.json").read_text())
    except (OSError, ValueError):
        return {}


@cache
def load() -> ctypes.CDLL | None:
    """The loaded library, or None; `why_not` says why. Needs no GPU."""
    try:
        return declare(ctypes.CDLL(str(_FOLDER / "_cuda.so")))
    except (OSError, AttributeError):  # not built, or of other sources
        return None


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions; raises AttributeError where one is missing."""
    for name, (restype, argtypes) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes
    return library


def why_not() -> str:
    """The reason why there is no library; empty where there is one."""
    if load() is not None:
        return ""
    if report().get("built"):
        return "the library does not load: build it again with `pip install`"
    return report().get("reason", "they were not built: `pip install` builds them where there is an nvcc")


def require(*tensors: Tensor) -> ctypes.CDLL:
    """The library; raises where the kernels cannot run on the tensors: an explicit request never falls back in silence."""
    for t in tensors:
        if t.device.type != "cuda":
            raise RuntimeError(
                f"backend='cuda' needs CUDA tensors, and one is on {t.device}; the default backend runs everywhere"
            )
    library = load()
    if library is None:
        raise RuntimeError(f"backend='cuda' needs the CUDA kernels: {why_not()}; the default backend needs nothing")
    capability = torch.cuda.get_device_capability(tensors[0].device)
    if capability < (8, 0):
        raise RuntimeError(f"backend='cuda' needs compute capability 8.0, and the device has {capability[0]}.{capability[1]}")
    return library


def stream_of(x: Tensor) -> int | None:
    """The address of torch's current stream on the device of x; None where x is on the CPU, as in tests."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


def check(error: int, function: str) -> None:
    """Raises what a launcher returned."""
    if error:
        raise RuntimeError(f"{function} failed with CUDA error {error}: the launch was refused, and nothing was computed")
