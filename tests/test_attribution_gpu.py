"""The Triton paths of the three attribution operations on the device they are for, bf16 too."""

import pytest
import torch

import cobra_kernels as k
from cobra.path import path_rule
from cobra_kernels.testing import assert_within_budget

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RULES = {
    "ends": path_rule("paper", "midpoint", 50).q,
    "neighbours": path_rule("conductance", "midpoint", 50).q,
    "dense": path_rule("conductance", "lobatto", 17).q,
    "more points than a tile": path_rule("conductance", "lobatto", 40).q,
}
SHAPES = {
    "gram": (4, 128, 512, 768),
    "gram, primes": (3, 67, 97, 131),
    "direct": (2, 1024, 256, 128),
    "one token": (5, 1, 64, 48),
}


def normal(*shape, dtype):
    return torch.randn(shape).to("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (8, 64, 4096)], ids=str)
def test_points(shape, dtype):
    x, baseline, alphas = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype), torch.linspace(0, 1, 9)
    points = k.interpolate_path(x, baseline, alphas, backend="triton")
    torch.testing.assert_close(points, k.interpolate_path_ref(x, baseline, alphas), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(points[: shape[0]], baseline.expand_as(x)) and torch.equal(points[-shape[0] :], x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", [(3, 7), (4, 65, 384)], ids=str)
def test_conductance_within_budget_and_bits_repeat(shape, rule, dtype):
    n, m = rule.shape
    draws = [(normal(m, *shape, dtype=dtype), normal(n, *shape, dtype=dtype)) for _ in range(4)]
    fast = [k.conductance_reduce(h, grad, rule, backend="triton") for h, grad in draws]
    ref = [k.conductance_reduce_ref(h, grad, rule) for h, grad in draws]
    assert_within_budget(fast, ref, [k.conductance_reduce_ref(h.double(), g.double(), rule.double()) for h, g in draws])
    assert torch.equal(fast[0], k.conductance_reduce(*draws[0], rule, backend="triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_norms_within_budget_and_bits_repeat(shape, dtype):
    B, T, K, N = shape
    draws = [(normal(B, T, K, dtype=dtype), normal(B, T, N, dtype=dtype)) for _ in range(4)]
    fast = [k.ghost_grad_norm(x, dy, backend="triton") for x, dy in draws]
    ref = [k.ghost_grad_norm_ref(x, dy) for x, dy in draws]
    assert_within_budget(fast, ref, [k.ghost_grad_norm_ref(x.double(), dy.double()) for x, dy in draws])
    assert torch.equal(fast[0], k.ghost_grad_norm(*draws[0], backend="triton"))
