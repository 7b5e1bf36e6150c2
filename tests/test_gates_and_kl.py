"""The gates of a whole model in one call: C++, torch and interpreted Triton give one result, whatever is drawn with it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted_copy
from torch._dynamo.testing import CompileCounterWithBackend

from cobra_kernels import (
    concrete_gates,
    extension,
    gate_kl,
    gate_kl_sampled,
    gate_noise,
    gates_and_kl,
    gates_and_kl_ref,
    gates_ops,
    sample_gates,
)
from cobra_kernels.gates_options import GateOptions
from cobra_kernels.philox import noise_of_words
from cobra_kernels.testing import assert_within_budget

BIG = 2**64 - 1
STRETCH = (-0.1, 1.1)
DRAW = dict(seed=3, step=5, temperature=0.5)
KINDS = [dict(kl=kl, stretch=stretch) for kl in ("bernoulli", "concrete") for stretch in (None, STRETCH, (-0.4, 1.05))]
needs_extension = pytest.mark.skipif(extension.load() is None, reason="the compiled extension was not built")
ALL, Z, KL, OPEN = (True, True, True), (True, False, False), (False, True, False), (False, False, True)

# options, shape, whether the noise is given
CALLS = {
    "drawn, all": (GateOptions(-7, 2**40, 2, 0.7, wanted=ALL), (5, 37), False),
    "drawn, all, hard, sampled": (GateOptions(11, -3, 0, 0.7, *STRETCH, sampled=True, wanted=ALL), (3, 200), False),
    "z of given noise": (GateOptions(wanted=Z), (300,), True),
    "hard z of given noise": (GateOptions(low=-0.4, high=1.05, wanted=Z), (4, 9), True),
    "Bernoulli KL": (GateOptions(wanted=KL), (131,), False),
    "sampled KL of given noise": (GateOptions(sampled=True, wanted=KL), (131,), True),
    "open probability of hard gates": (GateOptions(low=-0.1, high=1.1, wanted=OPEN), (7, 3), False),
}


def normal(*shape, seed=0, spread=4.0):
    return spread * torch.randn(*shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))


def operands_of(call, dtype=torch.float32):
    """(logits, prior, noise, offsets, temperature), the gradients of what is wanted, and the options."""
    options, shape, given_noise = call
    noise = gate_noise(1, normal(*shape).numel(), seed=1, step=2).reshape(shape).to(dtype) if given_noise else None
    operands = (
        normal(*shape).to(dtype),
        normal(*shape, seed=1).to(dtype),
        noise,
        None,
        torch.tensor(0.3) if given_noise else None,
    )
    gradients = [normal(*shape, seed=2 + i).to(dtype) if wanted else None for i, wanted in enumerate(options.wanted)]
    return operands, gradients, options


def results(function, logits, prior, **options):
    """z, kl, open and the gradient of the logits, from gradients that differ between outputs and gates."""
    leaf = logits.detach().requires_grad_()
    gates = function(leaf, prior, **options)
    weights = [normal(*leaf.shape, seed=10 + i, spread=1.0).to(leaf.dtype) for i in range(3)]
    (gradient,) = torch.autograd.grad(gates, leaf, weights)
    return {**{name: t.detach() for name, t in gates._asdict().items()}, "dlogits": gradient}


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    """The extension, or what runs without it."""
    if request.param == "torch":
        monkeypatch.setattr(extension, "load", lambda: None)
    elif extension.load() is None:
        pytest.skip("the compiled extension was not built")


# the same bits


@needs_extension
def test_noise_is_the_nearest_number_for_every_word():
    """In C++ and in torch, for each of the 2^24 values of u, against numbers of 64 bits."""
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("long double is no wider than double here")
    library, count = extension.load(), 2**20
    compiled = torch.empty(count)
    for first in range(0, 2**23, count):
        n = torch.arange(first, first + count)
        t = (2 * n.numpy() + 1 - 2**24).astype(np.longdouble) / 2**24  # 2 u - 1
        exact = torch.from_numpy((2 * np.arctanh(t)).astype(np.float32))
        for words, expected in ((n << 8, exact), ((2**24 - 1 - n << 8) + 255, -exact)):
            library.cobra_noise_of_words(words.data_ptr(), compiled.data_ptr(), count)
            assert torch.equal(compiled, expected) and torch.equal(noise_of_words(words), expected)


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_copy("gates_triton", uses=("gates_math_triton",))


@needs_extension
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_interpreted_triton_has_the_bits_of_the_compiled_code(call, interpreted):
    operands, gradients, options = operands_of(call)
    plain = gates_ops._plain(options)
    found, expected = interpreted.forward(*operands, options), torch.ops.cobra.gates_forward(*operands, *plain)
    assert all(map(torch.equal, found, expected))
    assert any(t.numel() for t in found)
    found = interpreted.backward(gradients, *operands, options)
    assert torch.equal(found, torch.ops.cobra.gates_backward(*gradients, *operands, *plain))


@needs_extension
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_uneven_sites_in_the_interpreter(kind, interpreted):
    """A site without gates among them, one of several blocks, and gradients that are one number for all gates."""
    offsets = torch.tensor([0, 5, 5, 150, 151])
    low, high = kind["stretch"] or (0.0, 1.0)
    options = GateOptions(3, 5, 7, 0.7, low, high, kind["kl"] == "concrete", ALL)
    operands = (normal(151), normal(151, seed=1), None, offsets, None)
    gradients = [None, torch.tensor(0.25).expand(151), normal(151)]
    found, expected = (
        interpreted.forward(*operands, options),
        torch.ops.cobra.gates_forward(*operands, *gates_ops._plain(options)),
    )
    assert all(map(torch.equal, found, expected))
    options = GateOptions(3, 5, 7, 0.7, low, high, kind["kl"] == "concrete", (False, True, True))
    expected = torch.ops.cobra.gates_backward(*gradients, *operands, *gates_ops._plain(options))
    assert torch.equal(interpreted.backward(gradients, *operands, options), expected)


@needs_extension
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bits_do_not_depend_on_the_instructions(kind, monkeypatch):
    logits, prior = normal(5, 71), normal(5, 71, seed=1)
    wide = results(gates_and_kl, logits, prior, **DRAW, **kind)
    monkeypatch.setattr(extension, "CPU_LEVEL", 0)
    narrow = results(gates_and_kl, logits, prior, **DRAW, **kind)
    assert all(torch.equal(t, narrow[name]) for name, t in wide.items())


@needs_extension
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_torch_gives_the_compiled_numbers_up_to_the_last_bit(kind, monkeypatch):
    logits, prior = normal(400, 64), normal(400, 64, seed=1)
    compiled = results(gates_and_kl, logits, prior, **DRAW, **kind)
    monkeypatch.setattr(extension, "load", lambda: None)
    plain = results(gates_and_kl, logits, prior, **DRAW, **kind)
    for name, value in compiled.items():
        torch.testing.assert_close(plain[name], value, rtol=1.2e-7, atol=1e-14)
        assert (plain[name] != value).sum() <= 3, name  # of 25600


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=6),
    st.integers(0, BIG),
    st.integers(0, BIG),
    st.integers(0, 2**32 - 7),
)
def test_a_gate_does_not_depend_on_what_is_drawn_with_it(lengths, seed, step, first_site):
    """Sites of any length in one call, each as it is alone, in slices of a larger tensor."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    n = int(offsets[-1])
    logits, prior = normal(n + 3)[2:-1], normal(n + 3, seed=1)[2:-1]
    draw = dict(seed=seed, step=step, temperature=0.5, kl="concrete")
    together = gates_and_kl(logits, prior, first_site=first_site, offsets=offsets, **draw)
    for site, (begin, end) in enumerate(pairwise(offsets.tolist())):
        alone = gates_and_kl(logits[None, begin:end], prior[None, begin:end], first_site=first_site + site, **draw)
        assert all(torch.equal(one[0], all_[begin:end]) for one, all_ in zip(alone, together, strict=True))


