"""Every Triton kernel of the attribution operations, compiled for A100 and H100 without either: whether it fits, and stays in
registers."""

from itertools import product

import pytest

aot = pytest.importorskip("aot", reason="triton is not installed")
conductance = pytest.importorskip("cobra_kernels.conductance_reduce_triton", reason="triton is not installed")
ghost = pytest.importorskip("cobra_kernels.ghost_grad_norm_triton", reason="triton is not installed")
path = pytest.importorskip("cobra_kernels.interpolate_path_triton", reason="triton is not installed")

SIZES = (1, 16, 17, 64, 512)
PATHS = {path.pick_config(size) for size in (1, 1 << 20)}
PAIRS = {conductance.pick_pairs_config(1, features) for features in (1, 1 << 20)}
DENSE = {conductance.pick_dense_config(*points) for points in product(SIZES, SIZES)}
GRAM = {wide: {ghost.pick_gram_config(T, wide) for T in SIZES} for wide in (True, False)}
DIRECT = {wide: {ghost.pick_direct_config(wide)} for wide in (True, False)}

SUMS = {"partial_ptr": "*fp32"}
PATH = (path._interpolate_kernel, ("x_ptr", "baseline_ptr", "out_ptr"), {"alphas_ptr": "*fp32"}, ("stride_xd",))
EACH_POINT = ("h_ptr", "grad_ptr")
OF_PAIRS = (conductance._pairs_kernel, EACH_POINT, SUMS | {"scales_ptr": "*fp32"}, ("stride_hf", "stride_gf"))
PLACES = {"q_ptr": "*fp32", "rows_ptr": "*i64", "columns_ptr": "*i64"}
OF_DENSE = (conductance._dense_kernel, EACH_POINT, SUMS | PLACES, ("stride_hf", "stride_gf"))
OF_GRAM = (ghost._gram_kernel, ("x_ptr", "dy_ptr"), SUMS, ("stride_xk", "stride_yn"))
OF_DIRECT = (ghost._direct_kernel, ("x_ptr", "dy_ptr"), SUMS, ("stride_xk", "stride_yn"))

# dtype, and what Triton knows of the operands: dense rows (strides of 1), and multiples of 16
OPERANDS = {
    "wide": ("bf16", True, True),
    "half, odd widths": ("fp16", True, False),
    "half, any strides": ("bf16", False, False),
    "fp32, odd widths": ("fp32", True, False),
}
NARROW = [name for name in OPERANDS if name != "wide"]


def cases():
    for name, kernel, configs in (("path", PATH, PATHS), ("dense", OF_DENSE, DENSE)):
        yield from ((name, kernel, config, operands, {}) for config, operands in product(configs, ("wide", "fp32, odd widths")))
    for neighbours, config, operands in product((True, False), PAIRS, ("wide", "fp32, odd widths")):
        yield f"pairs, neighbours {neighbours}", OF_PAIRS, config, operands, {"NEIGHBOURS": neighbours}
    for name, kernel, configs in (("gram", OF_GRAM, GRAM), ("direct", OF_DIRECT, DIRECT)):
        for wide, known in ((True, ["wide"]), (False, NARROW)):
            yield from ((name, kernel, config, operands, {}) for config, operands in product(configs[wide], known))


def parameters():
    for (name, kernel, config, operands, constants), arch in product(cases(), aot.SHARED_MEMORY):
        tiles = "x".join(str(size) for field, size in vars(config).items() if field.startswith("BLOCK"))
        yield pytest.param(kernel, config, operands, constants, arch, id=f"{name}-{tiles}-{operands}-sm_{arch}")


@pytest.mark.parametrize(("kernel", "config", "operands", "constants", "arch"), sorted(parameters(), key=lambda p: p.id))
def test_fits_and_does_not_spill(kernel, config, operands, constants, arch, tmp_path):
    function, in_dtype, types, units = kernel
    dtype, dense, aligned = OPERANDS[operands]
    constants = dict(vars(config)) | constants | (dict.fromkeys(units, 1) if dense else {})
    options = {field: constants.pop(field) for field in ("num_warps", "num_stages")}
    types = types | dict.fromkeys(in_dtype, f"*{dtype}")
    cores = function in (OF_GRAM[0], OF_DIRECT[0]) and dtype != "fp32"
    aot.assert_fits(function, types, constants, arch, tmp_path, aligned=aligned, tensor_cores=cores, **options)
