"""Every Triton kernel of `packed_lora`, compiled for A100 and H100 without either: whether it fits, and stays in registers."""

import re
import subprocess
from importlib import import_module
from itertools import product

import pytest

triton = pytest.importorskip("triton")
nvidia = pytest.importorskip("triton.backends.nvidia.compiler")
kernels = import_module("cobra_kernels.packed_lora_triton")

SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a block may have
TENSOR_CORES = {80: r"mma\.sync", 90: r"mma\.sync|wgmma\.mma_async"}
BLOCKS = {"blocks_ptr": "*i64", "first_rank_ptr": "*i64"}
PLANES = {"h_ptr": "*fp32", "stride_hp": "i32", "stride_hm": "i32"}
KERNELS = {
    "shrink": (
        kernels._shrink_kernel,
        kernels.pick_shrink_config,
        BLOCKS | PLANES | {"x_ptr": "operand", "a_ptr": "operand", "stride_xk": "unit", "stride_ak": "unit"},
    ),
    "expand": (
        kernels._expand_kernel,
        kernels.pick_expand_config,
        BLOCKS | PLANES | {"y_ptr": "operand", "b_ptr": "operand", "stride_yn": "unit", "stride_bn": "unit"},
    ),
}
# dtype, and what Triton knows of the operands: dense rows ("unit" strides), and multiples of 16
OPERANDS = {
    "wide": ("bf16", True, True),
    "half, odd widths": ("fp16", True, False),
    "half, any strides": ("bf16", False, False),
    "fp32": ("fp32", True, True),
    "fp32, odd widths": ("fp32", True, False),
}


def cases():
    for (name, (_, pick, _)), operands in product(KERNELS.items(), OPERANDS):
        configs = {pick(block_m, r_max, operands == "wide") for block_m, r_max in product((16, 64), (1, 16, 17, 512))}
        for config, arch in product(sorted(configs, key=str), SHARED_MEMORY):
            tiles = "x".join(str(size) for field, size in vars(config).items() if field.startswith("BLOCK"))
            yield pytest.param(name, config, operands, arch, id=f"{name}-{tiles}-{operands}-sm_{arch}")


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path):
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


def source(name, config, operands):
    kernel, _, types = KERNELS[name]
    dtype, dense, aligned = OPERANDS[operands]
    tiles = {field: size for field, size in vars(config).items() if field.startswith("BLOCK")}
    types = {argument: types.get(argument, "i32") for argument in kernel.arg_names} | dict.fromkeys(tiles, "constexpr")
    units = {argument: 1 for argument, kind in types.items() if kind == "unit" and dense}
    kinds = {"operand": f"*{dtype}", "unit": "constexpr" if dense else "i32"}
    signature = {argument: kinds.get(kind, kind) for argument, kind in types.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    return triton.compiler.ASTSource(kernel, signature, units | tiles, attributes if aligned else {})


@pytest.mark.parametrize(("name", "config", "operands", "arch"), list(cases()))
def test_fits_and_does_not_spill(name, config, operands, arch, tmp_path):
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source(name, config, operands), target=target, options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY[arch]
    if not operands.startswith("fp32"):
        assert re.search(TENSOR_CORES[arch], compiled.asm["ptx"])
    assert "ld.local" not in compiled.asm["ptx"]
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    gpu = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    command = [nvidia.get_ptxas(arch).path, "-v", f"--gpu-name={gpu}", str(ptx), "-o", str(tmp_path / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert frames == [("0", "0", "0")], report
    assert "lmem" not in report
