"""The optional compiled extension: plain C functions over raw pointers, loaded with ctypes.

Built from `csrc/` by `pip install`. Without it every function runs its torch reference.
"""

import ctypes
import sysconfig
from functools import cache
from pathlib import Path

_SIGNATURES = {
    "cobra_gate_words": [ctypes.c_void_p] + [ctypes.c_int64] * 2 + [ctypes.c_uint64] * 2 + [ctypes.c_int64],
}


@cache
def load() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built for this interpreter."""
    path = Path(__file__).with_name("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    try:
        library = ctypes.CDLL(str(path))
        for name, argtypes in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = argtypes, None
    except (OSError, AttributeError):  # not built, or built elsewhere
        return None
    return library
