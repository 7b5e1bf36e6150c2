import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cobra_kernels import ConcreteSample, draw_words, gated_lora_linear, gated_lora_linear_ref, sample_gates, testing
from cobra_kernels.testing import assert_within_budget, make_inputs

SCALING = 1.7
DTYPES = [torch.float32, torch.bfloat16]
GATES = ["rank", "token", "closed", None]

# rows, K, N, r: below the size from which BLAS starts threads, which cost milliseconds each on a busy machine
SHAPES = {
    "one token": ((1, 1), 16, 24, 4),
    "primes, which no tile divides": ((2, 5), 13, 11, 7),
    "r not a power of two": ((2, 5), 12, 16, 6),
    "r = 1": ((3, 5), 12, 10, 1),
    "r far above K and N": ((2, 3), 16, 8, 1024),
    "two-dimensional x": ((11,), 12, 14, 6),
    "four-dimensional x": ((2, 2, 3), 12, 14, 6),
    "many tokens": ((150,), 13, 22, 7),
    "no examples": ((0, 4), 12, 18, 6),
    "no tokens": ((2, 0), 12, 18, 6),
}
MIDDLE = ((2, 5), 12, 16, 6)


def output_and_gradients(function, inputs, dtype=None):
    return testing.output_and_gradients(partial(function, scaling=SCALING), inputs, dtype)


def draws(*shape, **options):
    return [make_inputs(*shape, seed=seed, **options) for seed in range(6)]


