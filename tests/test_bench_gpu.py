"""What of `make gpu` can be told without a device: it refuses, and its table names the fastest that ran."""

import pytest
import torch

from bench import gpu
from bench.bench_gated_lora_linear import cuda_cases
from bench.sweep_gated_lora_linear import fastest


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refuses_without_a_device():
    with pytest.raises(SystemExit, match=r"needs a CUDA device, and torch .* sees none"):
        gpu.main()


def test_refuses_without_a_package(monkeypatch):
    monkeypatch.setattr(gpu, "NEEDED", ("numpy", "a_package_that_is_not_there"))
    with pytest.raises(SystemExit, match="needs a_package_that_is_not_there, which this Python lacks"):
        gpu.main()


def test_every_case_once():
    cases = cuda_cases()
    assert len({str(case) for case in cases}) == len(cases)


def test_table_has_the_fastest_that_ran():
    size = {"kernel": "base", "M": 8, "K": 16, "N": 16, "rank_tile": 16}
    rows = [
        size | {"picked": True, "config": {"BLOCK_M": 64}, "seconds": 3.0},
        size | {"picked": False, "config": {"BLOCK_M": 128}, "seconds": 2.0},
        size | {"picked": False, "config": {"BLOCK_M": 256}, "seconds": None, "error": "OutOfResources"},
        size | {"M": 9, "picked": True, "config": {"BLOCK_M": 64}, "seconds": None, "error": "OutOfResources"},
        size | {"M": 9, "picked": False, "config": {"BLOCK_M": 32}, "seconds": 1.0},
    ]
    first, second = fastest(rows)
    assert (first["config"], first["seconds"], first["speedup"]) == ({"BLOCK_M": 128}, 2.0, 1.5)
    assert (second["M"], second["seconds"], second["speedup"]) == (9, 1.0, None)
