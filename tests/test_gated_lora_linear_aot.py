"""Every Triton kernel of `gated_lora_linear`, compiled for A100 and H100 without either: it fits, and stays in registers."""

from itertools import product

import pytest

aot = pytest.importorskip("aot", reason="triton is not installed")
products = pytest.importorskip("cobra_kernels.gated_lora_linear_triton", reason="triton is not installed")
small = pytest.importorskip("cobra_kernels.gated_lora_small_triton", reason="triton is not installed")
configs = pytest.importorskip("cobra_kernels.gated_lora_configs")

TILES = (16, 32, 64)
FLOATS = ("sums_ptr", "g_ptr", "planes_ptr", "partial_ptr", "z_ptr", "temperature_ptr", "gate_ptr", "dz_ptr")
TYPES = dict.fromkeys(FLOATS, "*fp32") | {"source_ptr": "*i32", "extent_ptr": "*i32", "draw_ptr": "*i32", "scaling": "fp32"}
# strides that are 1 where rows are dense: of x and of the frozen weight, as the forward and as the backward reads it
FORWARD, BACKWARD = ("stride_xk", "stride_wk"), ("stride_xk", "stride_wn")


def case(name, kernel, config, operands, dtype, arch, *, units=(), constants=(), slow=False):
    """units: strides that are 1, in a layer whose sizes are multiples of 16; without any, nothing is known of either"""
    tiles = "x".join(str(size) for field, size in vars(config).items() if field not in ("num_warps", "num_stages"))
    plain = dtype != "bf16"  # without tensor cores: the smaller of the two is enough for every run
    marks = [pytest.mark.slow] if slow or (plain and arch == 90) else []
    constants = dict.fromkeys(units, 1) | dict(constants)
    types = TYPES | dict.fromkeys(operands, f"*{dtype}")
    return pytest.param(
        kernel, config, types, constants, arch, bool(units), id=f"{name}-{tiles}-{dtype}-sm_{arch}", marks=marks
    )


def shrinks(arch):
    operands = ("x_ptr", "p_ptr", "h_ptr")
    for M, tile in product((16, 8192), TILES):
        config, skips = configs.pick_shrink_config(M, tile, True), M > 16 and tile != 32
        flags = {"units": ("stride_xk",), "constants": {"SKIPS": skips}, "slow": tile == 32}
        yield case("shrink", products._shrink_kernel, config, operands, "bf16", arch, **flags)
    for M, dtype in product((16, 8192), ("fp32", "fp16")):
        config = configs.pick_shrink_config(M, 16, False)
        flags = {"constants": {"SKIPS": M > 16}, "slow": dtype == "fp16"}
        yield case("narrow-shrink", products._shrink_kernel, config, operands, dtype, arch, **flags)


def bases(arch):
    operands, bias = ("x_ptr", "w_ptr", "h_ptr", "f_ptr", "bias_ptr", "y_ptr"), {"HAS_BIAS": True}
    for (M, N), tile, (way, units) in product(
        ((16, 4096), (64, 4096), (1024, 1024), (8192, 4096)), (16, 64), {"forward": FORWARD, "backward": BACKWARD}.items()
    ):
        config, fewest_or_most = configs.pick_base_config(M, N, tile, True, arch), M in (16, 8192)
        slow = (way == "forward") != (tile == 16) or not fewest_or_most
        yield case(f"{way}-base", products._base_kernel, config, operands, "bf16", arch, units=units, constants=bias, slow=slow)
    for M, dtype in product((16, 8192), ("fp32", "fp16")):
        config, slow = configs.pick_base_config(M, 4096, 16, False, arch), dtype == "fp16"
        yield case("narrow-base", products._base_kernel, config, operands, dtype, arch, constants=bias, slow=slow)


def tokens(arch):
    operands = ("x_ptr", "h_ptr", "p_ptr")
    for tile, with_g in product(TILES, (True, False)):
        if with_g and not configs.pick_one_pass(tile, tile, arch):
            continue
        config, constants = configs.pick_tokens_config(tile, True, with_g, arch), {"CLOSED": 1, "WITH_G": with_g}
        name = "tokens-with-g" if with_g else "tokens"
        yield case(name, products._tokens_kernel, config, operands, "bf16", arch, units=("stride_xn",), constants=constants)
    for dtype in ("fp32", "fp16"):
        config, constants = configs.pick_tokens_config(16, False, True, arch), {"CLOSED": 1, "WITH_G": True}
        yield case(
            "narrow-tokens", products._tokens_kernel, config, operands, dtype, arch, constants=constants, slow=dtype == "fp16"
        )


