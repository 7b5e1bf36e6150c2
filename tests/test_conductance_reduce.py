import pytest
import torch

from cobra_kernels import conductance_reduce, conductance_reduce_cpu, conductance_reduce_ref
from cobra_kernels.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POINTS = 5


def differences() -> torch.Tensor:
    """Row i turns h into h_{i+1} - h_i; the last row is unused."""
    q = torch.diag(torch.ones(POINTS - 1), 1) - torch.eye(POINTS)
    q[-1] = 0
    return q


def sliced(t: torch.Tensor) -> torch.Tensor:
    """The same numbers cut out of a larger buffer of NaN."""
    buffer = t.new_full((*t.shape[:-1], t.shape[-1] + 5), float("nan"))
    buffer[..., 2:-3] = t
    return buffer[..., 2:-3]


RULES = {"dense": torch.linspace(-1, 1, POINTS**2).view(POINTS, POINTS).sin(), "differences": differences()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 6), (1, 1), (2, 3, 2, 4)], ids=str)
def test_within_budget(shape, rule, dtype):
    draws, q = torch.randn(4, 2, POINTS, *shape).to(dtype), RULES[rule]
    fast, ref = ([function(h, grad, q) for h, grad in draws] for function in (conductance_reduce, conductance_reduce_ref))
    assert fast[0].dtype == torch.float32
    assert_within_budget(fast, ref, [conductance_reduce_ref(h, grad, q.double()) for h, grad in draws.double()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 67), (2, 9001)], ids=str)
def test_every_instruction_set_within_budget(shape, dtype, level):
    """Remainders of a register, of a block and of a strip, out of larger buffers; more points of h than of the gradient."""
    q = RULES["dense"][:2]
    draws = [(sliced(torch.randn(POINTS, *shape).to(dtype)), sliced(torch.randn(2, *shape).to(dtype))) for _ in range(4)]
    fast, ref = ([function(h, grad, q) for h, grad in draws] for function in (conductance_reduce, conductance_reduce_ref))
    assert_within_budget(fast, ref, [conductance_reduce_ref(h.double(), grad.double(), q.double()) for h, grad in draws])


