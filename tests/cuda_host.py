"""CUDA kernels on the CPU: csrc/*.cu compiled as C++ with tests/cuda_host.h in the place of a device."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from cobra_kernels import cuda_extension

CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = ["-x", "c++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]


def compile_for_host(source: str | Path, folder: Path) -> ctypes.CDLL:
    """The launchers of one file, of csrc unless its path is absolute; skips where there is no compiler."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    target = folder / f"{Path(source).name}.so"
    header = Path(__file__).with_name("cuda_host.h")
    subprocess.run(["g++", *FLAGS, "-include", header, "-I", CSRC, CSRC / source, "-o", target], check=True)
    library = ctypes.CDLL(str(target))
    for name, (restype, argtypes) in cuda_extension.SIGNATURES.items():
        if hasattr(library, name):
            getattr(library, name).restype, getattr(library, name).argtypes = restype, argtypes
    return library
