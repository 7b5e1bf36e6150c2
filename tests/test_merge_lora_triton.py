"""The Triton path of a grouped merge, in Triton's interpreter: fp32 and fp16, since its bf16 is wrong."""

import sys

import pytest
import torch
from interpreter import interpreted_copy

import cobra_kernels
from cobra_kernels import merge_lora as merge_one
from cobra_kernels.merge_lora import MergeItem, merge_lora_group, merge_lora_group_ref
from cobra_kernels.testing import assert_within_budget, make_inputs

DTYPES = [torch.float32, torch.float16]
SHAPES = {  # K, N, r
    "one element": (1, 1, 1),
    "rank 0": (19, 23, 0),
    "primes": (101, 67, 7),
    "several tiles each way, aligned": (288, 96, 32),
    "several blocks of ranks": (20, 12, 530),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """backend="triton" for tensors of the CPU."""
    copy = interpreted_copy("merge_lora_triton")
    monkeypatch.setattr(sys.modules["cobra_kernels.merge_lora"], "require_triton", lambda *_: None)
    monkeypatch.setattr(cobra_kernels, "merge_lora_triton", copy, raising=False)
    monkeypatch.setitem(sys.modules, "cobra_kernels.merge_lora_triton", copy)


def make_item(K, N, r, dtype, layout="contiguous", seed=0):
    inputs = make_inputs((1,), K, N, r, gates=None, bias=False, layout=layout, seed=seed)
    return MergeItem(make_half(inputs["weight"], dtype), inputs["lora_A"], inputs["lora_B"])


def make_half(weight, dtype):
    """In dtype, laid out as it was."""
    return (
        weight.to(dtype)
        if weight._base is None
        else weight._base.to(dtype).as_strided(weight.shape, weight.stride(), weight.storage_offset())
    )


def oracle(items):
    return [item.weight.double() + item.lora_B.double() @ item.lora_A.double() for item in items]


def torch_merge(items):
    return [merge_one(item.weight, item.lora_A, item.lora_B) for item in items]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_within_budget(shape, dtype):
    items = [make_item(*shape, dtype, seed=seed) for seed in range(2)]
    merged, statistics = merge_lora_group(items, backend="triton")
    assert_within_budget(merged, torch_merge(items), oracle(items))
    torch.testing.assert_close(statistics[:, :2], merge_lora_group_ref(items)[1][:, :2], rtol=1e-5, atol=0)


def test_ragged_group():
    """Every shape, dtype and layout beside empty weights: each as if it were alone, with its own statistics."""
    layouts = ["contiguous", "slices", "transposed"]
    items = [make_item(*shape, DTYPES[i % 2], layouts[i % 3]) for i, shape in enumerate([*SHAPES.values()] * 2)]
    items.insert(3, MergeItem(torch.empty(0, 4), torch.ones(2, 4), torch.ones(0, 2)))
    merged, statistics = merge_lora_group(items, backend="triton")
    for item, result, row in zip(items, merged, statistics, strict=True):
        (alone,), sums = merge_lora_group([item], backend="triton")
        assert torch.equal(result, alone) and torch.equal(row, sums[0])
    exact, _ = merge_lora_group_ref(items)
    for result, expected in zip(merged, exact, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-5)


def test_in_place():
    items = [make_item(*shape, torch.float16, "slices") for shape in [(101, 67, 7), (19, 23, 0)]]
    expected, sums = merge_lora_group(items, backend="triton")
    merged, statistics = merge_lora_group(items, out=[item.weight for item in items], backend="triton")
    assert all(m is item.weight and torch.equal(m, e) for m, item, e in zip(merged, items, expected, strict=True))
    assert torch.equal(statistics, sums)
    assert all(item.weight._base[:, [0, 1, -3, -2, -1]].isnan().all() for item in items)


def test_rank_0_keeps_every_sign():
    item = MergeItem(torch.tensor([[-0.0, 0.0, 1.0]]), torch.empty(0, 3), torch.empty(1, 0))
    (merged,), _ = merge_lora_group([item], backend="triton")
    assert merged.signbit().tolist() == [[True, False, False]]


def test_statistics_tell_what_is_not_finite():
    items = [make_item(33, 21, 3, torch.float16) for _ in range(3)]
    items[1].lora_B[-1, -1] = float("inf")
    merged, statistics = merge_lora_group(items, backend="triton")
    assert [m.isfinite().all().item() for m in merged] == [True, False, True]
    assert statistics[:, 2].isfinite().tolist() == [True, False, True]
