"""Builds the optional C extension: plain functions over raw pointers, loaded with ctypes."""

import os
import sys
from glob import glob

from setuptools import Extension, setup

windows, linux = os.name == "nt", sys.platform == "linux"
extension = Extension(
    "cobra_kernels._C",
    sources=["csrc/gates.cpp", "csrc/merge.cpp", "csrc/skinny.cpp"],
    include_dirs=["csrc"],
    depends=sorted(glob("csrc/*.h")),
    extra_compile_args=["/std:c++17"] if windows else ["-std=c++17", "-O3", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread", "-ldl"] if linux else [],
    language="c++",
    optional=True,
)

setup(ext_modules=[extension])