def without_products(arch):
    config = configs.SmallConfig()
    for tile in TILES:
        rows, flags = configs.pick_rows_config(tile), {"GATED": True, "WITH_DZ": True}
        yield case("rows", products._rows_kernel, rows, ("h_ptr", "out_ptr", "gated_ptr"), "bf16", arch, constants=flags)
    for kind in ("open", "given", "sampled", "known"):
        constants = {"GATES": kind, "KEEP_CLOSED": True, "FOLD_A": kind == "known", "BLOCK_R": 32}
        types = ("a_ptr", "b_ptr", "packed_a_ptr", "packed_b_ptr")
        yield case(f"fold-{kind}", small._fold_kernel, config, types, "fp32", arch, constants=constants)
    constants = {"CLOSED": 1, "WITH_DZ": True}
    yield case("columns", small._columns_kernel, config, ("small_ptr", "out_ptr"), "fp32", arch, constants=constants)


def ones(arch):
    """Triton makes constants of sizes that are 1: one token, one rank, one plane."""
    small_config = configs.SmallConfig()
    shrink, base = configs.pick_shrink_config(1, 16, False), configs.pick_base_config(1, 1, 16, False, arch)
    tokens, rows = configs.pick_tokens_config(16, False, True, arch), configs.pick_rows_config(16)
    operands, constants = ("x_ptr", "p_ptr", "h_ptr"), {"M": 1, "K": 1, "SKIPS": True}
    yield case("one-shrink", products._shrink_kernel, shrink, operands, "fp32", arch, constants=constants)
    operands, constants = ("x_ptr", "w_ptr", "h_ptr", "f_ptr", "bias_ptr", "y_ptr"), {"M": 1, "N": 1, "K": 1, "HAS_BIAS": True}
    yield case("one-base", products._base_kernel, base, operands, "fp32", arch, constants=constants)
    constants = {"M": 1, "N": 1, "CLOSED": 1, "WITH_G": True}
    yield case("one-tokens", products._tokens_kernel, tokens, ("x_ptr", "h_ptr", "p_ptr"), "fp32", arch, constants=constants)
    constants = {"M": 1, "r": 1, "planes": 1, "GATED": True, "WITH_DZ": True}
    yield case("one-rows", products._rows_kernel, rows, ("h_ptr", "out_ptr", "gated_ptr"), "fp32", arch, constants=constants)
    for kind in ("given", "sampled"):
        constants = {"K": 1, "N": 1, "r": 1, "GATES": kind, "KEEP_CLOSED": False, "FOLD_A": False, "BLOCK_R": 16}
        operands = ("a_ptr", "b_ptr", "packed_a_ptr", "packed_b_ptr")
        yield case(f"one-fold-{kind}", small._fold_kernel, small_config, operands, "fp32", arch, constants=constants)
    constants = {"N": 1, "planes": 1, "CLOSED": 1, "WITH_DZ": True}
    yield case("one-columns", small._columns_kernel, small_config, ("small_ptr", "out_ptr"), "fp32", arch, constants=constants)


CASES = [case for arch in aot.SHARED_MEMORY for family in (shrinks, bases, tokens, without_products) for case in family(arch)]
CASES += list(ones(80))


@pytest.mark.parametrize(("kernel", "config", "types", "constants", "arch", "wide"), CASES)
def test_fits_and_does_not_spill(kernel, config, types, constants, arch, wide, tmp_path):
    constants = constants | vars(config)
    options = {field: constants.pop(field) for field in ("num_warps", "num_stages")}
    aot.assert_fits(kernel, types, constants, arch, tmp_path, aligned=wide, tensor_cores=wide, **options)


@pytest.mark.parametrize("arch", aot.SHARED_MEMORY)
def test_gradient_of_the_gates_fits(arch, tmp_path):
    constants = {"SAMPLED": True, "tiles": 1, "ROWS": configs.SmallConfig().ROWS}
    options = {"aligned": True, "tensor_cores": False, "num_warps": 4, "num_stages": 1}
    aot.assert_fits(small._dz_kernel, TYPES, constants, arch, tmp_path, **options)
