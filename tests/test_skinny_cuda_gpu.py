"""The CUDA products of many tokens with a few ranks, on the device they are for."""

import pytest
import torch

from cobra_kernels import cuda_extension
from cobra_kernels.skinny_cuda import reduce, reduce_ref, shrink, shrink_ref
from cobra_kernels.testing import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(cuda_extension.load() is None, reason=f"no CUDA library: {cuda_extension.why_not()}"),
]

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = {  # T, D, r
    "one token": (1, 4096, 3),
    "primes, no row is aligned": (1009, 2053, 7),
    "all ranks": (300, 1024, 64),
    "planes": (4096, 1024, 16),
    "wide": (600, 11008, 32),
}


def operands(T, D, r, dtype, pad=0, seed=0):
    """x, h, matrix (D, r); with a pad as slices of larger buffers of NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = []
    for rows, columns, fan in ((T, D, 1), (T, r, T), (D, r, D)):
        buffer = torch.full((rows, columns + 2 * pad), float("nan"), dtype=dtype, device="cuda")
        buffer[:, pad : pad + columns] = torch.randn(rows, columns, generator=generator, device="cuda") / fan**0.5
        values.append(buffer[:, pad : pad + columns])
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_within_budget_and_bits_repeat(shape, dtype):
    x, h, matrix = operands(*shape, dtype)
    exact, exact_g = reduce_ref(x.double(), h.double(), matrix.double())
    small = shrink(x, matrix.t())
    assert_within_budget(small, shrink_ref(x, matrix.t()), exact_g, name="h")
    S, g = reduce(x, h, matrix)
    assert_within_budget(S, reduce_ref(x.float(), h.float())[0], exact, name="S")
    assert_within_budget(g, reduce_ref(x, h, matrix)[1], exact_g, name="g")
    again, again_g = reduce(x, h, matrix)
    assert torch.equal(S, again) and torch.equal(g, again_g) and torch.equal(small, shrink(x, matrix.t()))
    assert torch.equal(reduce(x, h)[0], S)


@pytest.mark.parametrize("pad", [1, 8])
def test_slices(pad):
    """Aligned rows within a buffer and unaligned ones: nothing beside them is read."""
    x, h, matrix = operands(70, 104, 16, torch.bfloat16, pad=pad)
    plain = [t.contiguous() for t in (x, h, matrix)]
    assert all(torch.equal(a, b) for a, b in zip(reduce(x, h, matrix), reduce(*plain), strict=True))
    assert torch.equal(shrink(x, matrix.t()), shrink(plain[0], plain[2].t()))


def test_runs_in_a_graph_and_on_another_stream():
    x, h, matrix = operands(300, 512, 16, torch.bfloat16)
    expected, expected_g = reduce(x, h, matrix)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found, _ = reduce(x, h, matrix)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_g = reduce(x, h, matrix)
    graph.replay()
    assert torch.equal(captured, expected) and torch.equal(captured_g, expected_g)
