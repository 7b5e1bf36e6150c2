"""The optional compiled extension: plain C functions over raw pointers, loaded with ctypes.

Built from `csrc/` by `pip install`. Without it every function runs its torch reference.
"""

import ctypes
from functools import cache
from pathlib import Path

_SIGNATURES = {
    "cobra_gate_words": [ctypes.c_void_p] + [ctypes.c_int64] * 2 + [ctypes.c_uint64] * 2 + [ctypes.c_int64],
}


@cache
def load() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built."""
    for path in sorted(Path(__file__).parent.glob("_C.*")):
        if path.suffix not in {".so", ".pyd", ".dylib"}:
            continue
        library = ctypes.CDLL(str(path))
        for name, argtypes in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = argtypes, None
        return library
    return None
