"""csrc/skinny.cu without a GPU: its kernels, compiled for the CPU and run thread by thread; and where its fragments lie."""

import shutil
import subprocess

import pytest
import torch
from cuda_host import CSRC, compile_for_host

from cobra_kernels import cuda_extension
from cobra_kernels.skinny_cuda import pick_planes, reduce, reduce_ref, shrink, shrink_ref
from cobra_kernels.testing import assert_within_budget

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = {  # T, D, r
    "one token": (1, 24, 3),
    "primes, no row is aligned": (67, 101, 7),
    "all ranks": (70, 264, 64),
    "several stages and planes": (130, 1100, 17),
    "columns end within a stage": (64, 328, 16),
    "planes of tokens": (1025, 40, 8),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compile_for_host("skinny.cu", tmp_path_factory.mktemp("host"))


@pytest.fixture(autouse=True)
def on_host(host, monkeypatch):
    monkeypatch.setattr(cuda_extension, "require", lambda *_: host)


def operands(T, D, r, dtype, pad=0, seed=0):
    """x, h, matrix (D, r); with a pad as slices of larger buffers of NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for rows, columns, fan in ((T, D, 1), (T, r, T), (D, r, D)):
        buffer = torch.full((rows, columns + 2 * pad), float("nan"), dtype=dtype)
        buffer[:, pad : pad + columns] = torch.randn(rows, columns, generator=generator) / fan**0.5
        values.append(buffer[:, pad : pad + columns])
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shrink_within_budget(shape, dtype):
    draws = [operands(*shape, dtype, seed=seed) for seed in range(2)]
    fast = [shrink(x, matrix.t().contiguous()) for x, _, matrix in draws]
    assert fast[0].dtype == dtype
    ref = [shrink_ref(x, matrix.t()) for x, _, matrix in draws]
    assert_within_budget(fast, ref, [shrink_ref(x.double(), matrix.t().double()) for x, _, matrix in draws])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reduce_within_budget(shape, dtype):
    """S is held to the error of fp32 sums, g to torch's in its own dtype; without a matrix S has the same bits."""
    x, h, matrix = operands(*shape, dtype)
    S, g = reduce(x, h, matrix)
    exact, exact_g = reduce_ref(x.double(), h.double(), matrix.double())
    assert_within_budget(S, reduce_ref(x.float(), h.float())[0], exact, name="S")
    assert_within_budget(g, reduce_ref(x, h, matrix)[1], exact_g, name="g")
    alone, nothing = reduce(x, h)
    assert nothing is None and torch.equal(alone, S)


@pytest.mark.parametrize("pad", [1, 8])
def test_slices(pad):
    """Aligned rows within a buffer and unaligned ones: nothing beside them is read."""
    x, h, matrix = operands(70, 104, 16, torch.bfloat16, pad=pad)
    plain = [t.contiguous() for t in (x, h, matrix)]
    assert all(torch.equal(a, b) for a, b in zip(reduce(x, h, matrix), reduce(*plain), strict=True))
    assert torch.equal(shrink(x, matrix.t()), shrink(plain[0], plain[2].t()))


def test_empty():
    x, h, matrix = operands(0, 24, 3, torch.bfloat16)
    S, g = reduce(x, h, matrix)
    assert S.shape == (24, 3) and (S == 0).all() and g.shape == (0, 3)
    x, h, matrix = operands(5, 24, 0, torch.bfloat16)
    assert shrink(x, matrix.t()).shape == (5, 0) and reduce(x, h)[0].shape == (24, 0)


def test_refuses():
    x, h, matrix = operands(5, 24, 3, torch.bfloat16)
    with pytest.raises(ValueError, match="at most 64 ranks, not 65"):
        shrink(x, torch.zeros(65, 24, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"matrix is \(24, 3\), expected \(24, 24\)"):
        shrink(x, matrix)
    with pytest.raises(ValueError, match=r"h is torch.float32 and x torch.bfloat16"):
        reduce(x, h.float())


def test_asks_for_a_device(monkeypatch):
    monkeypatch.undo()
    x, _, matrix = operands(5, 24, 3, torch.bfloat16)
    with pytest.raises(RuntimeError, match="backend='cuda' needs CUDA tensors"):
        shrink(x, matrix.t())


@pytest.mark.parametrize(("blocks", "length"), [(1, 1), (1, 511), (1, 100_000), (128, 4096), (300, 11008), (16, 8192)])
def test_planes_cover_the_sum(blocks, length):
    count, size = pick_planes(blocks, length)
    assert size % 64 == 0 and (count - 1) * size < length <= count * size
    assert count == 1 or (size >= 512 and count * blocks <= 264 + blocks)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("pieces", [2, 4, 8, 32])
def test_fragments_share_no_bank(pieces, tmp_path):
    """csrc/cuda_mma.h: every piece has a place of its own, and eight rows at one piece fill the 32 banks once."""
    (tmp_path / "main.cpp").write_text(
        '#include "cuda_mma.h"\n#include <cstdio>\nint main() {\n'
        f"  for (int row = 0; row < 64; ++row)\n    for (int piece = 0; piece < {pieces}; ++piece)\n"
        f'      std::printf("%d\\n", cobra::place<{pieces}>(row, piece));\n}}\n'
    )
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Werror", "-I", CSRC, "main.cpp", "-o", "main"], check=True, cwd=tmp_path)
    printed = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True).stdout.split()
    places = torch.tensor([int(place) for place in printed]).view(64, pieces)
    assert places.flatten().sort().values.tolist() == list(range(64 * pieces))
    banks = places.view(8, 8, pieces) % 8
    assert (banks.sort(1).values == torch.arange(8)[None, :, None]).all()
