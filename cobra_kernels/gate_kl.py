"""KL divergence of gate posteriors from their priors, per gate.

Closed form, Bernoulli(sigmoid(a)) against Bernoulli(sigmoid(p)) with logits a and p (COBRA Eq. (4)):

    KL = alpha (a - p) - softplus(a) + softplus(p)          alpha = sigmoid(a)
    dKL/da = alpha (1 - alpha) (a - p)                      exactly 0 where a = p

Sampled, concrete against concrete at one temperature, one draw t = (a + noise) / temperature = logit z:

    log q(t) = log(temperature) - v - 2 softplus(-v),  v = temperature * t - a = noise
    log p(t) = log(temperature) - v - 2 softplus(-v),  v = temperature * t - p = a + noise - p

so that the temperature cancels and only the moved sample carries a gradient to a.

The prior gets no gradient; double backward and torch.func's transforms are refused. Operands and results are fp32 or fp64; the
arithmetic is fp64, rounded once.
"""

from torch import Tensor

from cobra_kernels.derivatives import check_no_transforms
from cobra_kernels.gates_ops import GateFunction, bernoulli_kl, sampled_kl
from cobra_kernels.gates_options import GateOptions

_KL_ALONE = (False, True, False)


def gate_kl_ref(logits: Tensor, prior_logits: Tensor) -> Tensor:
    """logits (...), prior_logits (...) -> KL (...), each >= 0 up to rounding; in the dtype of the operands"""
    return bernoulli_kl(logits, prior_logits)


def gate_kl_sampled_ref(logits: Tensor, prior_logits: Tensor, noise: Tensor) -> Tensor:
    """logits, prior_logits, noise (...) -> one-sample estimate (...); in the dtype of the operands"""
    return sampled_kl(logits, prior_logits, noise)


def gate_kl(logits: Tensor, prior_logits: Tensor) -> Tensor:
    """Bernoulli KL per gate in closed form.

    logits, prior_logits: (...) of one shape

    out: (...)

    Raises ValueError where shapes differ, RuntimeError under torch.func's transforms and in backward under create_graph.
    """
    check_no_transforms("gate_kl", "use gate_kl_ref")
    _check_shapes(logits, prior_logits)
    return GateFunction.apply(logits, prior_logits, None, None, None, GateOptions(wanted=_KL_ALONE), None)[0]


def gate_kl_sampled(logits: Tensor, prior_logits: Tensor, noise: Tensor) -> Tensor:
    """One-sample estimate of the KL between two concrete densities, per gate; unbiased, may be negative.

    logits, prior_logits, noise: (...) of one shape; noise is the logistic draw that made the gates

    out: (...)

    Raises as `gate_kl` does.
    """
    check_no_transforms("gate_kl_sampled", "use gate_kl_sampled_ref")
    _check_shapes(logits, prior_logits)
    if noise.shape != logits.shape:
        raise ValueError(f"noise {tuple(noise.shape)} and logits {tuple(logits.shape)} differ in shape")
    return GateFunction.apply(logits, prior_logits, noise, None, None, GateOptions(sampled=True, wanted=_KL_ALONE), None)[0]


def _check_shapes(logits: Tensor, prior_logits: Tensor) -> None:
    if logits.shape != prior_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and prior_logits {tuple(prior_logits.shape)} differ in shape")
