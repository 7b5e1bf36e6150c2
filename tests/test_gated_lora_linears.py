"""Layers on one input: as if each were alone, with x read once."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cobra_kernels import GatedLora, gated_lora_linear, gated_lora_linears, gated_lora_linears_ref
from cobra_kernels.testing import assert_all_within_budget, make_inputs, output_and_gradients

SIZES = ((16, 6), (11, 1), (24, 9))  # N, r
GATES = ("rank", None, "closed")


def make(rows=(2, 5), K=12, dtype=torch.float32, seed=0, layout="contiguous"):
    """x, and the operands of three layers by name and number; the second has no bias and no gates."""
    inputs = {}
    for i, ((N, r), gates) in enumerate(zip(SIZES, GATES, strict=True)):
        layer = make_inputs(rows, K, N, r, gates=gates, bias=gates is not None, layout=layout, dtype=dtype, seed=seed + i)
        inputs["x"] = inputs.get("x", layer.pop("x"))
        layer.pop("x", None)
        inputs |= {f"{name}_{i}": t for name, t in layer.items()}
    return inputs


def joined(function, x, **operands):
    """All outputs side by side."""
    layers = [
        GatedLora(**{n: operands.get(f"{n}_{i}") for n in ("weight", "lora_A", "lora_B", "z", "bias")}, scaling=1.7 + i)
        for i in range(len(SIZES))
    ]
    return torch.cat(function(x, layers), -1)


fast, ref = partial(joined, gated_lora_linears), partial(joined, gated_lora_linears_ref)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1,), (2, 5), (101,), (0, 4)], ids=str)
def test_outputs_and_every_gradient_within_budget(rows, dtype):
    assert_all_within_budget(fast, ref, [make(rows, dtype=dtype, seed=seed) for seed in range(0, 60, 10)], dtype)


@pytest.mark.parametrize("layout", ["slices", "transposed"])
def test_strided_operands(layout):
    assert_all_within_budget(fast, ref, [make(layout=layout, seed=seed) for seed in range(0, 60, 10)], torch.float32)


def test_gradcheck():
    inputs = {name: t.requires_grad_() for name, t in make((3,), 4, torch.float64).items()}
    assert torch.autograd.gradcheck(lambda *t: fast(**dict(zip(inputs, t, strict=True))), tuple(inputs.values()))


@pytest.mark.parametrize(
    "required", [("x",), ("lora_A_1",), ("lora_B_0", "z_0"), ("z_2",), ("weight_2", "bias_2")], ids="-".join
)
def test_any_subset_of_gradients(required):
    inputs = make()
    full = output_and_gradients(fast, inputs)
    fixed = {name: t for name, t in inputs.items() if name not in required}
    found = output_and_gradients(partial(fast, **fixed), {name: inputs[name] for name in required})
    for name, value in found.items():
        torch.testing.assert_close(value, full[name])


def test_an_output_that_nobody_uses_brings_nothing():
    inputs = {name: t.requires_grad_() for name, t in make().items()}
    first, _, last = fast(**inputs).split([N for N, _ in SIZES], -1)
    alone = gated_lora_linears(inputs["x"], [GatedLora(inputs["weight_0"], inputs["lora_A_0"], inputs["lora_B_0"])] * 2)
    unused = torch.autograd.grad(alone[1].sum(), [inputs["x"], inputs["lora_A_0"]], retain_graph=True)
    single = gated_lora_linear(inputs["x"], inputs["weight_0"], inputs["lora_A_0"], inputs["lora_B_0"])
    expected = torch.autograd.grad(single.sum(), [inputs["x"], inputs["lora_A_0"]])
    torch.testing.assert_close(unused, expected)
    gradients = torch.autograd.grad((first.sum() + last.sum()), [inputs["lora_A_0"], inputs["lora_A_1"]])
    assert gradients[0].abs().sum() > 0 and not gradients[1].any()


def test_compiles_checkpoints_and_casts():
    inputs = make()
    eager = output_and_gradients(fast, inputs)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output_and_gradients(compiled, inputs), eager)

    def recomputed(**operands):
        return checkpoint(fast, use_reentrant=False, **operands)

    twice = output_and_gradients(recomputed, inputs)
    assert all(torch.equal(twice[name], eager[name]) for name in eager)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(**inputs).dtype == torch.bfloat16


def test_double_backward_and_transforms_are_refused():
    inputs = make()
    x = inputs.pop("x").requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative, .* use gated_lora_linears_ref"):
        torch.autograd.grad(fast(x, **inputs).sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"gated_lora_linears has no rule .* leading dimensions of x, or use gated_lora_linears_ref"
    ):
        torch.vmap(lambda x: fast(x, **inputs))(x)


def test_gates_of_tokens_are_refused():
    inputs = make() | {"z_0": torch.ones(2, 5, 6)}
    with pytest.raises(ValueError, match=r"layer 0 has gates of shape \(2, 5, 6\), expected \(6,\)"):
        fast(**inputs)