def assert_all_within_budget(several, dtype):
    fast, ref = partial(gated_lora_linear, scaling=SCALING), partial(gated_lora_linear_ref, scaling=SCALING)
    testing.assert_all_within_budget(fast, ref, several, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_every_gradient_within_budget(shape, gates, dtype):
    assert_all_within_budget(draws(*shape, gates=gates, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", ["rank", "token"])
@pytest.mark.parametrize("layout", ["slices", "transposed"])
def test_strided_operands(layout, gates, dtype):
    """Nothing assumes dense rows: slices have NaN around them, and a transposed weight is how Conv1D's weight arrives."""
    several = draws(*MIDDLE, gates=gates, layout=layout, dtype=dtype)
    assert not any(several[0][name].is_contiguous() for name in ("x", "weight", "lora_A", "lora_B"))
    assert_all_within_budget(several, dtype)


@pytest.mark.parametrize("gates", GATES)
def test_without_bias(gates):
    assert_all_within_budget(draws(*MIDDLE, gates=gates, bias=False), torch.float32)


@pytest.mark.parametrize("expanded", [True, False], ids=["expanded", "transposed"])
def test_strided_output_gradient(expanded):
    """A sum's gradient is one number with strides 0; an attention layer's arrives transposed."""
    inputs = {name: t.requires_grad_() for name, t in make_inputs(*MIDDLE, dtype=torch.float64).items()}
    dy = torch.tensor(0.5, dtype=torch.float64).expand(2, 5, 16) if expanded else torch.randn(5, 2, 16).double().transpose(0, 1)
    fast = torch.autograd.grad(gated_lora_linear(**inputs), list(inputs.values()), dy)
    ref = torch.autograd.grad(gated_lora_linear_ref(**inputs), list(inputs.values()), dy)
    torch.testing.assert_close(fast, ref, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gates", ["rank", "token"])
def test_gradcheck(gates):
    inputs = {name: t.requires_grad_() for name, t in make_inputs((2, 2), 3, 4, 2, gates=gates, dtype=torch.float64).items()}

    def positional(*tensors):
        return gated_lora_linear(**dict(zip(inputs, tensors, strict=True)), scaling=SCALING)

    assert torch.autograd.gradcheck(positional, tuple(inputs.values()))


def test_double_backward_is_refused():
    """A gradient penalty through it would be silently wrong."""
    inputs = {name: t.requires_grad_() for name, t in make_inputs(*MIDDLE, dtype=torch.float64).items()}
    for value in (lambda y: y.sum(), lambda y: y.square().sum()):  # of a sum the incoming gradient has no graph
        with pytest.raises(RuntimeError, match=r"no second derivative, .* create_graph=True .* use gated_lora_linear_ref"):
            torch.autograd.grad(value(gated_lora_linear(**inputs)), inputs["x"], create_graph=True)
    assert torch.autograd.gradgradcheck(lambda x: gated_lora_linear_ref(**inputs | {"x": x}), inputs["x"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silent", ["lora_B", "z"])
@pytest.mark.parametrize("rows", [(7,), (3, 5), (150,)], ids=str)
def test_silent_branch_is_the_base_layer_bit_for_bit(rows, silent, dtype):
    """At step 0 lora_B is 0, and the first loss must be the base model's."""
    inputs = make_inputs(rows, 12, 16, 6, dtype=dtype)
    inputs[silent].zero_()
    assert torch.equal(gated_lora_linear(**inputs), F.linear(inputs["x"], inputs["weight"], inputs["bias"]))


@pytest.mark.parametrize("gates", ["rank", "token"])
@pytest.mark.parametrize(
    "required",
    [("x",), ("lora_A",), ("lora_B",), ("z",), ("weight",), ("bias",), ("lora_A", "lora_B"), ("x", "lora_A", "lora_B", "z")],
    ids="-".join,
)
def test_any_subset_of_gradients(required, gates):
    """What is frozen changes no gradient of what is not."""
    inputs = make_inputs(*MIDDLE, gates=gates)
    full = output_and_gradients(gated_lora_linear, inputs)
    leaves = {name: t.detach().requires_grad_(name in required) for name, t in inputs.items()}
    y = gated_lora_linear(**leaves, scaling=SCALING)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(99)).bfloat16().float())
    assert {name for name, t in leaves.items() if t.grad is not None} == set(required)
    for name in required:
        torch.testing.assert_close(leaves[name].grad, full[f"d{name}"])


@pytest.mark.parametrize("gates", ["rank", "token", None])
def test_autocast(gates):
    """Under autocast the product is bf16 and the gradients are the parameters' fp32, as with F.linear."""
    inputs = make_inputs(*MIDDLE, gates=gates)

    def autocast(**operands):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gated_lora_linear(**operands)

    fast = output_and_gradients(autocast, inputs)
    assert fast.pop("y").dtype == torch.bfloat16
    assert {g.dtype for g in fast.values()} == {torch.float32}
    quantised = {name: t.bfloat16() for name, t in inputs.items()}
    ref = output_and_gradients(gated_lora_linear_ref, quantised)
    oracle = output_and_gradients(gated_lora_linear_ref, quantised, torch.float64)
    for name, gradient in fast.items():
        assert_within_budget(gradient, ref[name], oracle[name], dtype=torch.bfloat16, name=name)


@pytest.mark.parametrize("gates", ["rank", "token"])
def test_fp32_adapter_on_a_bf16_layer(gates):
    """How half-precision bases are trained: y is the layer's dtype, each gradient its operand's."""
    inputs = make_inputs(*MIDDLE, gates=gates, dtype=torch.bfloat16)
    adapter = make_inputs(*MIDDLE, gates=gates)
    inputs |= {name: adapter[name] for name in ("lora_A", "lora_B", "z")}
    assert_all_within_budget([inputs], torch.bfloat16)
    fast = output_and_gradients(gated_lora_linear, inputs)
    assert fast["y"].dtype == torch.bfloat16
    assert all(fast[f"d{name}"].dtype == t.dtype for name, t in inputs.items())


@pytest.mark.parametrize("gates", ["rank", "token", "drawn"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend, gates):
    """Forward and backward."""
    inputs = make_inputs(*MIDDLE, gates=None if gates == "drawn" else gates)
    function = gated_lora_linear
    if gates == "drawn":
        function, inputs = drawn_as_given, inputs | {"logits": torch.linspace(-2, 2, 6)}
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    fast, eager = (output_and_gradients(function, inputs) for function in (compiled, function))
    torch.testing.assert_close(fast, eager)


def drawn_as_given(logits, scaling, **operands):
    sample = ConcreteSample(logits, draw_words(2**63 + 3, 5, 2), torch.tensor(0.5))
    return gated_lora_linear(z=sample, scaling=scaling, **operands)


def test_a_compiled_step_draws_the_next_gates_without_compiling_again():
    """Seed, step and temperature are tensors: a step changes their values and nothing else."""
    inputs = make_inputs(*MIDDLE, gates=None)
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda sample: gated_lora_linear(**inputs, z=sample), fullgraph=True, backend=count)
    for step in range(3):
        sample = ConcreteSample.of(torch.linspace(-2, 2, 6), seed=1, step=step, site=0, temperature=1.0 - 0.1 * step)
        torch.testing.assert_close(compiled(sample), gated_lora_linear(**inputs, z=sample))
    assert len(graphs) == 1


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_functional_transforms_are_refused(transform):
    inputs = make_inputs(*MIDDLE)
    x = inputs.pop("x")
    with pytest.raises(RuntimeError, match=r"no rule for torch.func's transforms .* give it the batch as leading dimensions"):
        transform(lambda x: gated_lora_linear(x, **inputs).sum())(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(reentrant):
    """Gates are a pure function, so the recomputed forward sees them again with the global RNG left alone."""
    inputs = make_inputs(*MIDDLE)
    inputs["logits"] = inputs.pop("z").log()

    def layer(*tensors):
        operands = dict(zip(inputs, tensors, strict=True))
        z = sample_gates(operands.pop("logits")[None], seed=3, step=5, temperature=0.5)[0]
        return gated_lora_linear(**operands, z=z)

    def recomputed(*tensors):
        return checkpoint(layer, *tensors, use_reentrant=reentrant, preserve_rng_state=False)

    def results(function):
        leaves = [t.clone().requires_grad_() for t in inputs.values()]
        y = function(*leaves)
        y.square().sum().backward()
        return [y, *(t.grad for t in leaves)]

    assert all(torch.equal(*pair) for pair in zip(results(layer), results(recomputed), strict=True))


def test_gates_drawn_inside_are_those_of_sample_gates():
    """To the bit, and so are the gradients of their logits."""
    inputs = make_inputs(*MIDDLE, gates=None) | {"logits": torch.linspace(-2, 2, 6)}

    def inside(logits, **operands):
        return gated_lora_linear(z=ConcreteSample.of(logits, seed=2**63 + 3, step=5, site=2, temperature=0.5), **operands)

    def before(logits, **operands):
        z = sample_gates(logits[None], seed=2**63 + 3, step=5, temperature=0.5, first_site=2)[0]
        return gated_lora_linear(z=z, **operands)

    drawn, given = (output_and_gradients(function, inputs) for function in (inside, before))
    assert all(torch.equal(drawn[name], given[name]) for name in given)


def test_triton_raises_where_it_cannot_run(monkeypatch):
    """An explicit request never falls back in silence."""
    inputs = make_inputs(*MIDDLE)
    with pytest.raises(ValueError, match="no backend 'cuda'; there are 'auto', 'torch', 'triton'"):
        gated_lora_linear(**inputs, backend="cuda")
    if find_spec("triton"):
        with pytest.raises(RuntimeError, match="needs a CUDA device, and x is on cpu"):
            gated_lora_linear(**inputs, backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs the package triton"):
        gated_lora_linear(**inputs, backend="triton")


@pytest.mark.parametrize("backend", [None, "auto", "torch"])
def test_torch_is_the_default(backend):
    inputs = make_inputs(*MIDDLE)
    assert torch.equal(gated_lora_linear(**inputs, backend=backend), gated_lora_linear(**inputs))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 5, 11)),
        ("weight", (16,)),
        ("lora_A", (6, 11)),
        ("lora_A", (7, 12)),
        ("lora_B", (15, 6)),
        ("lora_B", (16, 7)),
        ("z", (5,)),
        ("z", ()),
        ("z", (5, 6)),
        ("z", (1, 1, 6)),
        ("bias", (12,)),
    ],
    ids=str,
)
def test_wrong_shape_names_the_operand(name, shape):
    """Also where broadcasting would have given an answer."""
    inputs = make_inputs(*MIDDLE)
    inputs[name] = torch.ones(shape)
    blamed = "lora_B" if (name, shape) == ("lora_A", (7, 12)) else name  # A alone says what r is
    with pytest.raises(ValueError, match=rf"^{blamed} has shape"):
        gated_lora_linear(**inputs)


@pytest.mark.parametrize("wrong", ["nan", "shape", "error"])
def test_budget_refuses(wrong):
    """The assertion that all of this rests on."""
    oracle = torch.linspace(1, 2, 5, dtype=torch.float64)
    ref = oracle + 1e-3
    fast = {"nan": ref * float("nan"), "shape": ref[:4], "error": oracle + 2.1e-3}[wrong]
    assert_within_budget((oracle - 1.9e-3).float(), ref, oracle)
    with pytest.raises(AssertionError, match="output"):
        assert_within_budget(fast.float(), ref, oracle)
