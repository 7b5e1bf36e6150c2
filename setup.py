"""Builds what is compiled, both parts optional: C++ for the CPU, and CUDA where there is an nvcc. Loaded with ctypes."""

import os
import runpy
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

windows, linux = os.name == "nt", sys.platform == "linux"
extension = Extension(
    "cobra_kernels._C",
    sources=["csrc/conductance.cpp", "csrc/gates.cpp", "csrc/merge.cpp", "csrc/skinny.cpp"],
    include_dirs=["csrc"],
    depends=sorted(glob("csrc/*.h")),
    extra_compile_args=["/std:c++17"] if windows else ["-std=c++17", "-O3", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread", "-ldl"] if linux else [],
    language="c++",
    optional=True,
)


class BuildWithCuda(build_ext):
    """Puts the CUDA library, or the reason why there is none, beside the extension."""

    def run(self) -> None:
        super().run()
        folder = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        report = runpy.run_path(str(Path(__file__).with_name("csrc") / "nvcc.py"))["build"](folder)
        print("CUDA kernels:", f"built for {report['nvcc']}" if report["built"] else f"not built, {report['reason']}")


setup(ext_modules=[extension], cmdclass={"build_ext": BuildWithCuda})
