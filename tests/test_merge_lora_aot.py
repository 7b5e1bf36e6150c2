"""The Triton kernels of a grouped merge, compiled for A100 and H100 without either: whether they fit, and stay in registers."""

from itertools import product

import pytest

aot = pytest.importorskip("aot", reason="triton is not installed")
kernels = pytest.importorskip("cobra_kernels.merge_lora_triton", reason="triton is not installed")

POINTERS = {"sites_ptr": "*i64", "first_tile_ptr": "*i64", "sums_ptr": "*fp64", "tile_sums_ptr": "*fp64"}


@pytest.mark.parametrize("arch", aot.SMALLEST_FIRST)
@pytest.mark.parametrize(
    ("dtype", "aligned", "statistics"),
    [
        *product(kernels.DTYPES[:2], (True, False), (True,)),
        *(pytest.param(kernels.DTYPES[2], aligned, True, marks=pytest.mark.slow) for aligned in (True, False)),
        (kernels.DTYPES[0], True, False),
    ],
    ids=str,
)
def test_merge_fits_and_does_not_spill(dtype, aligned, statistics, arch, tmp_path):
    constants = (
        vars(kernels.pick_config())
        | {"DTYPE": dtype, "IS_FLOAT32": dtype == kernels.DTYPES[0], "ALIGNED": aligned}
        | ({} if statistics else {"sums_ptr": None})
    )
    options = {field: constants.pop(field) for field in ("num_warps", "num_stages")}
    aot.assert_fits(kernels._merge_kernel, POINTERS, constants, arch, tmp_path, aligned=False, tensor_cores=False, **options)


@pytest.mark.parametrize("arch", aot.SHARED_MEMORY)
def test_sums_fit(arch, tmp_path):
    options = {"num_warps": 4, "num_stages": 3}
    constants = {"BLOCK": 256}
    aot.assert_fits(kernels._sums_kernel, POINTERS, constants, arch, tmp_path, aligned=False, tensor_cores=False, **options)