# what it computes


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (36, 16), (2, 1024)], ids=str)
def test_outputs_and_gradient_within_budget(shape, kind, path):
    several = [(normal(*shape, seed=seed), normal(*shape, seed=seed + 50)) for seed in range(4)]
    fast, ref, oracle = (
        [results(function, a.to(dtype), p.to(dtype), **DRAW, **kind) for a, p in several]
        for function, dtype in (
            (gates_and_kl, torch.float32),
            (gates_and_kl_ref, torch.float32),
            (gates_and_kl_ref, torch.float64),
        )
    )
    for name in fast[0]:
        assert_within_budget(*([each[name] for each in runs] for runs in (fast, ref, oracle)), name=name)


def test_is_what_the_single_operations_give(path):
    logits, prior = normal(9, 21), normal(9, 21, seed=1)
    noise = gate_noise(9, 21, seed=3, step=5)
    gates = gates_and_kl(logits, prior, **DRAW, stretch=STRETCH)
    assert torch.equal(gates.z, sample_gates(logits, **DRAW, stretch=STRETCH))
    assert torch.equal(gates.z, concrete_gates(logits, noise, torch.tensor(0.5), stretch=STRETCH))
    assert torch.equal(gates.kl, gate_kl(logits, prior))
    assert torch.equal(gates_and_kl(logits, prior, **DRAW, kl="concrete").kl, gate_kl_sampled(logits, prior, noise))
    assert torch.equal(gates_and_kl(logits, prior, **DRAW).open, torch.sigmoid(logits.double()).float())


