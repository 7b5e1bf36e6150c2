"""Triton kernels compiled for A100 and H100 without either: whether a block fits, and stays in registers."""

import re
import subprocess

import pytest

triton = pytest.importorskip("triton")
nvidia = pytest.importorskip("triton.backends.nvidia.compiler")

SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a block may have
# of kernels without tensor cores, whose code is the same on both but for registers
SMALLEST_FIRST = (80, pytest.param(90, marks=pytest.mark.slow))
TENSOR_CORES = {80: r"mma\.sync", 90: r"mma\.sync|wgmma\.mma_async"}


def assert_fits(kernel, types, constants, arch, folder, *, aligned, tensor_cores, num_warps, num_stages, fuses=True):
    """Compiles a kernel and reads ptxas's report.

    types: the Triton type of each argument that is no constant; i32 where it says nothing
    constants: the values of constexpr arguments, tiles included
    aligned: whether Triton knows that sizes, strides and addresses are multiples of 16
    tensor_cores: whether its products must use them
    fuses: whether products and sums may be contracted
    """
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divisible = [["tt.divisibility", 16]]
    attributes = {(i,): divisible for i, kind in enumerate(signature.values()) if kind.startswith(("*", "i"))}
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes if aligned else {})
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fuses}
        compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY[arch]
    assert re.search(TENSOR_CORES[arch], ptx) or not tensor_cores
    assert "ld.local" not in ptx
    assert fuses or not re.search(r"\bfma\.", ptx)
    (folder / "kernel.ptx").write_text(ptx)
    gpu = re.search(r"\.target (\w+)", ptx)[1]
    ptxas = [nvidia.get_ptxas(arch).path, "-v", f"--fmad={str(fuses).lower()}", f"--gpu-name={gpu}"]
    command = [*ptxas, folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert frames == [("0", "0", "0")], report
    assert "lmem" not in report
