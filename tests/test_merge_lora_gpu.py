"""The CUDA and Triton paths of a grouped merge on the device they are for."""

import pytest
import torch

from cobra_kernels import cuda_extension, merge_lora
from cobra_kernels.merge_lora import MergeItem, merge_lora_group, merge_lora_group_ref
from cobra_kernels.testing import assert_within_budget, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_library = pytest.mark.skipif(cuda_extension.load() is None, reason=f"no CUDA library: {cuda_extension.why_not()}")

BACKENDS = [pytest.param("cuda", marks=needs_library), "triton"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = {  # K, N, r
    "one element": (1, 1, 1),
    "rank 0": (19, 23, 0),
    "primes": (1009, 757, 7),
    "aligned": (4096, 1024, 16),
    "wide": (11008, 512, 64),
    "several blocks of ranks": (192, 320, 1024),
}


def make_item(K, N, r, dtype, layout="contiguous", seed=0, device="cuda"):
    options = {"gates": None, "bias": False, "layout": layout, "seed": seed, "device": device}
    weight = make_inputs((1,), K, N, r, dtype=dtype, **options)["weight"]
    factors = make_inputs((1,), K, N, r, **options)
    return MergeItem(weight, factors["lora_A"], factors["lora_B"])


def same_bits(a, b):
    integer = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(integer).cpu(), b.contiguous().view(integer).cpu())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_within_budget(shape, dtype, backend):
    items = [make_item(*shape, dtype, seed=seed) for seed in range(2)]
    merged, statistics = merge_lora_group(items, backend=backend)
    plain = [merge_lora(item.weight, item.lora_A, item.lora_B) for item in items]
    oracle = [item.weight.double() + item.lora_B.double() @ item.lora_A.double() for item in items]
    assert_within_budget(merged, plain, oracle)
    torch.testing.assert_close(statistics[:, :2], merge_lora_group_ref(items)[1][:, :2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_group(backend):
    """Every shape, dtype and layout in one call: each as if it were alone, the same bits at every run, and in place."""
    layouts = ["contiguous", "slices", "transposed"]
    items = [make_item(*shape, DTYPES[i % 3], layouts[i // 2 % 3]) for i, shape in enumerate([*SHAPES.values()] * 2)]
    items.insert(3, MergeItem(torch.empty(0, 4).cuda(), torch.ones(2, 4).cuda(), torch.ones(0, 2).cuda()))
    merged, statistics = merge_lora_group(items, backend=backend)
    for item, result, row in zip(items, merged, statistics, strict=True):
        (alone,), sums = merge_lora_group([item], backend=backend)
        assert same_bits(result, alone) and torch.equal(row, sums[0])
    _, sums = merge_lora_group(items, out=[item.weight for item in items], backend=backend)
    assert torch.equal(sums, statistics)
    assert all(same_bits(item.weight, result) for item, result in zip(items, merged, strict=True))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_cpu(dtype):
    """Where the C++ extension has fused multiply-adds."""
    items = [make_item(*shape, dtype, device="cpu") for shape in SHAPES.values()]
    on_device = [MergeItem(item.weight.cuda(), item.lora_A.cuda(), item.lora_B.cuda()) for item in items]
    merged, statistics = merge_lora_group(on_device, backend="cuda")
    expected, sums = merge_lora_group(items)
    assert all(same_bits(a, b) for a, b in zip(merged, expected, strict=True))
    torch.testing.assert_close(statistics, sums, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("backend", BACKENDS)
def test_does_not_wait_for_the_device(backend):
    """Without statistics nothing is read back."""
    item = make_item(*SHAPES["primes"], torch.bfloat16)
    (expected,), _ = merge_lora_group([item], backend=backend, statistics=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (merged,), _ = merge_lora_group([item], backend=backend, statistics=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same_bits(merged, expected)
