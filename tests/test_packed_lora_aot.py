"""Every Triton kernel of `packed_lora`, compiled for A100 and H100 without either: whether it fits, and stays in registers."""

from itertools import product

import pytest

aot = pytest.importorskip("aot", reason="triton is not installed")
kernels = pytest.importorskip("cobra_kernels.packed_lora_triton", reason="triton is not installed")

BLOCKS = {"blocks_ptr": "*i64", "first_rank_ptr": "*i64"}
PLANES = {"h_ptr": "*fp32"}
# kernel, picker, operands in the layer's dtype, strides that are 1 where rows are dense
KERNELS = {
    "shrink": (kernels._shrink_kernel, kernels.pick_shrink_config, ("x_ptr", "a_ptr"), ("stride_xk", "stride_ak")),
    "expand": (kernels._expand_kernel, kernels.pick_expand_config, ("y_ptr", "b_ptr"), ("stride_yn", "stride_bn")),
}
# dtype, and what Triton knows of the operands: dense rows (strides of 1), and multiples of 16
OPERANDS = {
    "wide": ("bf16", True, True),
    "half, odd widths": ("fp16", True, False),
    "half, any strides": ("bf16", False, False),
    "fp32": ("fp32", True, True),
    "fp32, odd widths": ("fp32", True, False),
}


def cases():
    for (name, (_, pick, *_)), operands in product(KERNELS.items(), OPERANDS):
        configs = {pick(block_m, r_max, operands == "wide") for block_m, r_max in product((16, 64), (1, 16, 17, 512))}
        for config, arch in product(sorted(configs, key=str), aot.SHARED_MEMORY):
            tiles = "x".join(str(size) for field, size in vars(config).items() if field.startswith("BLOCK"))
            yield pytest.param(name, config, operands, arch, id=f"{name}-{tiles}-{operands}-sm_{arch}")


@pytest.mark.parametrize(("name", "config", "operands", "arch"), list(cases()))
def test_fits_and_does_not_spill(name, config, operands, arch, tmp_path):
    kernel, _, in_dtype, units = KERNELS[name]
    dtype, dense, aligned = OPERANDS[operands]
    constants = dict(vars(config)) | (dict.fromkeys(units, 1) if dense else {})
    options = {field: constants.pop(field) for field in ("num_warps", "num_stages")}
    types = BLOCKS | PLANES | dict.fromkeys(in_dtype, f"*{dtype}")
    aot.assert_fits(kernel, types, constants, arch, tmp_path, aligned=aligned, tensor_cores=dtype != "fp32", **options)