def test_threads_change_no_bit():
    h, grad = torch.randn(2, POINTS, 3, 20_000)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(conductance_reduce(h, grad, RULES["dense"]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", RULES)
def test_without_the_extension(rule, monkeypatch):
    h, grad = torch.randn(2, POINTS, 3, 40)
    compiled = conductance_reduce(h, grad, RULES[rule])
    monkeypatch.setattr(conductance_reduce_cpu.extension, "load", lambda: None)
    torch.testing.assert_close(conductance_reduce(h, grad, RULES[rule]), compiled)


@pytest.mark.parametrize("built", [True, False])
def test_a_weight_on_differences_loses_no_digit(built, monkeypatch):
    """A part of a difference is taken after it, with and without the extension."""
    if not built:
        monkeypatch.setattr(conductance_reduce_cpu.extension, "load", lambda: None)
    h = 1e4 + torch.arange(POINTS)[:, None, None] * 1e-2 + torch.zeros(POINTS, 3, 64)
    grad, q = torch.randn(POINTS, 3, 64), 0.3 * differences()
    oracle = conductance_reduce_ref(h.double(), grad.double(), q.double())
    torch.testing.assert_close(conductance_reduce(h, grad, q).double(), oracle, rtol=1e-5, atol=1e-5)


def test_sums_as_it_is_written():
    """The double sum over points, by loops."""
    h, grad = torch.randn(2, POINTS, 3, 7, dtype=torch.float64)
    q = RULES["dense"].double()
    terms = (q[i, j] * (grad[i] * h[j]).sum(1) for i in range(POINTS) for j in range(POINTS))
    torch.testing.assert_close(conductance_reduce(h, grad, q), sum(terms), rtol=1e-12, atol=1e-12)


def test_differences_keep_their_digits():
    """Neighbouring points are nearly equal: what is common to them must cancel before anything is multiplied."""
    h = 1e4 + torch.arange(POINTS)[:, None, None] * 1e-2 + torch.zeros(POINTS, 3, 64)
    grad = torch.randn(POINTS, 3, 64)
    fast, ref = (function(h, grad, differences()) for function in (conductance_reduce, conductance_reduce_ref))
    oracle = conductance_reduce_ref(h.double(), grad.double(), differences().double())
    torch.testing.assert_close(fast.double(), oracle, rtol=1e-5, atol=1e-5)
    assert (fast - oracle).abs().max() < (ref - oracle).abs().max() / 10


def test_unmoved_layer_has_none():
    """Exactly zero where the layer does not change along the path, whatever the gradients."""
    h = torch.randn(1, 3, 8).expand(POINTS, 3, 8)
    assert not conductance_reduce(h, torch.randn(POINTS, 3, 8), differences()).any()


def test_complete_for_a_linear_function():
    """F = ⟨w, h⟩ has the constant gradient w, and the differences telescope to F(x) - F(x0)."""
    h, w = torch.randn(POINTS, 3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    attribution = conductance_reduce(h, w.expand_as(h), differences())
    torch.testing.assert_close(attribution, (h[-1] - h[0]) @ w, rtol=1e-12, atol=1e-12)


def test_linear_in_every_argument():
    (h, k), (grad, e) = torch.randn(2, 2, POINTS, 3, 8, dtype=torch.float64)
    q, p = (rule.double() for rule in RULES.values())

    def close(joint, *parts):
        torch.testing.assert_close(joint, 2 * parts[0] - parts[1], rtol=1e-12, atol=1e-12)

    close(conductance_reduce(2 * h - k, grad, q), conductance_reduce(h, grad, q), conductance_reduce(k, grad, q))
    close(conductance_reduce(h, 2 * grad - e, q), conductance_reduce(h, grad, q), conductance_reduce(h, e, q))
    close(conductance_reduce(h, grad, 2 * q - p), conductance_reduce(h, grad, q), conductance_reduce(h, grad, p))


def test_gradient_at_an_unused_point_is_not_read():
    """A rule's zero rows are left out, not multiplied: a gradient that overflowed there does no harm."""
    h, grad = torch.randn(2, POINTS, 3, 8)
    expected = conductance_reduce(h, grad, differences())
    grad[-1] = float("nan")
    assert torch.equal(conductance_reduce(h, grad, differences()), expected)


def test_no_rule_no_conductance():
    h = torch.randn(POINTS, 3, 8, dtype=torch.bfloat16)
    out = conductance_reduce(h, h, torch.zeros(POINTS, POINTS))
    assert out.dtype == torch.float32 and out.tolist() == [0, 0, 0]


def test_strided_inputs():
    h, grad = torch.randn(3, POINTS, 16).transpose(0, 1), torch.randn(POINTS, 3, 32)[..., ::2]
    dense = conductance_reduce(h.contiguous(), grad.contiguous(), RULES["dense"])
    torch.testing.assert_close(conductance_reduce(h, grad, RULES["dense"]), dense)


def test_autocast_does_not_lower_the_sums():
    h, grad = torch.randn(2, POINTS, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conductance_reduce(h, grad, RULES["dense"])
    assert torch.equal(out, conductance_reduce(h, grad, RULES["dense"]))


@pytest.mark.parametrize("shape", [(0, 7), (0, 4, 7), (2, 0, 7)], ids=str)
def test_empty(shape):
    h = torch.ones(POINTS, *shape)
    assert conductance_reduce(h, h, RULES["dense"]).tolist() == [0] * shape[0]


@pytest.mark.parametrize(("grad", "q"), [((5, 3, 7), (5, 5)), ((5, 3, 8), (4, 5)), ((5, 3, 8), (5,))], ids=str)
def test_shape_error(grad, q):
    with pytest.raises(ValueError, match=r"h \(5, 3, 8\)"):
        conductance_reduce(torch.ones(5, 3, 8), torch.ones(grad), torch.ones(q))
