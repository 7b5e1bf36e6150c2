import pytest
import torch

from cobra_kernels import concrete_gates, concrete_gates_ref, extension, gate_noise, sample_gates, sample_gates_ref
from cobra_kernels.philox import noise_of_words

DRAW = dict(seed=3, step=5, temperature=0.5)


def test_same_arguments_same_bits():
    """Whatever the global generator did in between."""
    logits = torch.randn(7, 13)
    first = sample_gates(logits, **DRAW)
    torch.rand(3)
    assert torch.equal(sample_gates(logits, **DRAW), first)
    assert torch.equal(sample_gates_ref(logits, **DRAW), first)


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 6}, {"first_site": 7}], ids=str)
def test_another_draw_differs_everywhere(change):
    logits = torch.zeros(7, 13)
    assert (sample_gates(logits, **DRAW) != sample_gates(logits, **DRAW | change)).all()


def test_rows_are_sites():
    """A model split over devices draws its part of the sites alone and gets the same gates."""
    logits = torch.randn(7, 13)
    whole = sample_gates(logits, **DRAW)
    assert torch.equal(sample_gates(logits[4:], **DRAW, first_site=4), whole[4:])


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 0.7])
def test_open_probability_is_the_sigmoid_at_every_temperature(logit, temperature):
    draws = 400 * 256
    z = sample_gates(torch.full((400, 256), logit), seed=11, step=0, temperature=temperature)
    alpha = torch.sigmoid(torch.tensor(logit)).item()
    standard_error = (alpha * (1 - alpha) / draws) ** 0.5
    assert abs((z > 0.5).double().mean().item() - alpha) < 4 * standard_error


def test_low_temperature_makes_gates_hard():
    soft, hard = (sample_gates(torch.zeros(50, 64), seed=0, step=0, temperature=t) for t in (1.0, 0.01))
    assert ((hard - (soft > 0.5).float()).abs() < 0.01).double().mean() > 0.95


def test_uniforms_are_uniform():
    """Kolmogorov-Smirnov over sites, ranks and steps at once: D sqrt(n) exceeds 1.95 once in a thousand."""
    u = torch.cat([torch.sigmoid(gate_noise(100, 64, seed=1, step=step).double()).flatten() for step in range(20)])
    n = u.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    u = u.sort().values
    distance = torch.maximum((u - steps[:-1]).max(), (steps[1:] - u).max())
    assert distance * n**0.5 < 1.95


def test_neighbours_are_uncorrelated():
    """In rank, site, step and seed: the axes of the counter and the key."""
    noise = torch.stack([gate_noise(120, 120, seed=seed, step=step).double() for seed, step in ((0, 0), (0, 1), (1, 0))])
    here = noise[0, :-1, :-1]
    for there in (noise[0, :-1, 1:], noise[0, 1:, :-1], noise[1, :-1, :-1], noise[2, :-1, :-1]):
        correlation = torch.corrcoef(torch.stack((here.flatten(), there.flatten())))[0, 1]
        assert abs(correlation) < 4 / here.numel() ** 0.5


def test_extreme_words_stay_inside_the_unit_interval():
    """u is never 0 or 1, so the noise is finite for every word, and symmetric."""
    low, high = noise_of_words(torch.tensor([0, 2**32 - 1])).tolist()
    assert -17.4 < low == -high < -17.3


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_gradient_matches_autograd_of_the_reference(temperature):
    noise = gate_noise(31, 17, seed=2, step=0)
    logits = torch.randn(31, 17).requires_grad_()
    dz = torch.randn(31, 17)
    (fast,) = torch.autograd.grad(concrete_gates(logits, noise, torch.tensor(temperature)), logits, dz)
    exact = logits.detach().double().requires_grad_()
    (oracle,) = torch.autograd.grad(concrete_gates_ref(exact, noise, temperature), exact, dz.double())
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast.double(), oracle, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: sample_gates(a, **DRAW), logits)


NOISE = gate_noise(3, 5, seed=2, step=0)
CALLS = [
    pytest.param(lambda function, a: function(a, NOISE, torch.tensor(0.5)), concrete_gates, concrete_gates_ref, id="noise"),
    pytest.param(lambda function, a: function(a, **DRAW), sample_gates, sample_gates_ref, id="drawn"),
]