@pytest.mark.parametrize("temperature", [0.1, 2 / 3])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 0.7])
def test_open_is_how_often_a_hard_gate_is_not_zero(logit, temperature):
    logits = torch.full((400, 256), logit)
    gates = gates_and_kl(logits, logits, seed=11, step=0, temperature=temperature, stretch=STRETCH)
    expected = gates.open[0, 0].item()
    standard_error = (expected * (1 - expected) / logits.numel()) ** 0.5
    assert abs((gates.z > 0).double().mean().item() - expected) < 4 * standard_error
    ones = torch.sigmoid(torch.tensor(logit + temperature * np.log(0.1 / 1.1))).item()  # by the symmetry of the stretch
    assert abs((gates.z == 1).double().mean().item() - ones) < 4 * (ones * (1 - ones) / logits.numel()) ** 0.5


def test_closed_hard_gates_have_no_gradient(path):
    leaf = normal(50, 64).requires_grad_()
    z = sample_gates(leaf, **DRAW, stretch=STRETCH)
    (gradient,) = torch.autograd.grad(z.sum(), leaf)
    cut = (z == 0) | (z == 1)
    assert 0.2 < cut.double().mean() < 0.95
    assert not gradient[cut].any() and (gradient[~cut] > 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradcheck(kind, path):
    leaf, prior = normal(3, 5, spread=1.0).double().requires_grad_(), normal(3, 5, seed=1).double()
    assert torch.autograd.gradcheck(lambda a: gates_and_kl(a, prior, **DRAW, **kind), leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_opcheck(call, dtype):
    operands, gradients, options = operands_of(call, dtype)
    plain = gates_ops._plain(options)
    for operator, arguments in (
        (torch.ops.cobra.gates_forward.default, (*operands, *plain)),
        (torch.ops.cobra.gates_backward.default, (*gradients, *operands, *plain)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_extreme_and_broken_logits(path):
    """Certain gates are exact and their gradients finite; a NaN stays at its gate."""
    logits = torch.tensor([[-1e4, 1e4, -800.0, 800.0, float("nan"), 0.0]])
    found = results(gates_and_kl, logits, torch.zeros(1, 6), **DRAW, kl="concrete", stretch=STRETCH)
    assert found["z"][0, :4].tolist() == [0, 1, 0, 1]
    for name, value in found.items():
        assert value.isnan().tolist() == [[False] * 4 + [True, False]], name


def test_gradient_of_one_output_alone(path):
    leaf, prior = normal(3, 5).requires_grad_(), normal(3, 5, seed=1)
    for index, single in enumerate((lambda a: sample_gates(a, **DRAW), lambda a: gate_kl(a, prior), torch.sigmoid)):
        (found,) = torch.autograd.grad(gates_and_kl(leaf, prior, **DRAW)[index].sum(), leaf)
        (expected,) = torch.autograd.grad(single(leaf).sum(), leaf)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_prior_gets_no_gradient():
    leaf, prior = normal(3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()
    sum(t.sum() for t in gates_and_kl(leaf, prior, **DRAW)).backward()
    assert leaf.grad is not None and prior.grad is None


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_no_gates(shape, path):
    found = results(gates_and_kl, torch.zeros(shape), torch.zeros(shape), **DRAW)
    assert all(t.shape == shape for t in found.values())


# where it is called


def test_compiles_in_one_graph_and_steps_do_not_compile_again():
    logits, prior = normal(6, 8), normal(6, 8, seed=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gates_and_kl, fullgraph=True, backend=counter)
    for step in (4, 5, 6, 2**63 + 1):
        draw = dict(seed=3, step=step, temperature=0.5, stretch=STRETCH)
        expected = results(gates_and_kl, logits, prior, **draw)
        assert all(torch.equal(t, expected[name]) for name, t in results(compiled, logits, prior, **draw).items())
    assert counter.frame_count <= 3


def test_compiles_with_offsets(path):
    """Which have no values while it is traced: they are checked where the graph runs."""
    logits, prior, offsets = normal(12), normal(12, seed=1), torch.tensor([0, 4, 4, 12])
    compiled = torch.compile(gates_and_kl, fullgraph=True, backend="aot_eager")
    expected = results(gates_and_kl, logits, prior, offsets=offsets, **DRAW)
    found = results(compiled, logits, prior, offsets=offsets, **DRAW)
    assert all(torch.equal(t, expected[name]) for name, t in found.items())
    with pytest.raises(ValueError, match="begin at 0, never fall and end at 12"):
        compiled(logits, prior, offsets=torch.tensor([0, 4, 4, 10**8]), **DRAW)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4]], ids=str)
def test_double_backward_and_transforms_are_refused(kind):
    """Of a sum, too, whose gradient has no graph."""
    leaf, prior = normal(3, 5, spread=1.0).double().requires_grad_(), normal(3, 5, seed=1).double()
    for index in range(3):
        with pytest.raises(RuntimeError, match=r"gates_and_kl has no second derivative, .* use gates_and_kl_ref"):
            torch.autograd.grad(gates_and_kl(leaf, prior, **DRAW, **kind)[index].sum(), leaf, create_graph=True)
    for transform in (torch.vmap, torch.func.grad):
        with pytest.raises(RuntimeError, match=r"gates_and_kl has no rule for torch.func's .* draw with gate_noise outside"):
            transform(lambda a: gates_and_kl(a, prior, **DRAW, **kind).kl.sum())(leaf)
    assert torch.autograd.gradgradcheck(lambda a: gates_and_kl_ref(a, prior, **DRAW, **kind), leaf)


def test_autocast_leaves_the_gates_alone():
    logits, prior = normal(6, 8), normal(6, 8, seed=1)
    expected = results(gates_and_kl, logits, prior, **DRAW)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(gates_and_kl, logits, prior, **DRAW)
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def test_default_dtype_does_not_matter():
    logits, prior = normal(6, 8), normal(6, 8, seed=1)
    expected = results(gates_and_kl, logits, prior, **DRAW)
    torch.set_default_dtype(torch.float64)
    try:
        found = results(gates_and_kl, logits, prior, **DRAW)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.zeros(6)), r"logits must be \(sites, ranks\), or \(n,\) with offsets"),
        (dict(prior_logits=torch.zeros(3)), r"logits \(2, 3\) and prior_logits \(3,\) differ"),
        (dict(offsets=torch.tensor([0, 3])), r"offsets must be \(sites \+ 1,\) of int64 beside logits \(n,\)"),
        (dict(kl="l0"), "no KL 'l0'"),
        (dict(stretch=(0.0, 1.1)), r"stretch \(0.0, 1.1\): expected \(low, high\) with low < 0"),
        (dict(stretch=(-0.1, float("inf"))), "expected"),
        (dict(temperature=0.0), "temperature must be greater than 0"),
        (dict(backend="cuda graphs"), "no backend 'cuda graphs'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        gates_and_kl(**{"logits": torch.zeros(2, 3), "prior_logits": torch.zeros(2, 3), **DRAW, **change})


def test_a_backend_that_cannot_run_says_so():
    with pytest.raises(RuntimeError, match="backend='triton' needs"):
        gates_and_kl(torch.zeros(2, 3), torch.zeros(2, 3), **DRAW, backend="triton")


def test_offsets_with_strides():
    logits, prior = torch.randn(7), torch.randn(7)
    given = torch.tensor([0, 1, 3, 5, 7, 7])[::2]
    options = {"seed": 1, "step": 2, "temperature": 0.5}
    for found, expected in zip(
        gates_and_kl(logits, prior, offsets=given, **options),
        gates_and_kl(logits, prior, offsets=given.clone(memory_format=torch.contiguous_format), **options),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("offsets", [[0, 10**8], [0, 3], [2, 7], [0, 5, 3, 7]])
def test_offsets_that_do_not_cover_the_logits_are_refused(offsets):
    with pytest.raises(ValueError, match="begin at 0, never fall and end at 7"):
        gates_and_kl(torch.zeros(7), torch.zeros(7), offsets=torch.tensor(offsets), seed=0, step=0, temperature=1.0)


@pytest.mark.parametrize("change", [{"seed": -1}, {"step": 2**64}, {"temperature": 1e-60}])
def test_numbers_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=r"from 0 to|greater than 0"):
        gates_and_kl(torch.zeros(1, 7), torch.zeros(1, 7), **{"seed": 0, "step": 0, "temperature": 1.0, **change})
