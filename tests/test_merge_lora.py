import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cobra_kernels import extension, gated_lora_linear, merge_lora, merge_lora_ref
from cobra_kernels.merge_lora import MergeItem, merge_lora_group, merge_lora_group_ref
from cobra_kernels.testing import assert_within_budget, make_inputs

SCALING = 1.7
HALF = [torch.bfloat16, torch.float16]
COMPILED = [torch.float32, *HALF]
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


# groups

MODULE = sys.modules["cobra_kernels.merge_lora"]  # the name cobra_kernels.merge_lora is the function's
GROUP_SHAPES = {  # K, N, r
    "one element": (1, 1, 1),
    "one column": (1, 37, 3),
    "one row": (131, 1, 2),
    "rank 0": (19, 23, 0),
    "narrower than a register": (3, 5, 2),
    "primes": (101, 211, 7),
    "several tiles": (600, 400, 16),
    "r = 65": (70, 40, 65),
    "r = 512": (40, 30, 512),
    "r = 1024, whole blocks": (192, 32, 1024),
    "r = 1024": (40, 30, 1024),
}

needs_extension = pytest.mark.skipif(extension.load() is None, reason="the compiled extension was not built")


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)


def make_item(K, N, r, *, dtype=torch.float32, name="weight", exact=False, **options):
    """Factors in fp32, as adapters are trained; `exact` ones have a product without rounding."""
    weight = make_factors(K, N, r, gates=None, dtype=dtype, **options)["weight"]
    factors = [make_factors(K, N, r, gates=None, **options)[factor] for factor in ("lora_A", "lora_B")]
    return MergeItem(weight, *[(factor * 64).round() / 64 if exact else factor for factor in factors], name)


def merge_oracle(items):
    """W + B A in fp64."""
    return [item.weight.double() + item.lora_B.double() @ item.lora_A.double() for item in items]


def merge_torch(items):
    return [merge_lora(item.weight, item.lora_A, item.lora_B) for item in items]


def same_bits(a, b):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.equal(a.contiguous().view(integers[a.element_size()]), b.contiguous().view(integers[b.element_size()]))


def patterns(dtype):
    """Every number of a half format, NaN left out."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    return numbers[~numbers.isnan()]


@needs_extension
def test_groups_are_compiled(monkeypatch):
    """The tests below are of the extension, not of torch."""
    monkeypatch.setattr(MODULE, "merge_lora", None)
    for dtype in COMPILED:
        merge_lora_group([make_item(5, 4, 2, dtype=dtype), make_item(5, 4, 2, dtype=dtype, layout="transposed")])


@pytest.mark.parametrize("dtype", COMPILED, ids=str)
@pytest.mark.parametrize("shape", GROUP_SHAPES.values(), ids=GROUP_SHAPES)
def test_group_within_budget(shape, dtype, level):
    """Of the error that torch's own fp32 sum makes."""
    items = [make_item(*shape, dtype=dtype, seed=seed) for seed in range(4)]
    merged, _ = merge_lora_group(items)
    assert [t.dtype for t in merged] == [dtype] * 4
    assert_within_budget(merged, merge_torch(items), merge_oracle(items))


@pytest.mark.parametrize("dtype", COMPILED, ids=str)
def test_ragged_group(dtype, level):
    """Sites of every shape, rank and layout in one call: each as if it were alone, and nothing beside the weights is read."""
    layouts = ["contiguous", "slices", "transposed"]
    shapes = [*GROUP_SHAPES.values(), *GROUP_SHAPES.values()][:17]
    items = [make_item(*shape, layout=layouts[i % 3], dtype=dtype) for i, shape in enumerate(shapes)]
    merged, statistics = merge_lora_group(items)
    assert_within_budget(merged, merge_torch(items), merge_oracle(items))
    for item, result, row in zip(items, merged, statistics, strict=True):
        (alone,), sums = merge_lora_group([item])
        assert same_bits(result, alone) and torch.equal(row, sums[0])


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(0, 20)),
    layout=st.sampled_from(["contiguous", "slices", "transposed"]),
    dtype=st.sampled_from(COMPILED),
    seed=st.integers(0, 2**16),
)
def test_group_of_any_shape(shape, layout, dtype, seed):
    """Where the sum is exact the merged weight is the correctly rounded one, and the statistics are those of fp64."""
    item = make_item(*shape, layout=layout, dtype=dtype, seed=seed, exact=True)
    merged, statistics = merge_lora_group([item])
    expected, sums = merge_lora_group_ref([item])
    assert torch.equal(merged[0], expected[0])
    torch.testing.assert_close(statistics, sums, rtol=1e-6, atol=0)