@pytest.mark.parametrize(("call", "function", "reference"), CALLS)
def test_double_backward_is_refused(call, function, reference):
    """Of a sum, too, whose gradient has no graph: a gradient penalty would be silently wrong."""
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{function.__name__} has no second derivative, .* use {reference.__name__}"):
        torch.autograd.grad(call(function, logits).sum(), logits, create_graph=True)
    assert torch.autograd.gradgradcheck(lambda a: call(reference, a), logits)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad], ids=["vmap", "grad"])
@pytest.mark.parametrize(("call", "function", "_"), CALLS)
def test_functional_transforms_are_refused(call, function, _, transform):
    """By name, and the way out is one."""
    batch = torch.randn(2, 3, 5) if transform is torch.vmap else torch.randn(3, 5)
    with pytest.raises(RuntimeError, match=f"{function.__name__} has no rule for torch.func's .* use concrete_gates_ref"):
        transform(lambda a: call(function, a).sum())(batch)
    found = transform(lambda a: concrete_gates_ref(a, NOISE, 0.5).sum())(batch)
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_of_the_logits_is_kept(dtype):
    """fp64 logits see the same fp32 noise: both runs train with the same gates."""
    logits = torch.linspace(-3, 3, 12).view(3, 4)
    z = sample_gates(logits.to(dtype), **DRAW)
    assert z.dtype == dtype
    torch.testing.assert_close(z.float(), sample_gates(logits, **DRAW), rtol=0, atol=0)


def test_saturated_logits_give_gates_of_exactly_0_and_1_and_finite_gradients():
    logits = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    z = sample_gates(logits, seed=0, step=0, temperature=0.1)
    z.sum().backward()
    assert z.tolist() == [[0, 1]] and logits.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_rejects_temperature(temperature):
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        sample_gates(torch.zeros(2, 3), seed=0, step=0, temperature=temperature)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)], ids=str)
def test_rejects_shape(shape):
    with pytest.raises(ValueError, match=r"must be \(sites, ranks\)"):
        sample_gates(torch.zeros(shape), **DRAW)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_no_gates(shape):
    assert sample_gates(torch.zeros(shape), **DRAW).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    logits, dz = torch.randn(2, 3, 5, dtype=dtype)
    operands = (logits, gate_noise(3, 5, seed=2, step=0).to(dtype), torch.tensor(0.3), -0.1, 1.1)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.cobra.concrete_gates.default, operands, test_utils=tests)
    torch.library.opcheck(torch.ops.cobra.concrete_gates_backward.default, (dz, *operands), test_utils=tests)


@pytest.mark.parametrize("stretch", [None, (-0.1, 1.1)], ids=str)
def test_compiled_extension_and_torch_agree(stretch, monkeypatch):
    """Slices of larger tensors too, and a gradient that is one number for all gates."""
    logits, noise = torch.randn(5, 40)[:, 3:33], gate_noise(5, 40, seed=2, step=0)[:, 3:33]
    leaf = logits.clone().requires_grad_()

    def run(operand):
        z = concrete_gates(operand, noise, torch.tensor(0.3), stretch=stretch)
        return z.detach(), torch.autograd.grad(z.sum(), leaf)[0]

    compiled = run(leaf)
    assert torch.equal(concrete_gates(logits, noise, torch.tensor(0.3), stretch=stretch), compiled[0])
    monkeypatch.setattr(extension, "load", lambda: None)
    torch.testing.assert_close(run(leaf), compiled, rtol=1.2e-7, atol=0)


def test_noise_shape_error():
    """Broadcasting would give two gates one draw."""
    with pytest.raises(ValueError, match=r"noise \(4,\) and logits \(3, 4\)"):
        concrete_gates(torch.zeros(3, 4), torch.zeros(4), torch.tensor(0.5))


@pytest.mark.parametrize("stretch", [(0.0, 1.1), (-0.1, 1.0), (-float("inf"), 1.1)], ids=str)
def test_rejects_stretch(stretch):
    with pytest.raises(ValueError, match=r"expected \(low, high\) with low < 0 and high > 1"):
        sample_gates(torch.zeros(2, 3), **DRAW, stretch=stretch)
