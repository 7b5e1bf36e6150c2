import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cobra_kernels import gated_lora_linear, merge_lora, merge_lora_ref
from cobra_kernels.testing import assert_within_budget, make_inputs

SCALING = 1.7
HALF = [torch.bfloat16, torch.float16]
SHAPES = {  # K, N, r
    "primes": (17, 13, 5),
    "r = 1": (16, 24, 1),
    "r above K and N": (4, 6, 1024),
}


def make_factors(K, N, r, gates="rank", **options):
    inputs = make_inputs((1,), K, N, r, gates=gates, bias=False, **options)
    del inputs["x"]
    return inputs


def widened(inputs):
    return {name: t.double() for name, t in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("gates", ["rank", "closed", None])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_within_budget(shape, gates, dtype):
    draws = [make_factors(*shape, gates=gates, dtype=dtype, seed=seed) for seed in range(4)]
    fast, ref = ([merge(**inputs, scaling=SCALING) for inputs in draws] for merge in (merge_lora, merge_lora_ref))
    assert fast[0].dtype == dtype
    assert_within_budget(fast, ref, [merge_lora_ref(**widened(inputs), scaling=SCALING) for inputs in draws])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sum_is_rounded_once(dtype):
    """Where the fp32 sum is exact, the merged weight is the correctly rounded one, bit for bit."""
    inputs = make_factors(64, 48, 12, dtype=dtype)
    for name in ("lora_A", "lora_B", "z"):
        inputs[name] = (inputs[name] * 64).round() / 64
    exact = merge_lora_ref(**widened(inputs), scaling=0.5)
    assert torch.equal(exact.float().double(), exact)
    assert torch.equal(merge_lora(**inputs, scaling=0.5), exact.to(dtype))
    update = 0.5 * (inputs["lora_B"].double() * inputs["z"]) @ inputs["lora_A"].double()
    assert not torch.equal(inputs["weight"] + update.to(dtype), exact.to(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_fp32_factors_reach_a_half_weight_unrounded(dtype):
    """Adapters are trained in fp32: within half an ulp of the fp64 result, up to the fp32 sum's own error."""
    inputs = make_factors(17, 13, 6)
    inputs["weight"] = inputs["weight"].to(dtype)
    exact = merge_lora_ref(**widened(inputs), scaling=SCALING)
    merged = merge_lora(**inputs, scaling=SCALING)
    torch.testing.assert_close(merged.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    gates=st.sampled_from(["rank", "closed", None]),
    layout=st.sampled_from(["contiguous", "slices", "transposed"]),
    seed=st.integers(0, 2**16),
)
def test_merged_weight_computes_what_the_branch_did(shape, gates, layout, seed):
    inputs = make_inputs((4,), *shape, gates=gates, layout=layout, bias=False, dtype=torch.float64, seed=seed)
    y = gated_lora_linear(**inputs, scaling=SCALING)
    merged = F.linear(inputs.pop("x"), merge_lora(**inputs, scaling=SCALING))
    torch.testing.assert_close(merged, y, rtol=1e-12, atol=1e-12)


def test_result_is_new_and_arguments_stay():
    """Unmerging restores the base weight by keeping it."""
    inputs = make_factors(8, 6, 2)
    before = {name: t.clone() for name, t in inputs.items()}
    merge_lora(**inputs).zero_()
    assert all(torch.equal(t, before[name]) for name, t in inputs.items())


def test_closed_gates_leave_the_weight():
    inputs = make_factors(17, 13, 5, gates="closed", dtype=torch.bfloat16)
    assert torch.equal(merge_lora(**inputs), inputs["weight"])


def test_autocast_does_not_lower_the_sum():
    """A merge at the end of a training loop may stand inside its autocast block."""
    inputs = make_factors(17, 13, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = merge_lora(**inputs, scaling=SCALING)
    assert torch.equal(merged, merge_lora(**inputs, scaling=SCALING))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lora_A", (2, 7)), ("lora_A", (3, 8)), ("lora_B", (7, 2)), ("lora_B", (6, 3)), ("z", (3,)), ("z", (1,)), ("z", (6, 2))],
    ids=str,
)
def test_shape_error(name, shape):
    """Also where broadcasting would have given an answer: z of one gate, or a gate per token."""
    inputs = make_factors(8, 6, 2)
    inputs[name] = torch.ones(shape)
    with pytest.raises(ValueError, match=f"{name} \\({', '.join(map(str, shape))}"):
        merge_lora(**inputs)


def test_reduced_matmul_precision_does_not_reach_the_sum():
    """A training script's set_float32_matmul_precision is for its own products, and is as it was afterwards."""
    weight, lora_A, lora_B = torch.randn(24, 40), torch.randn(4, 40), torch.randn(24, 4)
    expected = merge_lora(weight, lora_A, lora_B)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(merge_lora(weight, lora_A, lora_B), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
