import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cobra_kernels import ghost_grad_norm, ghost_grad_norm_ref
from cobra_kernels.ghost_grad_norm import prefers_gram
from cobra_kernels.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16]
GRAM = {"one token": (3, 1, 8, 5), "primes": (5, 3, 31, 17), "wide": (2, 6, 64, 96)}
DIRECT = {"many tokens": (3, 41, 8, 5), "one feature": (4, 7, 1, 13), "narrow": (2, 96, 16, 24)}
SHAPES = GRAM | DIRECT


def make_pair(B, T, K, N, dtype=torch.float64):
    return torch.randn(B, T, K).to(dtype), torch.randn(B, T, N).to(dtype)


def assert_norms_within_budget(draws):
    fast, ref = ([function(x, dy) for x, dy in draws] for function in (ghost_grad_norm, ghost_grad_norm_ref))
    assert_within_budget(fast, ref, [ghost_grad_norm_ref(x.double(), dy.double()) for x, dy in draws])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_shapes_lie_on_both_sides():
    assert all(prefers_gram(*shape[1:]) for shape in GRAM.values())
    assert not any(prefers_gram(*shape[1:]) for shape in DIRECT.values())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_per_example_gradients(shape):
    """Through autograd, one example at a time."""
    B, _, K, N = shape
    x, target = make_pair(*shape)
    weight = torch.randn(N, K, dtype=torch.float64)

    def loss(weight, x, target):
        return (torch.tanh(F.linear(x, weight)) - target).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight, x, target)
    y = F.linear(x, weight).requires_grad_()
    (dy,) = torch.autograd.grad((torch.tanh(y) - target).square().sum(), y)
    expected = gradients.reshape(B, -1).square().sum(1)
    torch.testing.assert_close(ghost_grad_norm(x, dy), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_within_budget(shape, dtype):
    assert ghost_grad_norm(*make_pair(*shape, dtype)).dtype == torch.float32
    assert_norms_within_budget([make_pair(*shape, dtype) for _ in range(4)])


@pytest.mark.parametrize("shape", [(2, 64, 384, 384), (2, 256, 192, 192)], ids=["gram", "direct"])
def test_sums_of_a_real_layer_within_budget(shape):
    """A hundred thousand positive terms, which a running sum in fp32 adds with ten times the error of torch's `sum`."""
    assert_norms_within_budget([make_pair(*shape, torch.float32) for _ in range(4)])


@settings(deadline=None, max_examples=50, derandomize=True)
@given(shape=st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(1, 12), st.integers(1, 12)))
def test_any_shape(shape):
    x, dy = make_pair(*shape)
    torch.testing.assert_close(ghost_grad_norm(x, dy), ghost_grad_norm_ref(x, dy), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("examples", [1, 2, 5])
@pytest.mark.parametrize("shape", [shape for name, shape in SHAPES.items() if name != "one token"], ids=str)
def test_chunks_change_nothing(shape, examples, monkeypatch):
    """Any number of examples at a time, also where it does not divide the batch."""
    _, T, K, N = shape
    x, dy = make_pair(7, T, K, N)
    whole = ghost_grad_norm(x, dy)
    per_example = T * T if prefers_gram(T, K, N) else K * N
    module = sys.modules["cobra_kernels.ghost_grad_norm"]
    sizes = []
    for name in ("_gram", "_direct"):
        form = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, dy, form=form: sizes.append(len(x)) or form(x, dy))
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", examples * per_example)
    torch.testing.assert_close(ghost_grad_norm(x, dy), whole, rtol=1e-12, atol=1e-12)
    assert max(sizes) == examples and sum(sizes) == 7


def test_gram_form_makes_no_gradient():
    """Nothing of the size of even one example's gradient, of which the reference makes B."""
    B, T, K, N = shape = 3, 4, 96, 128
    assert prefers_gram(T, K, N)
    x, dy = make_pair(*shape)
    with LargestTensor() as fast:
        ghost_grad_norm(x, dy)
    with LargestTensor() as ref:
        ghost_grad_norm_ref(x, dy)
    assert fast.elements <= max(x.numel(), dy.numel()) < K * N
    assert ref.elements >= B * K * N


def test_one_token_without_its_axis():
    x, dy = make_pair(5, 1, 8, 6)
    torch.testing.assert_close(ghost_grad_norm(x[:, 0], dy[:, 0]), ghost_grad_norm(x, dy), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (2, 0, 8)], ids=str)
def test_empty(shape):
    assert ghost_grad_norm(torch.ones(shape), torch.ones(*shape[:-1], 6)).tolist() == [0] * shape[0]


def test_zero_gradient_has_no_negative_norm():
    """Padded tokens repeat and a softmax's gradients sum to zero: rounding must not leave a square below zero."""
    x, dy = torch.randn(16, 1, 48).expand(16, 8, 48), torch.randn(16, 8, 48)
    assert prefers_gram(8, 48, 48)
    assert (ghost_grad_norm(x, dy - dy.mean(1, keepdim=True)) >= 0).all()


def test_tokens_of_no_gradient_do_not_count():
    """Padding: whatever x holds there."""
    x, dy = make_pair(3, 6, 32, 24)
    dy[:, 4:] = 0
    torch.testing.assert_close(ghost_grad_norm(x, dy), ghost_grad_norm(x[:, :4], dy[:, :4]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_strided_inputs(shape):
    B, T, K, N = shape
    x, dy = torch.randn(T, B, K).transpose(0, 1), torch.randn(B, T, 2 * N)[..., ::2]
    torch.testing.assert_close(ghost_grad_norm(x, dy), ghost_grad_norm(x.contiguous(), dy.contiguous()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_autocast_does_not_lower_the_sums(shape):
    x, dy = make_pair(*shape, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = ghost_grad_norm(x, dy)
    assert torch.equal(norms, ghost_grad_norm(x, dy))


def test_builds_no_graph():
    x, dy = (t.requires_grad_() for t in make_pair(2, 3, 8, 5))
    assert not ghost_grad_norm(x, dy).requires_grad


@pytest.mark.parametrize(("x", "dy"), [((2, 3, 4), (2, 4, 5)), ((2, 4), (3, 4)), ((4,), (5,)), ((2, 3, 4, 5), (2, 3, 4, 5))])
def test_shape_error(x, dy):
    with pytest.raises(ValueError, match=r"must be \(B, T, features\) or \(B, features\)"):
        ghost_grad_norm(torch.ones(x), torch.ones(dy))
