"""Builds the optional C extension: plain functions over raw pointers, loaded with ctypes."""

import os

from setuptools import Extension, setup

extension = Extension(
    "cobra_kernels._C",
    sources=["csrc/gates.cpp"],
    include_dirs=["csrc"],
    depends=["csrc/philox.h"],
    extra_compile_args=[] if os.name == "nt" else ["-std=c++17", "-O3", "-fvisibility=hidden"],
    language="c++",
    optional=True,
)

setup(ext_modules=[extension])
