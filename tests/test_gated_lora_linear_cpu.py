"""The compiled products with a small side: against fp64, on every instruction set, for any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cobra_kernels import extension
from cobra_kernels import gated_lora_linear_cpu as cpu
from cobra_kernels.testing import assert_within_budget

SHAPES = {  # T, D, r
    "one element": (1, 1, 1),
    "one token": (1, 70, 5),
    "one feature": (37, 1, 3),
    "primes": (101, 211, 7),
    "whole registers": (96, 128, 16),
    "sums of several blocks": (600, 1100, 8),
    "r = 9": (53, 64, 9),
    "r = 33": (50, 70, 33),
    "r = 1024": (13, 40, 1024),
    "no tokens": (0, 12, 4),
}
pytestmark = pytest.mark.skipif(extension.load() is None, reason="the compiled extension was not built")


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Below the sizes that are worth a compiled product too."""
    monkeypatch.setattr(cpu, "LEAST_TOKENS", 0)
    monkeypatch.setattr(cpu, "MOST_RANK", 2**16)


def compiled(function, a, b):
    """The function's result, which torch's products had no part in."""
    assert cpu._is_compiled(a, b)
    return function(a, b)


def draws(*sizes):
    """Several pairs of matrices of these sizes."""
    return [[torch.randn(*size) for size in sizes] for _ in range(6)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shrink_within_budget(shape, level):
    T, D, r = shape
    several = draws((T, D), (r, D))
    fast = [compiled(cpu.shrink, x, matrix) for x, matrix in several]
    assert_within_budget(fast, [x @ m.t() for x, m in several], [x.double() @ m.double().t() for x, m in several])
    turned = [cpu.shrink(x, matrix.t().contiguous().t()) for x, matrix in several]
    assert all(map(torch.equal, fast, turned))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reduce_within_budget(shape, level):
    T, D, r = shape
    several = draws((T, r), (T, D))
    fast = [compiled(cpu.reduce, h, x) for h, x in several]
    assert_within_budget(fast, [h.t() @ x for h, x in several], [h.double().t() @ x.double() for h, x in several])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, 300), st.integers(1, 150), st.integers(1, 40), st.integers(0, 2**16))
def test_sums_without_rounding_are_exact(T, D, r, seed):
    """Whole numbers, in slices of larger tensors that hold NaN beside them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, columns):
        whole = torch.full((rows + 1, columns + 3), float("nan"))
        whole[:rows, 2:-1] = torch.randint(-8, 9, (rows, columns), generator=generator).float()
        return whole[:rows, 2:-1]

    x, matrix, h = draw(T, D), draw(r, D), draw(T, r)
    assert torch.equal(compiled(cpu.shrink, x, matrix), x @ matrix.t())
    assert torch.equal(compiled(cpu.reduce, h, x), h.t() @ x)


def test_bits_do_not_depend_on_threads():
    x, matrix, h = torch.randn(700, 900), torch.randn(11, 900), torch.randn(700, 11)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 64):
            torch.set_num_threads(threads)
            results.append((cpu.shrink(x, matrix), cpu.reduce(h, x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("place", ["x", "small"])
def test_not_finite_stays_where_it_belongs(place, level):
    """A NaN in one row touches the rows and columns that it enters into, and the padding of registers no other."""
    x, matrix, h = torch.randn(50, 70), torch.randn(5, 70), torch.randn(50, 5)
    for t in (x,) if place == "x" else (matrix, h):
        t[3, 4] = float("nan")
    for found, expected in ((cpu.shrink(x, matrix), x @ matrix.t()), (cpu.reduce(h, x), h.t() @ x)):
        assert torch.equal(found.isnan(), expected.isnan())


def test_torch_takes_what_is_not_compiled(monkeypatch):
    """Half precision, fp64, tensors without adjacent features."""
    monkeypatch.setattr(extension, "load", lambda: pytest.fail("compiled"))
    for dtype in (torch.bfloat16, torch.float64):
        x, matrix, h = torch.randn(20, 30, dtype=dtype), torch.randn(4, 30, dtype=dtype), torch.randn(20, 4, dtype=dtype)
        assert torch.equal(cpu.shrink(x, matrix), x @ matrix.t())
        assert torch.equal(cpu.reduce(h, x), h.t() @ x)
    monkeypatch.undo()
    x, matrix, h = torch.randn(30, 20).t(), torch.randn(4, 30), torch.randn(20, 4)
    torch.testing.assert_close(cpu.shrink(x, matrix), x.contiguous() @ matrix.t())
    torch.testing.assert_close(cpu.reduce(h, x), h.t() @ x)


def test_small_and_wide_products_are_left_to_blas(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "_is_compiled", lambda a, b: pytest.fail("compiled"))
    for T, r in ((cpu.LEAST_TOKENS - 1, 8), (200, cpu.MOST_RANK + 1)):
        x, matrix, h = torch.randn(T, 30), torch.randn(r, 30), torch.randn(T, r)
        assert torch.equal(cpu.shrink(x, matrix), x @ matrix.t())
        assert torch.equal(cpu.reduce(h, x), h.t() @ x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_defaults_of_torch_do_not_reach_the_result(dtype, monkeypatch):
    x, matrix, h = torch.randn(200, 30), torch.randn(4, 30), torch.randn(200, 4)
    expected = cpu.shrink(x, matrix), cpu.reduce(h, x)
    monkeypatch.setattr(torch, "empty", torch._C._VariableFunctions.empty)  # the poisoned one has no dtype of its own
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            found = cpu.shrink(x, matrix), cpu.reduce(h, x)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_views_that_are_no_plain_numbers():
    """Conjugates and zeros that exist in name alone, and what counts or traces operations."""
    x, matrix = torch.randn(200, 30), torch.randn(4, 30)
    torch.testing.assert_close(cpu.shrink(torch._neg_view(x), matrix), -x @ matrix.t())
    assert not cpu.shrink(torch._efficientzerotensor(200, 30), matrix).any()
    with FlopCounterMode(display=False) as counter:
        cpu.shrink(x, matrix)
    assert counter.get_total_flops() == 2 * 200 * 30 * 4
