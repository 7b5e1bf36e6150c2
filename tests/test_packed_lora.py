import importlib.util
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted_copy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from cobra_kernels.packed_lora import packed_lora, packed_lora_, packed_lora_ref, segment_tokens
from cobra_kernels.testing import assert_within_budget, make_inputs

ROWS = [2, 0, -1, 2, 1, 0]  # ids of a batch's rows
PATHS = [("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float16)]
PATHS += [("triton", torch.float32), ("triton", torch.float16)]  # the interpreter's bf16 product is wrong

# ids, K, N, ranks
CASES = {
    "one token": ([1], 16, 24, (4, 6)),
    "primes, which no tile divides": (ROWS, 97, 131, (5, 7, 19)),
    "every dimension a multiple of 16": (ROWS * 3, 64, 48, (16, 32, 64)),
    "rank 0": (ROWS, 12, 16, (3, 4, 0)),
    "every rank 0": (ROWS, 12, 16, (0, 0, 0)),
    "rank 1 beside rank 300": (ROWS, 12, 16, (1, 300, 2)),
    "no token": ([], 12, 18, (3, 2)),
    "no token with an adapter": ([-1] * 5, 12, 18, (3, 2)),
    "no column": ([0, 1], 12, 0, (3, 2)),
    "one adapter for the whole batch": ([1] * 70, 20, 18, (3, 12)),
    "runs longer than a block": ([0] * 70 + [-1] * 3 + [2] * 40 + [0] * 9, 20, 18, (3, 5, 20)),
    "runs of one token": ([i % 3 - 1 for i in range(37)], 20, 18, (3, 5)),
    "20 adapters, some absent": ([(7 * i) % 20 for i in range(16)], 16, 24, tuple(range(20))),
    "K long enough for planes": ([0, 1, 1], 2051, 16, (3, 5)),
}


def make_operands(ids, K, N, ranks, **options):
    R = sum(ranks)
    inputs = make_inputs((len(ids),), K, N, max(R, 1), gates=None, bias=False, **options)
    base = F.linear(inputs["x"].nan_to_num(), inputs["weight"])
    lora_A, lora_B = inputs["lora_A"][:R], inputs["lora_B"][:, :R]
    if lora_B.is_contiguous():
        lora_B = lora_B.t().contiguous().t()  # the storage that is recommended
    return base, inputs["x"], lora_A, lora_B, ranks, torch.tensor(ids, dtype=torch.int64)


def widened(operands):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in operands]


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_copy("packed_lora_triton")


@pytest.fixture
def run(request):
    """The function of a path: the public one, or the Triton launcher on a copy of base, as the op calls it."""

    def launched(base, x, lora_A, lora_B, ranks, ids):
        y = base.clone()
        request.getfixturevalue("interpreted").launch(y, x, lora_A, lora_B, ranks, segment_tokens(ids).blocks)
        return y

    return {"torch": packed_lora, "triton": launched}


@pytest.mark.parametrize(("path", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_within_budget(run, case, path, dtype):
    draws = [make_operands(*case, dtype=dtype, seed=seed) for seed in range(2 if path == "triton" else 6)]
    fast, ref, oracle = zip(*[(run[path](*d), packed_lora_ref(*d), packed_lora_ref(*widened(d))) for d in draws], strict=True)
    assert fast[0].dtype == dtype
    assert_within_budget(fast, ref, oracle)


@pytest.mark.parametrize(("path", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("layout", ["slices", "transposed", "plain"])
def test_strided_operands(run, layout, path, dtype):
    """Slices have NaN around them; plain is lora_B as peft stores it."""
    options = {"dtype": dtype, "layout": "contiguous" if layout == "plain" else layout}
    draws = [make_operands(*CASES["primes, which no tile divides"], **options, seed=seed) for seed in range(2)]
    if layout == "plain":
        draws = [(base, x, lora_A, lora_B.contiguous(), *rest) for base, x, lora_A, lora_B, *rest in draws]
    fast, ref, oracle = zip(*[(run[path](*d), packed_lora_ref(*d), packed_lora_ref(*widened(d))) for d in draws], strict=True)
    assert_within_budget(fast, ref, oracle)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data(), K=st.integers(1, 9), N=st.integers(1, 9), ranks=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_every_token_for_itself(data, K, N, ranks):
    """Against the sentence at the top of the module, a token at a time."""
    lengths = data.draw(st.lists(st.tuples(st.integers(-1, len(ranks) - 1), st.integers(1, 12)), max_size=6))
    ids = [adapter for adapter, length in lengths for _ in range(length)]
    operands = make_operands(ids, K, N, tuple(ranks), dtype=torch.float64)
    base, x, lora_A, lora_B, _, _ = operands
    expected = base.clone()
    for t, adapter in enumerate(ids):
        own = slice(sum(ranks[:adapter]), sum(ranks[: adapter + 1])) if adapter >= 0 else slice(0, 0)
        expected[t] += lora_B[:, own] @ (lora_A[own] @ x[t])
    torch.testing.assert_close(packed_lora(*operands), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed_lora_ref(*operands), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(runs=st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 80)), max_size=8))
def test_blocks_hold_every_token_once(runs):
    ids = torch.tensor([adapter for adapter, length in runs for _ in range(length)], dtype=torch.int64)
    found = []
    for adapter, *tokens in segment_tokens(ids).blocks.tolist():
        found += [(t, adapter) for t in tokens if t >= 0]
    assert sorted(found) == [(t, a) for t, a in enumerate(ids.tolist()) if a >= 0]


@pytest.mark.parametrize(
    ("ids", "spans", "order"),
    [
        ([2, 2, -1, 0], [[2, 0, 2], [0, 3, 4]], None),
        ([1, 0, -1, 1], [[0, 0, 1], [1, 1, 3]], [1, 0, 3]),
        ([1] * 20 + [0] * 20 + [1] * 20, [[1, 0, 20], [0, 20, 40], [1, 40, 60]], None),
        ([-1, -1], [], None),
    ],
    ids=["runs", "short runs", "long runs", "none"],
)
def test_only_short_runs_of_one_adapter_are_sorted(ids, spans, order):
    segments = segment_tokens(torch.tensor(ids))
    assert segments.spans.tolist() == spans
    assert (segments.order if order is None else segments.order.tolist()) == order


def test_large_tiles_are_for_rows_that_load_16_bytes_at_a_time(interpreted):
    """The recommended storage of half-precision adapters is one; fp32, odd widths and lora_B as peft stores it are not."""
    *_, lora_A, lora_B, _, _ = make_operands([0], 64, 48, (5, 11), dtype=torch.float16)
    assert interpreted._wide(lora_A, lora_B.t())
    for narrow in (lora_A.float(), lora_A[:, :-1], lora_A[:, 1:-15], lora_B.contiguous().t()):
        assert not interpreted._wide(lora_A, narrow)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_other_adapters_cannot_spoil_a_token(run, path):
    """Not one that is absent, and not the neighbour's: what is masked is selected away, never multiplied by 0."""
    base, x, lora_A, lora_B, ranks, ids = make_operands([0, 1, 0, 0, -1], 20, 18, (5, 7, 3))
    expected = run[path](base, x, lora_A, lora_B, ranks, ids)
    for broken in (slice(5, 12), slice(12, 15)):
        lora_A[broken] = float("nan")
        lora_B[:, broken] = float("inf")
    y = run[path](base, x, lora_A, lora_B, ranks, ids)
    assert torch.equal(y[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])
    assert y[1].isnan().all()


@pytest.mark.parametrize(("path", "dtype"), PATHS, ids=str)
def test_base_rows_stay_and_bits_repeat(run, path, dtype):
    operands = make_operands(ROWS * 3, 97, 131, (5, 0, 19), dtype=dtype)
    base, ids = operands[0], operands[-1]
    alone = (ids == -1) | (ids == 1)
    base[alone, 0] = -0.0
    first, again = run[path](*operands), run[path](*operands)
    assert torch.equal(first.view(torch.uint8), again.view(torch.uint8))
    assert torch.equal(first[alone].view(torch.uint8), base[alone].view(torch.uint8))


def test_segments_serve_layers_of_other_shapes_and_ranks():
    segments = segment_tokens(torch.tensor(ROWS))
    for K, N, ranks in ((12, 16, (3, 4, 5)), (20, 6, (8, 0, 1))):
        *operands, ids = make_operands(ROWS, K, N, ranks)
        assert torch.equal(packed_lora(*operands, segments), packed_lora(*operands, ids))


def test_in_place_is_the_same_and_the_other_is_new():
    base, *operands = make_operands(*CASES["runs of one token"])
    before = base.clone()
    y = packed_lora(base, *operands)
    assert torch.equal(base, before)
    assert packed_lora_(base, *operands) is base
    assert torch.equal(base, y)


def test_in_place_into_a_slice():
    """Fused projections write side by side: what is around the slice stays."""
    base, *operands = make_operands(*CASES["runs of one token"])
    buffer = torch.full((base.shape[0] + 2, base.shape[1] + 3), 7.0)
    inside = buffer[1:-1, 1:-2]
    inside.copy_(base)
    packed_lora_(inside, *operands)
    assert torch.equal(inside, packed_lora(base, *operands))
    inside.fill_(7.0)
    assert (buffer == 7).all()


def test_autocast_changes_nothing():
    operands = make_operands(ROWS, 12, 16, (3, 4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = packed_lora(*operands)
    assert torch.equal(y, packed_lora(*operands))


def test_reference_is_differentiable():
    base, x, lora_A, lora_B, ranks, ids = make_operands(ROWS, 3, 4, (2, 0, 1), dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (base, x, lora_A, lora_B)]
    assert torch.autograd.gradcheck(lambda *tensors: packed_lora_ref(*tensors, ranks, ids), leaves)


@pytest.mark.parametrize("prepared", [True, False])
def test_opcheck(prepared):
    *tensors, ranks, ids = make_operands(ROWS, 12, 16, (3, 4, 5))
    segments = segment_tokens(ids)
    assert segments.order is not None
    extra = (segments.spans, segments.order) if prepared else (None, None)
    torch.library.opcheck(torch.ops.cobra.packed_lora_.default, (*tensors, list(ranks), ids, *extra))


@pytest.mark.parametrize("op", ["packed_lora_", "packed_lora_triton_"])
def test_fake_tensors(op):
    *tensors, ranks, ids = make_operands(ROWS, 12, 16, (3, 4, 5))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (*tensors, ids)]
        assert getattr(torch.ops.cobra, op)(*fakes[:-1], ranks, fakes[-1], None, None) is None
        assert packed_lora(*fakes[:-1], ranks, fakes[-1]).shape == tensors[0].shape


def test_meta_tensors():
    *tensors, ranks, ids = make_operands(ROWS, 12, 16, (3, 4, 5))
    y = packed_lora(*[t.to("meta") for t in tensors], ranks, ids)
    assert (y.shape, y.device.type) == (tensors[0].shape, "meta")


@pytest.mark.parametrize("prepared", [True, False])
def test_compiles_without_a_graph_break(prepared):
    """Batches that ask for other adapters in the same order of runs share one graph."""
    torch.compiler.reset()
    compiled = torch.compile(packed_lora, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids in ([0, 0, 1, 1, -1, 2], [2, 2, 0, 0, 1, -1]):
            *operands, ids = make_operands(ids, 12, 16, (3, 4, 5))
            y = compiled(*operands, segment_tokens(ids) if prepared else ids)
            assert torch.equal(y, packed_lora(*operands, ids))


@pytest.mark.parametrize("name", ["base", "x", "lora_A", "lora_B"])
def test_gradient_is_refused(name):
    """It would be silently lost."""
    operands = make_operands(ROWS, 12, 16, (3, 4, 5))
    operands[("base", "x", "lora_A", "lora_B").index(name)].requires_grad_()
    with pytest.raises(RuntimeError, match=f"no backward, and {name} requires grad"):
        packed_lora(*operands)
    with torch.no_grad():
        assert not packed_lora(*operands).requires_grad


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.ones(5, 16), "^base has shape"),
        (1, torch.ones(6, 11), "^x has shape"),
        (1, torch.ones(6, 1, 12), "^x has shape"),
        (2, torch.ones(13, 12), "^ranks .* sum to the 13 rows"),
        (3, torch.ones(16, 11), "^lora_B has shape"),
        (4, (3, 4, 4), "^ranks .* sum to the 12 rows"),
        (4, (13, 4, -5), "^ranks .* 0 or more"),
        (5, torch.tensor([0, 1, 3, 0, 0, 0]), "^ids holds 3, .* end at 2"),
        (5, torch.tensor([0, 1, -2, 0, 0, 0]), "^ids holds -2"),
        (5, torch.tensor([0, 1, 2, 0, 0]), "beside 5 ids"),
        (5, torch.zeros(6), "^ids must be"),
        (5, torch.zeros(6, 1, dtype=torch.int64), "^ids must be"),
        (1, torch.ones(6, 12, dtype=torch.float16), "^base is torch.float32 and x torch.float16; cast"),
        (2, torch.ones(12, 12, device="meta"), "^lora_A is on meta and x on cpu; move"),
    ],
    ids=str,
)
def test_bad_input_names_the_operand(index, value, message):
    operands = list(make_operands(ROWS, 12, 16, (3, 4, 5)))
    operands[index] = value
    with pytest.raises(ValueError, match=message):
        packed_lora(*operands)


def test_triton_raises_where_it_cannot_run(monkeypatch):
    """An explicit request never falls back in silence."""
    operands = make_operands(ROWS, 12, 16, (3, 4, 5))
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        packed_lora(*operands, backend="cuda")
    if importlib.util.find_spec("triton"):
        with pytest.raises(RuntimeError, match="needs a CUDA device, and x is on cpu"):
            packed_lora(*operands, backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs the package triton"):
        packed_lora(*operands, backend="triton")
