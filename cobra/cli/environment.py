"""Facts about this installation, for bug reports."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import cobra
from cobra_kernels import cuda_extension, extension
from cobra_kernels.backend import describe_triton, triton_operations

LIBRARIES = ("numpy", "safetensors", "triton", "transformers", "peft", "trl", "accelerate", "captum", "matplotlib")


def describe() -> dict[str, str]:
    """Name -> fact, in the order to read them."""
    facts = {
        "cobra-peft": cobra.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "device": _device(),
    }
    facts |= {name: _version(name) for name in LIBRARIES}
    built = extension.load() is not None
    facts["C++ extension"] = (
        "active: gates and their KL, adapter products in fp32, conductance, merge"
        if built
        else "not built: torch does its work, slower (no C++ compiler at install?)"
    )
    facts["Triton kernels"] = f"{', '.join(triton_operations())}: {describe_triton()}"
    facts["CUDA kernels"] = _cuda_kernels()
    return facts


def _cuda_kernels() -> str:
    reason = cuda_extension.why_not()
    if reason:
        return f"none, and none is needed: {reason}"
    report = cuda_extension.report()
    built_for = ", ".join(sorted({row["arch"] for row in report.get("kernels", [])}))
    return f"built by nvcc {report.get('nvcc')} for {built_for}: off by default, never run on a GPU (backend='cuda')"


def _device() -> str:
    if not torch.cuda.is_available():
        return "CPU (torch sees no CUDA device)"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