def test_result_lies_as_the_weight_does():
    """A Conv1D's weight is (K, N): the result for its transposed view goes back into it without a copy."""
    conv = torch.randn(33, 65)
    item = MergeItem(conv.t(), torch.randn(4, 33), torch.randn(65, 4))
    (merged,), _ = merge_lora_group([item])
    assert merged.shape == (65, 33) and merged.t().is_contiguous()
    sliced = make_item(17, 13, 3, layout="slices")
    assert merge_lora_group([sliced])[0][0].is_contiguous()


@pytest.mark.parametrize("layout", ["contiguous", "slices", "transposed"])
@pytest.mark.parametrize("dtype", COMPILED, ids=str)
def test_in_place(dtype, layout, level):
    """The weight itself as target: the same bits, nothing beside it is written, and autograd knows."""
    items = [make_item(*shape, dtype=dtype, layout=layout) for shape in [(101, 211, 7), (19, 23, 0), (64, 32, 8)]]
    expected, sums = merge_lora_group(items)
    versions = [item.weight._version for item in items]
    merged, statistics = merge_lora_group(items, out=[item.weight for item in items])
    assert all(same_bits(item.weight, e) for item, e in zip(items, expected, strict=True))
    assert all(m is item.weight for m, item in zip(merged, items, strict=True))
    assert all(item.weight._version > version for item, version in zip(items, versions, strict=True))
    assert torch.equal(statistics, sums)
    if layout == "slices":
        assert all(item.weight._base[:, [0, 1, -3, -2, -1]].isnan().all() for item in items)


def test_new_results_leave_the_weights():
    item = make_item(16, 24, 0)
    before = item.weight.clone()
    merge_lora_group([item])[0][0].zero_()
    assert torch.equal(item.weight, before)


def test_bits_do_not_depend_on_threads():
    """Nor do the statistics; more threads than cores and than work included."""
    items = [make_item(*shape, dtype=dtype) for shape in [(700, 900, 9), (3, 5, 2), (384, 384, 8)] for dtype in COMPILED]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 64):
            torch.set_num_threads(threads)
            results.append(merge_lora_group(items))
    finally:
        torch.set_num_threads(before)
    (expected, sums), *others = results
    for merged, statistics in others:
        assert all(same_bits(a, b) for a, b in zip(merged, expected, strict=True))
        assert torch.equal(statistics, sums)


@pytest.mark.parametrize("dtype", [*COMPILED, torch.float64], ids=str)
def test_statistics(dtype, level):
    """Against the equations in fp64, for several tiles and for one."""
    items = [make_item(600, 400, 7, dtype=dtype, exact=True), make_item(37, 53, 5, dtype=dtype, exact=True)]
    merged, statistics = merge_lora_group(items)
    for item, result, row in zip(items, merged, statistics, strict=True):
        delta, weight = item.lora_B.double() @ item.lora_A.double(), item.weight.double()
        lost = result.double() - weight - delta
        assert row.tolist() == pytest.approx([t.square().sum().item() for t in (delta, weight, lost)], rel=1e-6, abs=0)
        assert dtype == torch.float64 or row[2] > 0
    assert merge_lora_group(items, statistics=False)[1] is None


