"""The Triton paths of the three attribution operations through Triton's interpreter."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted_copy

import cobra_kernels as k
from cobra.path import path_rule
from cobra_kernels.testing import assert_within_budget

DTYPES = [torch.float32, torch.float16]  # the interpreter's bf16 product is wrong
NAMES = ("interpolate_path", "conductance_reduce", "ghost_grad_norm")


@pytest.fixture(scope="module", autouse=True)
def triton_path():
    """Kernels are interpreted copies, and a CPU passes for a device; all else is what a GPU runs."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setitem(import_module("sys").modules, f"cobra_kernels.{name}_triton", interpreted_copy(f"{name}_triton"))
            patch.setattr(import_module(f"cobra_kernels.{name}"), "require_triton", lambda x: None)
        yield


def launcher(name):
    return import_module("sys").modules[f"cobra_kernels.{name}_triton"]


def sliced(t):
    """The same numbers cut out of a larger buffer of NaN."""
    buffer = t.new_full((*t.shape[:-1], t.shape[-1] + 5), float("nan"))
    buffer[..., 2:-3] = t
    return buffer[..., 2:-3]


# interpolate_path

ALPHAS = torch.tensor([0.0, 0.01, 0.3, 0.5, 0.7, 0.99, 1.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("baseline", [(), (7,), (5, 7), (1, 5, 7), (3, 5, 7)], ids=str)
def test_points_are_those_of_torch(baseline, dtype):
    x, baseline = sliced(torch.randn(3, 5, 7).to(dtype)), torch.randn(baseline).to(dtype)
    points = k.interpolate_path(x, baseline, ALPHAS, backend="triton")
    assert points.dtype == dtype and points.is_contiguous()
    torch.testing.assert_close(points, k.interpolate_path(x, baseline, ALPHAS), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_end_points_are_exact(dtype):
    x, baseline = torch.randn(3, 300).to(dtype), 1e4 * torch.randn(3, 300).to(dtype)
    assert torch.equal(k.interpolate_path(x, baseline, torch.tensor([0.0, 1.0]), backend="triton"), torch.cat((baseline, x)))


@settings(deadline=None, max_examples=15, derandomize=True)
@given(shape=st.lists(st.integers(0, 6), min_size=1, max_size=4), points=st.integers(0, 4))
def test_points_of_any_shape(shape, points):
    x, baseline, alphas = torch.randn(shape), torch.randn(shape[-1:] if len(shape) > 1 else ()), torch.rand(points)
    torch.testing.assert_close(
        k.interpolate_path(x, baseline, alphas, backend="triton"), k.interpolate_path_ref(x, baseline, alphas)
    )


# conductance_reduce


def random_rule(n, m):
    return torch.linspace(-1, 1, n * m).view(n, m).sin()


RULES = {
    "ends": path_rule("paper", "midpoint", 5).q,
    "ends, all rows": path_rule("paper", "lobatto", 5).q,
    "neighbours": path_rule("conductance", "midpoint", 6).q,
    "one row of neighbours": path_rule("conductance", "midpoint", 1).q,
    "two intervals": path_rule("conductance", "trapezoid", 5).q,
    "dense": path_rule("conductance", "lobatto", 7).q,
    "rows apart": torch.tensor([[-1.0, 1.0, 0], [0, 0, 0], [0, -1.0, 1.0]]),
    "points of their own": torch.tensor([[-0.3, 0.3], [-0.1, 0.1], [-0.6, 0.6]]),
    "more points than a tile": random_rule(34, 37),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 67, 5)], ids=str)
def test_conductance_within_budget(shape, rule, dtype):
    n, m = rule.shape
    draws = [(sliced(torch.randn(m, *shape).to(dtype)), sliced(torch.randn(n, *shape).to(dtype))) for _ in range(3)]
    fast = [k.conductance_reduce(h, grad, rule, backend="triton") for h, grad in draws]
    ref = [k.conductance_reduce_ref(h, grad, rule) for h, grad in draws]
    assert fast[0].dtype == torch.float32
    assert_within_budget(fast, ref, [k.conductance_reduce_ref(h.double(), g.double(), rule.double()) for h, g in draws])


@pytest.mark.parametrize("rule", ["ends", "neighbours", "two intervals"])
def test_conductance_keeps_the_digits_of_differences(rule):
    points = len(RULES[rule])
    h = 1e4 + torch.arange(points)[:, None, None] * 1e-2 + torch.zeros(points, 3, 64)
    grad = torch.randn(points, 3, 64)
    oracle = k.conductance_reduce_ref(h.double(), grad.double(), RULES[rule].double())
    found = k.conductance_reduce(h, grad, RULES[rule], backend="triton")
    torch.testing.assert_close(found.double(), oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["ends", "neighbours", "rows apart"])
def test_conductance_reads_no_gradient_at_an_unused_point(rule):
    q = RULES[rule]
    h, grad = torch.randn(2, len(q), 3, 8)
    expected = k.conductance_reduce(h, grad, q, backend="triton")
    grad[q.abs().sum(1) == 0] = float("nan")
    assert torch.equal(k.conductance_reduce(h, grad, q, backend="triton"), expected)


def test_forms_of_the_rules():
    pairs_of = launcher("conductance_reduce").pairs_of
    found = {name: pairs_of(tuple(map(tuple, rule.tolist()))) for name, rule in RULES.items()}
    assert {name for name, pairs in found.items() if pairs and not pairs.neighbours} >= {"ends", "ends, all rows"}
    assert found["neighbours"].neighbours and found["points of their own"].scales == pytest.approx((0.3, 0.1, 0.6))
    assert not any(found[name] for name in ("two intervals", "dense", "rows apart"))


@settings(deadline=None, max_examples=15, derandomize=True)
@given(n=st.integers(0, 4), m=st.integers(1, 4), shape=st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_conductance_of_any_shape(n, m, shape):
    h, grad, q = torch.randn(m, *shape), torch.randn(n, *shape), random_rule(n, m)
    expected = k.conductance_reduce_ref(*(t.double().unsqueeze(-1) for t in (h, grad)), q.double())
    found = k.conductance_reduce(h, grad, q, backend="triton")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


# ghost_grad_norm

SHAPES = {
    "gram, one token": (3, 1, 8, 5),
    "gram, primes": (2, 5, 97, 131),
    "gram, an odd number of tiles": (1, 67, 160, 176),
    "gram, wide": (1, 70, 192, 256),
    "direct, many tokens": (1, 300, 8, 5),
    "gram, one feature": (2, 7, 1, 13),
    "direct, several tiles": (2, 130, 66, 70),
    "direct, wide": (1, 200, 128, 128),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_norms_within_budget(name, dtype):
    B, T, K, N = SHAPES[name]
    draws = [(torch.randn(B, T, K).to(dtype), torch.randn(B, T, N).to(dtype)) for _ in range(3)]
    cut = torch.Tensor.contiguous if "wide" in name else sliced
    fast = [k.ghost_grad_norm(cut(x), cut(dy), backend="triton") for x, dy in draws]
    ref = [k.ghost_grad_norm_ref(x, dy) for x, dy in draws]
    assert_within_budget(fast, ref, [k.ghost_grad_norm_ref(x.double(), dy.double()) for x, dy in draws])


def test_shapes_take_both_forms():
    module = launcher("ghost_grad_norm")
    for name, (_, T, K, N) in SHAPES.items():
        assert module.prefers_gram(T, K, N, wide="wide" in name) == name.startswith("gram"), name


@settings(deadline=None, max_examples=15, derandomize=True)
@given(shape=st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(1, 40), st.integers(0, 40)))
def test_norms_of_any_shape(shape):
    B, T, K, N = shape
    x, dy = torch.randn(B, T, K), torch.randn(B, T, N)
    torch.testing.assert_close(k.ghost_grad_norm(x, dy, backend="triton"), k.ghost_grad_norm_ref(x, dy), rtol=1e-4, atol=1e-4)


def test_norm_is_not_negative():
    x, dy = torch.randn(16, 1, 48).expand(16, 8, 48), torch.randn(16, 8, 48)
    assert (k.ghost_grad_norm(x, dy - dy.mean(1, keepdim=True), backend="triton") >= 0).all()
