"""Triton kernels on the CPU, through Triton's interpreter."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cobra_kernels


def interpreted_copy(name: str, uses: tuple[str, ...] = ()) -> ModuleType:
    """A copy of a module of `cobra_kernels` whose kernels are interpreted, beside the one that other tests compile.

    uses: modules whose functions its kernels call, interpreted too
    """
    triton = pytest.importorskip("triton", minversion="3.7", reason="older interpreters do not run on numpy 2.4")
    spec = importlib.util.spec_from_file_location(f"interpreted_{name}", Path(cobra_kernels.__file__).with_name(f"{name}.py"))
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy  # where dataclasses look for the module of their annotations
    with triton.knobs.runtime.scope(), pytest.MonkeyPatch.context() as patch:
        for used in uses:
            patch.setitem(sys.modules, f"cobra_kernels.{used}", interpreted_copy(used))
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(copy)
    return copy