@pytest.mark.parametrize("scale", [1e-22, 1e25])
def test_statistics_beyond_the_squares_of_fp32(scale, level):
    """Weights of 1e-22 and 1e25 have squares that fp32 does not hold."""
    item = make_item(70, 60, 5)
    item = MergeItem(item.weight * scale, item.lora_A, item.lora_B * scale)
    _, statistics = merge_lora_group([item])
    torch.testing.assert_close(statistics[:, :2], merge_lora_group_ref([item])[1][:, :2], rtol=1e-5, atol=0)
    assert 0 < statistics[0, 2] < float("inf")


def test_an_update_of_zero_costs_no_second_pass(monkeypatch):
    monkeypatch.setattr(MODULE, "_statistics_ref", lambda *_: pytest.fail("measured again"))
    item = make_item(33, 21, 3)
    _, statistics = merge_lora_group([MergeItem(item.weight, item.lora_A, torch.zeros_like(item.lora_B))])
    assert statistics[0, ::2].tolist() == [0.0, 0.0] and statistics[0, 1] > 0


def test_small_updates_of_large_weights(level):
    """What rounding loses is told to three digits where the update is 1e-4 of the weight, or less than its last bit."""
    for dtype, size in [(torch.float32, 1e-4), (torch.float32, 1e-8), (torch.bfloat16, 1e-4), (torch.float16, 1e-6)]:
        item = make_item(200, 120, 4, dtype=dtype)
        item = MergeItem(item.weight, item.lora_A, item.lora_B * size)
        (merged,), statistics = merge_lora_group([item])
        delta = item.lora_B.double() @ item.lora_A.double()
        lost = merged.double() - item.weight.double() - delta
        assert statistics[0, 2].item() == pytest.approx(lost.square().sum().item(), rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", COMPILED, ids=str)
def test_statistics_tell_what_is_not_finite(dtype, place, bad, level):
    """One number anywhere, also in the last column; the other sites keep theirs."""
    items = [make_item(33, 21, 3, dtype=dtype) for _ in range(3)]
    getattr(items[1], place)[-1, -1] = bad
    merged, statistics = merge_lora_group(items)
    assert [m.isfinite().all().item() for m in merged] == [True, False, True]
    assert statistics[:, 2].isfinite().tolist() == [True, False, True]
    expected = merge_torch(items)[1]
    assert torch.equal(merged[1].isnan(), expected.isnan()) and torch.equal(merged[1].isinf(), expected.isinf())


def test_overflow_of_a_half_is_told(level):
    item = MergeItem(torch.full((3, 5), 60000.0).half(), torch.ones(1, 5), torch.full((3, 1), 6000.0))
    (merged,), statistics = merge_lora_group([item])
    assert merged.isinf().all() and not statistics[0, 2].isfinite()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_half_is_read_exactly(dtype, level):
    """W - W = 0, subnormals included; and an update of rank 0 leaves every pattern as it is, -0 too."""
    numbers = patterns(dtype)
    numbers = numbers[numbers.isfinite()][:, None]
    (zero,), _ = merge_lora_group([MergeItem(numbers, torch.ones(1, 1), -numbers.float())])
    assert (zero == 0).all()
    numbers = patterns(dtype)[None]
    (kept,), _ = merge_lora_group([MergeItem(numbers, torch.empty(0, numbers.shape[1]), torch.empty(1, 0))])
    assert same_bits(kept, numbers)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounding_is_torchs(dtype, level):
    """fp32 of any exponent, and both neighbours of every number and of every half-way point."""
    halves = patterns(dtype).float()
    halfway = (halves + torch.roll(halves, 1)) / 2
    close = [torch.nextafter(t, torch.full_like(t, to)) for t in (halves, halfway) for to in (float("inf"), -float("inf"))]
    anything = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    numbers = torch.cat([halves, halfway, *close, anything, torch.tensor([65519.99, 65520.0, 3.3895e38, 3.3896e38])])
    numbers = numbers[~numbers.isnan()][None]
    item = MergeItem(torch.full(numbers.shape, -0.0, dtype=dtype), numbers, torch.ones(1, 1))
    assert same_bits(merge_lora_group([item])[0][0], numbers.to(dtype))


def test_group_without_extension(without_extension):
    items = [make_item(*shape, dtype=dtype) for shape in [(101, 211, 7), (19, 23, 0)] for dtype in (*COMPILED, torch.float64)]
    merged, statistics = merge_lora_group(items)
    assert all(same_bits(a, b) for a, b in zip(merged, merge_torch(items), strict=True))
    torch.testing.assert_close(statistics, merge_lora_group_ref(items)[1], rtol=0.1, atol=1e-25)
    merge_lora_group(items, out=[item.weight for item in items])
    assert all(same_bits(item.weight, m) for item, m in zip(items, merged, strict=True))


@needs_extension
def test_torch_takes_what_the_extension_does_not(monkeypatch):
    """fp64 and views without neighbours, among others in one call."""
    spread = torch.randn(26, 34)[::2, ::2]
    items = [make_item(33, 21, 3), make_item(33, 21, 3, dtype=torch.float64)]
    items += [MergeItem(spread, torch.randn(2, 17), torch.randn(13, 2)), make_item(33, 21, 3, seed=1)]
    taken = []
    monkeypatch.setattr(MODULE, "merge_lora", lambda *args: taken.append(args[0]) or merge_lora(*args))
    merged, statistics = merge_lora_group(items)
    assert [id(w) for w in taken] == [id(items[i].weight) for i in (1, 2)]
    assert_within_budget(merged[1], merge_torch(items)[1], merge_oracle(items)[1])
    torch.testing.assert_close(statistics[:, :2], merge_lora_group_ref(items)[1][:, :2], rtol=1e-5, atol=0)


def test_half_factors_and_parameters():
    """What a model holds: parameters that require gradients, factors in the weight's dtype."""
    item = make_item(33, 21, 3, dtype=torch.bfloat16)
    half = MergeItem(torch.nn.Parameter(item.weight), torch.nn.Parameter(item.lora_A.bfloat16()), item.lora_B.bfloat16())
    (merged,), _ = merge_lora_group([half])
    assert not merged.requires_grad and type(merged) is torch.Tensor
    assert_within_budget(merged, merge_torch([half])[0].detach(), merge_oracle([half])[0].detach())


def test_empty_group():
    merged, statistics = merge_lora_group([])
    assert merged == [] and statistics.shape == (0, 3)
    (merged,), statistics = merge_lora_group([MergeItem(torch.empty(0, 4), torch.ones(2, 4), torch.ones(0, 2))])
    assert merged.shape == (0, 4) and statistics.tolist() == [[0.0, 0.0, 0.0]]


def test_group_errors():
    good = make_item(8, 6, 2, name="mlp.fc1")
    weight, A, B = good.weight, good.lora_A, good.lora_B
    for item, match in [
        (
            MergeItem(weight, A[:, :7], B, "mlp.fc2"),
            r"mlp\.fc2: lora_A \(2, 7\) and lora_B \(6, 2\) do not fit weight \(6, 8\)",
        ),
        (MergeItem(weight, A, B[:, :1], "mlp.fc2"), r"mlp\.fc2: lora_A \(2, 8\) and lora_B \(6, 1\)"),
        (MergeItem(weight[0], A, B, "mlp.fc2"), r"mlp\.fc2: .* weight \(8,\)"),
        (MergeItem(weight.to(torch.int8), A, B, "mlp.fc2"), r"mlp\.fc2 is torch\.int8; .* dequantise"),
        (MergeItem(weight, A.to("meta"), B, "mlp.fc2"), r"mlp\.fc2 is on cpu, lora_A on meta"),
    ]:
        with pytest.raises(ValueError, match=match):
            merge_lora_group([good, item])
    for out, match in [
        ([], "out has 0 tensors for 1 items"),
        ([weight.double()], r"mlp\.fc1: out is \(6, 8\) torch\.float64 on cpu, the weight is \(6, 8\) torch\.float32"),
        ([weight[:, :7]], r"mlp\.fc1: out is \(6, 7\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            merge_lora_group([good], out=out)
    with pytest.raises(ValueError, match="same memory twice"):
        merge_lora_group([good, good], out=[weight, weight])
