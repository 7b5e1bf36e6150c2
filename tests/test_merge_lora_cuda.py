"""csrc/merge.cu without a GPU: its kernels, compiled for the CPU and run thread by thread, against csrc/merge.cpp."""

import shutil
import subprocess

import pytest
import torch
from cuda_host import CSRC, compile_for_host

from cobra_kernels import cuda_extension, extension
from cobra_kernels import merge_lora as merge_lora_function
from cobra_kernels.merge_lora import MergeItem, merge_lora_group, merge_lora_group_ref
from cobra_kernels.testing import assert_within_budget, make_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # K, N, r
    "one element": (1, 1, 1),
    "rank 0": (19, 23, 0),
    "primes": (101, 67, 7),
    "several tiles each way": (260, 130, 17),
    "several blocks of ranks": (20, 12, 530),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compile_for_host("merge.cu", tmp_path_factory.mktemp("host"))


@pytest.fixture
def on_host(host, monkeypatch):
    """backend="cuda" for tensors of the CPU."""
    monkeypatch.setattr(cuda_extension, "require", lambda *_: host)


def make_item(K, N, r, dtype, layout="contiguous", seed=0):
    inputs = make_inputs((1,), K, N, r, gates=None, bias=False, layout=layout, seed=seed)
    weight = make_inputs((1,), K, N, r, gates=None, bias=False, layout=layout, seed=seed, dtype=dtype)["weight"]
    return MergeItem(weight, inputs["lora_A"], inputs["lora_B"])


def same_bits(a, b):
    integer = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def oracle(items):
    return [item.weight.double() + item.lora_B.double() @ item.lora_A.double() for item in items]


def torch_merge(items):
    return [merge_lora_function(item.weight, item.lora_A, item.lora_B) for item in items]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_within_budget(shape, dtype, on_host):
    items = [make_item(*shape, dtype, seed=seed) for seed in range(2)]
    merged, _ = merge_lora_group(items, backend="cuda")
    assert_within_budget(merged, torch_merge(items), oracle(items))


def test_ragged_group_in_one_launch(on_host):
    """Every shape, dtype and layout beside empty weights: each as if it were alone, with its own statistics."""
    layouts = ["contiguous", "slices", "transposed"]
    items = [make_item(*shape, DTYPES[i % 3], layouts[i // 2 % 3]) for i, shape in enumerate([*SHAPES.values()] * 2)]
    items.insert(3, MergeItem(torch.empty(0, 4), torch.ones(2, 4), torch.ones(0, 2)))
    merged, statistics = merge_lora_group(items, backend="cuda")
    _, expected = merge_lora_group_ref(items)
    for item, result, row in zip(items, merged, statistics, strict=True):
        (alone,), sums = merge_lora_group([item], backend="cuda")
        assert same_bits(result, alone) and torch.equal(row, sums[0])
    assert_within_budget(
        [m for m in merged if m.numel()],
        torch_merge([i for i in items if i.weight.numel()]),
        oracle([i for i in items if i.weight.numel()]),
        dtype=torch.bfloat16,
    )
    torch.testing.assert_close(statistics[:, :2], expected[:, :2], rtol=1e-5, atol=0)


@pytest.mark.skipif(extension.load() is None, reason="the compiled extension was not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_on_the_cpu(dtype, on_host):
    """Sums in the same order with the same multiply-adds; the statistics to fp32's last digits."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor's extension has no fused multiply-add")
    items = [make_item(*shape, dtype) for shape in SHAPES.values()]
    merged, statistics = merge_lora_group(items, backend="cuda")
    expected, sums = merge_lora_group(items)
    assert all(same_bits(a, b) for a, b in zip(merged, expected, strict=True))
    torch.testing.assert_close(statistics, sums, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("layout", ["contiguous", "slices", "transposed"])
def test_in_place(layout, on_host):
    items = [make_item(*shape, torch.bfloat16, layout) for shape in [(101, 67, 7), (19, 23, 0), (64, 32, 8)]]
    expected, sums = merge_lora_group(items, backend="cuda")
    merged, statistics = merge_lora_group(items, out=[item.weight for item in items], backend="cuda")
    assert all(m is item.weight and same_bits(m, e) for m, item, e in zip(merged, items, expected, strict=True))
    assert torch.equal(statistics, sums)
    if layout == "slices":
        assert all(item.weight._base[:, [0, 1, -3, -2, -1]].isnan().all() for item in items)


@pytest.mark.parametrize("place", ["weight", "lora_A", "lora_B"])
def test_statistics_tell_what_is_not_finite(place, on_host):
    """And the columns beyond the last, whose factors are 0, bring no NaN of their own."""
    items = [make_item(33, 21, 3, torch.float16) for _ in range(3)]
    getattr(items[1], place)[-1, -1] = float("inf")
    merged, statistics = merge_lora_group(items, backend="cuda")
    assert [m.isfinite().all().item() for m in merged] == [True, False, True]
    assert statistics[:, 2].isfinite().tolist() == [True, False, True]
    expected = torch_merge(items)[1]
    assert torch.equal(merged[1].isnan(), expected.isnan()) and torch.equal(merged[1].isinf(), expected.isinf())


def test_no_statistics_and_an_empty_group(on_host):
    item = make_item(33, 21, 3, torch.float32)
    merged, statistics = merge_lora_group([item], backend="cuda", statistics=False)
    assert statistics is None and same_bits(merged[0], merge_lora_group([item], backend="cuda")[0][0])
    assert merge_lora_group([], backend="cuda")[0] == []


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_refuses_what_it_cannot_run(backend):
    item = make_item(4, 6, 2, torch.float32)
    with pytest.raises(RuntimeError, match=f"backend='{backend}' needs"):
        merge_lora_group([item], backend=backend)
    double = MergeItem(item.weight.double(), item.lora_A, item.lora_B, name="mlp.fc1")
    with pytest.raises(ValueError, match=f"mlp.fc1: backend='{backend}' takes plain fp32"):
        merge_lora_group([double], backend=backend)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_every_tile_finds_its_site(tmp_path):
    """csrc/merge_site.h alone: sites without a tile, first and last too, are found by none."""
    tiles = [0, 3, 0, 0, 1, 5, 0]
    (tmp_path / "main.cpp").write_text(
        '#include "merge_site.h"\n#include <cstdio>\nint main() {\n'
        f"  const int64_t first[] = {{0, {', '.join(str(sum(tiles[: i + 1])) for i in range(len(tiles)))}}};\n"
        f"  for (int64_t t = 0; t < {sum(tiles)}; ++t)\n"
        f'    std::printf("%d\\n", int(cobra::find_site(first, {len(tiles)}, t)));\n}}\n'
    )
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Werror", "-I", CSRC, "main.cpp", "-o", "main"], check=True, cwd=tmp_path)
    printed = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True).stdout.split()
    assert [int(site) for site in printed] == [i for i, count in enumerate(tiles) for _ in range(count)]
