"""Every Triton kernel of the gates' operators, compiled for A100 and H100 without either: no spills, and nothing contracted."""

import math
import re
import struct
from itertools import product

import pytest

aot = pytest.importorskip("aot", reason="triton is not installed")
kernels = pytest.importorskip("cobra_kernels.gates_triton", reason="triton is not installed")

KERNELS = {"forward": kernels._forward_kernel, "backward": kernels._backward_kernel}
# whether hard, sampled, drawn, ragged, and which of z, kl and open
KINDS = {
    "all, drawn": (False, False, True, False, (1, 1, 1)),
    "all, hard, sampled, ragged": (True, True, True, True, (1, 1, 1)),
    "z of given noise": (False, False, False, False, (1, 0, 0)),
    "hard z of given noise": (True, False, False, False, (1, 0, 0)),
    "Bernoulli KL": (False, False, False, False, (0, 1, 0)),
    "sampled KL of given noise": (False, True, False, False, (0, 1, 0)),
}


def cases():
    """The smaller variants are those of one architecture in the usual run, and all in the slow one."""
    for name, kind, config, arch in product(KERNELS, KINDS, kernels.CONFIGS, aot.SHARED_MEMORY):
        whole = "ragged" in kind
        if whole or config.BLOCK == 128:
            marks = () if arch == 90 or (whole and config.BLOCK == 32) else pytest.mark.slow
            yield pytest.param(name, kind, config, arch, id=f"{name}-{kind}-{config.BLOCK}-sm_{arch}", marks=marks)


@pytest.mark.parametrize(("name", "kind", "config", "arch"), list(cases()))
def test_does_not_spill_and_contracts_nothing(name, kind, config, arch, tmp_path):
    hard, sampled, draws, ragged, wanted = KINDS[kind]
    constants = dict(vars(config)) | {"SAMPLED": sampled, "DRAWS": draws, "RAGGED": ragged, "HEATED": not draws}
    constants |= {"LOW": -0.1 * hard, "WIDTH": 1 + 0.2 * hard, "LOG_RATIO": -2.4 * hard}
    constants |= dict(zip(("WITH_Z", "WITH_KL", "WITH_OPEN"), map(bool, wanted), strict=True))
    options = {field: constants.pop(field) for field in ("num_warps", "num_stages")}
    pointers = [argument for argument in KERNELS[name].arg_names if argument.endswith("_ptr")]
    types = dict.fromkeys(pointers, "*fp32") | {"offsets_ptr": "*i64", "heat": "fp32"}
    aot.assert_fits(KERNELS[name], types, constants, arch, tmp_path, aligned=False, tensor_cores=False, fuses=False, **options)


@pytest.mark.parametrize(("ranks", "block"), [(0, 64), (1, 32), (16, 32), (33, 64), (128, 128), (1024, 128)])
def test_config_of_ranks(ranks, block):
    config = kernels.pick_config(ranks)
    assert (config.BLOCK, config.num_warps) == (block, block // 32)


def test_constants_keep_their_53_bits(tmp_path):
    """What the interpreter cannot see: a compiler that took a constant for fp32 would change every bit."""
    constants = {
        "SAMPLED": True,
        "DRAWS": True,
        "RAGGED": False,
        "HEATED": False,
        "LOW": -0.1,
        "WIDTH": 1.1 + 0.1,
        "BLOCK": 32,
    }
    constants |= {"LOG_RATIO": math.log(0.1 / 1.1), "WITH_Z": True, "WITH_KL": True, "WITH_OPEN": True}
    kernel = kernels._forward_kernel
    types = dict.fromkeys((name for name in kernel.arg_names if name.endswith("_ptr")), "*fp32") | {
        "offsets_ptr": "*i64",
        "heat": "fp32",
    }
    options = {"aligned": False, "tensor_cores": False, "fuses": False, "num_warps": 1, "num_stages": 1}
    aot.assert_fits(kernel, types, constants, 90, tmp_path, **options)
    words = re.findall(r"0d([0-9A-F]{16})", (tmp_path / "kernel.ptx").read_text())
    found = {abs(struct.unpack(">d", bytes.fromhex(word))[0]) for word in words}
    expected = {1 / k for k in (*range(1, 34, 2), *range(1, 14))}
    expected |= {math.log2(math.e), 1.5 * 2**52, float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")}
    assert expected | {0.1, 1.1 + 0.1, -math.log(0.1 / 1.1)} <= found
