"""The optional compiled extension: plain C functions over raw pointers, loaded with ctypes.

Built from `csrc/` by `pip install`. Without it every function runs its torch reference.
"""

import ctypes
import sysconfig
from functools import cache
from pathlib import Path

CPU_LEVEL = 2  # instructions it may use where the machine has them: 0 none in particular, 1 AVX2, 2 AVX-512

_DRAW = [ctypes.c_int64] * 2 + [ctypes.c_uint64] * 2 + [ctypes.c_int64]  # sites, ranks, seed, step, first site
_KIND = [ctypes.c_double] * 4 + [ctypes.c_int32, ctypes.c_int64]  # temperature, stretch, flags, instructions

_SIGNATURES = {  # name -> result, arguments
    "cobra_gate_words": (None, [ctypes.c_void_p, *_DRAW]),
    "cobra_gate_noise": (None, [ctypes.c_void_p, *_DRAW, ctypes.c_int64]),
    "cobra_noise_of_words": (None, [ctypes.c_void_p] * 2 + [ctypes.c_int64]),
    "cobra_gates_forward": (None, [ctypes.c_void_p] * 7 + _DRAW + _KIND),
    "cobra_concrete": (None, [ctypes.c_void_p] * 4 + [ctypes.c_int64] + _KIND[1:]),
    "cobra_gates_backward": (None, [ctypes.c_void_p] * 8 + _DRAW + _KIND),
    "cobra_conductance": (ctypes.c_int32, [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 11),
    "cobra_merge": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p] + [ctypes.c_int64] * 2),
    "cobra_shrink": (ctypes.c_int32, [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 8),
    "cobra_reduce": (ctypes.c_int32, [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 7),
}


@cache
def load() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built for this interpreter."""
    path = Path(__file__).with_name("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    try:
        library = ctypes.CDLL(str(path))
        for name, (restype, argtypes) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = restype, argtypes
    except (OSError, AttributeError):  # not built, or built elsewhere
        return None
    return library
