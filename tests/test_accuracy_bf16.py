"""Products of bf16 matrices by way of fp32: rounded once, and the operators are as before after them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.accuracy import bf16
from bench.accuracy.bf16 import bf16_products

A, B, C = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((5, 24), (24, 7), (5, 7)))
BATCH_A, BATCH_B, BATCH_C = (torch.stack([tensor, -tensor]) for tensor in (A, B, C))

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "mm": lambda a, b, c: a @ b,
    "linear": lambda a, b, c: linear(a, b.t(), c[0]),
    "addmm": lambda a, b, c: torch.addmm(c, a, b, beta=0.5, alpha=2.0),
    "addmm_": lambda a, b, c: c.clone().addmm_(a, b, alpha=2.0),
}
BATCHED: dict[str, Callable[..., Tensor]] = {
    "bmm": lambda a, b, c: a @ b,
    "baddbmm": lambda a, b, c: torch.baddbmm(c, a, b, alpha=0.5),
    "baddbmm_": lambda a, b, c: c.clone().baddbmm_(a, b),
}
CASES = [(f, (A, B, C)) for f in FUNCTIONS.values()] + [(f, (BATCH_A, BATCH_B, BATCH_C)) for f in BATCHED.values()]
NAMES = [*FUNCTIONS, *BATCHED]


@pytest.fixture(autouse=True)
def lacking(monkeypatch):
    """A processor without the instructions, whatever this one has."""
    monkeypatch.setattr(bf16, "is_needed", lambda: True)


@pytest.mark.parametrize(("function", "operands"), CASES, ids=NAMES)
def test_a_product_is_rounded_once(function, operands):
    rounded = [operand.bfloat16() for operand in operands]
    with bf16_products():
        found = function(*rounded)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, function(*(operand.float() for operand in rounded)).bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.parametrize(("function", "operands"), CASES, ids=NAMES)
def test_fp32_is_left_alone(function, operands):
    expected = function(*operands)
    with bf16_products():
        assert torch.equal(function(*operands), expected)


def test_gradients_go_the_same_way():
    """Also those of autocast, whose backward runs in threads of its own."""

    def gradient() -> Tensor:
        weight = A.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (weight @ B).float().square().sum().backward()
        return weight.grad

    expected = gradient()
    with bf16_products():
        torch.testing.assert_close(gradient(), expected, rtol=2**-6, atol=2**-6)


def test_errors_are_torchs_own():
    with bf16_products(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        A.bfloat16() @ A.bfloat16()


def test_operators_are_as_before_after_an_error(monkeypatch):
    widened = []
    monkeypatch.setattr(bf16, "_by_fp32", lambda name: lambda keyset, a, b, *c, **scales: widened.append(name) or a.new_ones(1))
    with pytest.raises(ZeroDivisionError), bf16_products():
        assert torch.equal(A @ B, torch.ones(1))
        raise ZeroDivisionError
    assert widened == ["mm"]
    assert (A @ B).shape == (5, 7) and widened == ["mm"]


def test_a_processor_that_has_them_uses_its_own(monkeypatch):
    monkeypatch.setattr(bf16, "is_needed", lambda: False)
    monkeypatch.setattr(bf16, "_by_fp32", lambda name: pytest.fail(f"{name} was replaced"))
    with bf16_products():
        A.bfloat16() @ B.bfloat16()
