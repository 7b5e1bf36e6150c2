import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from cobra_kernels import gate_kl, gate_kl_ref, gate_kl_sampled, gate_noise
from cobra_kernels.gate_kl import gate_kl_sampled_ref

LOGITS = [-50.0, -21.0, -3.0, -1e-3, 0.0, 0.7, 5.0, 19.0, 50.0]


def bernoulli_kl(a, p):
    """Σ over open and closed of q (log q - log p), in fp64."""
    a, p = a.double(), p.double()
    return torch.sigmoid(a) * (logsigmoid(a) - logsigmoid(p)) + torch.sigmoid(-a) * (logsigmoid(-a) - logsigmoid(-p))


def logistic_log_density(v):
    return -v - 2 * torch.nn.functional.softplus(-v, threshold=100)


def concrete_kl(a, p, temperature):
    """KL of two concrete densities by the trapezoid rule over t = logit z, whose log density is log λ + f(λ t - a)."""
    t = torch.linspace(-60 / temperature, 60 / temperature, 20_001, dtype=torch.float64)
    log_q, log_p = (math.log(temperature) + logistic_log_density(temperature * t - logit) for logit in (a, p))
    return torch.trapezoid(log_q.exp() * (log_q - log_p), t).item()


def grid(dtype):
    a, p = torch.meshgrid(*[torch.tensor(LOGITS, dtype=dtype)] * 2, indexing="ij")
    return a.contiguous().requires_grad_(), p.contiguous()


@pytest.mark.parametrize("function", [gate_kl, gate_kl_ref])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-8)], ids=["fp32", "fp64"])
def test_closed_form(function, dtype, atol):
    """Also where one distribution is certain and the other certain of the opposite."""
    a, p = grid(dtype)
    kl = function(a, p)
    assert kl.dtype == dtype
    torch.testing.assert_close(kl.double(), bernoulli_kl(a, p), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient(dtype):
    a, p = grid(dtype)
    exact = a.detach().double().requires_grad_()
    (oracle,) = torch.autograd.grad(bernoulli_kl(exact, p).sum(), exact)
    (fast,) = torch.autograd.grad(gate_kl(a, p).sum(), a)
    torch.testing.assert_close(fast.double(), oracle, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_exactly_zero_at_the_prior():
    """At step 0 the posterior is the prior: no loss, and not even a rounding error of a gradient."""
    logits = torch.cat([torch.tensor(LOGITS), 4 * torch.randn(1000)]).requires_grad_()
    kl = gate_kl(logits, logits.detach().clone())
    kl.sum().backward()
    assert not kl.any() and not logits.grad.any()


def test_gradcheck():
    a = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    p, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: gate_kl(a, p), a)
    assert torch.autograd.gradcheck(lambda a: gate_kl_sampled(a, p, noise), a)


@pytest.mark.parametrize(
    ("function", "reference"), [(gate_kl, gate_kl_ref), (gate_kl_sampled, gate_kl_sampled_ref)], ids=["closed", "sampled"]
)
def test_double_backward_and_transforms_are_refused(function, reference):
    """Of a sum, too, whose gradient has no graph; the reference takes both."""
    a = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    rest = torch.randn(1 if function is gate_kl else 2, 3, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"{function.__name__} has no second derivative, .* use {reference.__name__}"):
        torch.autograd.grad(function(a, *rest).sum(), a, create_graph=True)
    for transform in (torch.vmap, torch.func.grad):
        with pytest.raises(RuntimeError, match=f"{function.__name__} has no rule for torch.func's .* use {reference.__name__}"):
            transform(lambda a: function(a, *rest).sum())(a)
    assert torch.autograd.gradgradcheck(lambda a: reference(a, *rest), a)
    assert torch.equal(torch.vmap(reference)(a, *rest), reference(a, *rest))


@pytest.mark.parametrize("sampled", [True, False])
def test_prior_gets_no_gradient(sampled):
    a, p, noise = torch.randn(3, 5)
    a, p = a.requires_grad_(), p.requires_grad_()
    (gate_kl_sampled(a, p, noise) if sampled else gate_kl(a, p)).sum().backward()
    assert a.grad is not None and p.grad is None


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(("a", "p"), [(0.0, 1.0), (2.0, -1.0), (-3.0, -2.5), (1.0, 1.0)])
def test_sampled_is_unbiased(a, p, temperature):
    """The mean over draws is the KL of the concrete densities, at any temperature, and so is the gradient's mean."""
    noise = gate_noise(150, 200, seed=0, step=0).double()
    logits = torch.full_like(noise, a, requires_grad=True)
    kl = gate_kl_sampled(logits, torch.full_like(noise, p), noise)
    kl.sum().backward()
    exact = concrete_kl(a, p, temperature)
    slope = (concrete_kl(a + 1e-3, p, temperature) - concrete_kl(a - 1e-3, p, temperature)) / 2e-3
    for draws, expected in ((kl.detach(), exact), (logits.grad, slope)):
        standard_error = draws.std() / draws.numel() ** 0.5
        assert abs(draws.mean() - expected) < 4 * standard_error + 1e-6


def test_sampled_is_the_log_density_ratio():
    """Draw by draw, not only in the mean."""
    a, p, noise = 3 * torch.randn(3, 1000, dtype=torch.float64)
    a.requires_grad_()
    kl = gate_kl_sampled(a, p, noise)
    torch.testing.assert_close(kl, logistic_log_density(noise) - logistic_log_density(noise + a - p), rtol=1e-8, atol=1e-8)
    (gradient,) = torch.autograd.grad(kl.sum(), a)
    torch.testing.assert_close(gradient, torch.tanh((noise + a - p) / 2), rtol=1e-8, atol=1e-8)


def test_sampled_at_extreme_logits_is_finite():
    a, p = grid(torch.float32)
    noise = gate_noise(*a.shape, seed=0, step=0)
    kl = gate_kl_sampled(a, p, noise)
    kl.sum().backward()
    assert kl.isfinite().all() and a.grad.isfinite().all()
    assert not kl.detach().diagonal().any()


@pytest.mark.parametrize("function", [gate_kl, lambda a, p: gate_kl_sampled(a, p, a)], ids=["closed", "sampled"])
def test_shape_error(function):
    """Broadcasting a prior would hide that it belongs to other gates."""
    with pytest.raises(ValueError, match=r"logits \(3, 4\) and prior_logits \(4,\)"):
        function(torch.zeros(3, 4), torch.zeros(4))


def test_noise_shape_error():
    with pytest.raises(ValueError, match=r"noise \(4,\) and logits \(3, 4\)"):
        gate_kl_sampled(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4))
