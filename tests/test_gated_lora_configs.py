"""Fused or cuBLAS, by shape: the choice against the arithmetic it is made of."""

from dataclasses import replace
from itertools import product

import pytest

from cobra_kernels import gated_lora_configs as configs

A100, H100 = configs.ROOFLINES[80], configs.ROOFLINES[90]
TOKENS, RANKS = (1, 16, 128, 1024, 8192), (16, 64, 128, 256, 512)
LAYERS = ((4096, 4096), (4096, 11008), (11008, 4096))


def test_seconds_of_one_shape_by_hand():
    """8192 tokens of 4096 → 11008 with 16 ranks on an H100: compute bound but for the addition."""
    product, added = 2 * 8192 * 4096 * 11008 / 790e12, 2 * (2 * 8192 * 11008 + 16 * (8192 + 11008)) / 3e12
    assert configs.seconds_addmm(8192, 4096, 11008, 16, H100) == pytest.approx(product + added + 8e-6)
    assert configs.seconds_fused(8192, 4096, 11008, 16, H100) == pytest.approx(product * (1 + 16 / 4096) / 0.95 + 4e-6)


@pytest.mark.parametrize(
    ("M", "K", "N", "R", "arch", "path"),
    [
        (8192, 4096, 4096, 16, 90, "fused"),  # adding costs 13 % of the product, a slower product 5 %
        (8192, 4096, 11008, 64, 90, "fused"),
        (8192, 11008, 4096, 16, 90, "addmm"),  # adding costs 5 % of a product this deep
        (8192, 4096, 4096, 512, 90, "addmm"),  # bound by arithmetic either way
        (8192, 4096, 4096, 16, 80, "fused"),
        (8192, 4096, 4096, 256, 80, "addmm"),
        (1, 4096, 4096, 16, 90, "fused"),  # bound by launches
        (1, 4096, 4096, 16, 100, "fused"),
    ],
)
def test_choice_of_known_shapes(M, K, N, R, arch, path):
    assert configs.pick_base_path(M, K, N, R, True, arch) == path


@pytest.mark.parametrize("arch", [80, 90])
def test_fused_where_its_product_is_slower_by_less_than_the_addition(arch):
    """The rule that the arithmetic stands for: `fused` products within (bytes of the addition) / bandwidth of cuBLAS."""
    device = configs.ROOFLINES[arch]
    for M, (K, N), R in product((1024, 8192), LAYERS, (16, 64)):
        slower = 2 * M * N * ((K + R) / device.fused - K) / device.flops
        addition = 2 * (2 * M * N + R * (M + N)) / device.bandwidth + device.launch
        expected = "fused" if slower < addition else "addmm"
        assert configs.pick_base_path(M, K, N, R, True, arch) == expected


def test_a_fused_product_as_fast_as_cublas_never_loses():
    for device, M, (K, N), R in product((A100, H100), TOKENS, LAYERS, RANKS):
        ideal = replace(device, fused=1.0)
        assert configs.seconds_fused(M, K, N, R, ideal) < configs.seconds_addmm(M, K, N, R, ideal)


def test_what_has_no_tensor_cores_is_left_to_cublas():
    assert {configs.pick_base_path(M, K, N, 16, False, 90) for M, (K, N) in product(TOKENS, LAYERS)} == {"addmm"}
