"""Which path an operation takes: what a backend that is asked for needs, and what nobody has to ask for.

"auto"     a path that has run on the hardware it is for
"torch"    torch's own products, and on a CPU the compiled ones
"triton"   Triton kernels; where they cannot run that is an error, and nothing else is tried
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROVEN: tuple[tuple[int, int], ...] = ()  # compute capabilities where `make gpu` has passed, its results in bench/results


def check_backend(backend: str | None) -> None:
    """Raises ValueError for a name that is none; None is "auto"."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r}; there are {', '.join(map(repr, BACKENDS))}")


def triton_obstacle() -> str | None:
    """Why no Triton kernel can run on this machine, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    unfit = [c for c in map(torch.cuda.get_device_capability, range(torch.cuda.device_count())) if not has_tiles(c)]
    return f"no tiles for compute capability {'.'.join(map(str, unfit[0]))}" if unfit else None


def has_tiles(capability: tuple[int, int]) -> bool:
    return capability == (8, 0) or capability >= (9, 0)


def uses_triton(backend: str | None, x: Tensor) -> bool:
    """Whether x takes the Triton kernels: they are asked for, or "auto" means them on its device."""
    if backend in (None, "auto"):
        return bool(PROVEN) and x.is_cuda and x.dtype in TRITON_DTYPES and torch.cuda.get_device_capability(x.device) in PROVEN
    return backend == "triton"


def require_triton(x: Tensor) -> None:
    """Raises where Triton kernels cannot run on x: an explicit request never falls back in silence."""
    if find_spec("triton") is None:
        raise RuntimeError(
            "backend='triton' needs the package triton, which is not installed; the default backend needs nothing"
        )
    if x.device.type != "cuda":
        raise RuntimeError(f"backend='triton' needs a CUDA device, and x is on {x.device}; the default backend runs everywhere")
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"backend='triton' takes float32, bfloat16 and float16, not {x.dtype}; cast, or use the default backend"
        )


def triton_operations() -> list[str]:
    """Operations that have Triton kernels: <op>_triton.py beside <op>.py, and `gates_and_kl`, which is gates_triton.py."""
    here = Path(__file__).parent
    names = (path.stem.removesuffix("_triton") for path in here.glob("*_triton.py"))
    return sorted(["gates_and_kl", *(name for name in names if (here / f"{name}.py").is_file())])


def describe_triton() -> str:
    """What the Triton kernels do on this machine, and why not."""
    off = "off unless asked for (backend='triton'), never run on a GPU of this kind"
    obstacle = triton_obstacle()
    if obstacle:
        return f"{off}; cannot run here: {obstacle}"
    if set(map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))) <= set(PROVEN):
        return "active"
    return off
