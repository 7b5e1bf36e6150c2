"""The Triton path of `gated_lora_linear` through Triton's interpreter: the public function, less its check of the device."""

from functools import partial
from importlib import import_module

import pytest
import torch
from interpreter import interpreted_copy
from models import Mlp, attached, layers_of, stir
from torch.utils.checkpoint import checkpoint

from cobra_kernels import ConcreteSample, draw_words, gated_lora_linear, gated_lora_linear_ref, sample_gates
from cobra_kernels import gated_lora_configs as configs
from cobra_kernels.testing import assert_all_within_budget, make_inputs, output_and_gradients

SCALING = 1.7
BIG = 2**64 - 1
DTYPES = [torch.float32, torch.float16]  # the interpreter's bf16 product is wrong
GATES = ["rank", "token", "closed", None]

ref = partial(gated_lora_linear_ref, scaling=SCALING)

# rows, K, N, r, dtypes; sizes of multiples of 16 take the wide tables in fp16
SHAPES = {
    "one token": ((1,), 16, 32, 4, DTYPES),
    "primes, which no tile divides": ((2, 5), 13, 11, 7, DTYPES),
    "r = 1": ((3,), 12, 10, 1, [torch.float32]),
    "several tiles of each dimension": ((66,), 37, 71, 33, [torch.float32]),
    "wide, r not a power of two": ((70,), 64, 48, 24, [torch.float16]),
    "wide, several tiles of rank": ((20,), 32, 144, 70, [torch.float16]),
}
CASES = [pytest.param(shape, dtype, id=f"{name}-{dtype}") for name, (*shape, dtypes) in SHAPES.items() for dtype in dtypes]


@pytest.fixture(scope="module", autouse=True)
def triton_path():
    """The op's kernels are interpreted copies, and a CPU passes for a device; all else is what a GPU runs."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cobra_kernels.gated_lora_launch.products", interpreted_copy("gated_lora_linear_triton"))
        patch.setattr(
            "cobra_kernels.gated_lora_launch.small", interpreted_copy("gated_lora_small_triton", uses=("gates_math_triton",))
        )
        patch.setattr(import_module("cobra_kernels.gated_lora_linear"), "_check_triton", lambda *operands: None)
        patch.setattr(configs, "pick_base_path", lambda *sizes: "fused")  # of layers this small, whatever is faster
        yield


def fused(**operands):
    return gated_lora_linear(**operands, scaling=SCALING, backend="triton")


def make(*shape, gates="rank", seed=0, **options):
    """Operands with open and closed gates side by side."""
    inputs = make_inputs(*shape, gates=gates, seed=seed, **options)
    if gates in ("rank", "token"):
        inputs["z"][..., ::3] = 0
    return inputs


def assert_budget(*shape, dtype, draws=2, **options):
    assert_all_within_budget(fused, ref, [make(*shape, dtype=dtype, seed=seed, **options) for seed in range(draws)], dtype)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_output_and_every_gradient_within_budget(shape, gates, dtype):
    """The gradient of a closed gate among them, which is not 0."""
    assert_budget(*shape, gates=gates, dtype=dtype)


def test_rank_1024():
    assert_budget((3,), 16, 32, 1024, gates=None, dtype=torch.float16, draws=1)


@pytest.mark.parametrize(
    ("shape", "gates"),
    [(((3,), 2064, 16, 5), "token"), (((17,), 16, 2064, 40), None), (((530,), 16, 48, 5), "rank")],
    ids=["of h", "of g", "over tokens"],
)
def test_sums_in_planes(shape, gates):
    assert_budget(*shape, gates=gates, dtype=torch.float16, draws=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", ["rank", "token"])
@pytest.mark.parametrize("layout", ["slices", "transposed"])
def test_strided_operands(layout, gates, dtype):
    """Slices have NaN around them, and a transposed weight is how Conv1D's weight arrives."""
    assert_budget((21,), 32, 48, 12, gates=gates, layout=layout, dtype=dtype, draws=1)


@pytest.mark.parametrize("expanded", [True, False], ids=["expanded", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_output_gradient(dtype, expanded):
    """A sum's gradient is one number with strides 0."""
    inputs = {name: t.requires_grad_() for name, t in make((16,), 32, 48, 20, dtype=dtype).items()}
    dy = torch.tensor(0.5, dtype=dtype).expand(16, 48) if expanded else torch.randn(48, 16).to(dtype).t()
    strided, plain = (torch.autograd.grad(fused(**inputs), list(inputs.values()), d) for d in (dy, dy.contiguous()))
    torch.testing.assert_close(strided, plain)


@pytest.mark.parametrize("gates", ["rank", "token"])
def test_fp32_adapter_on_a_half_precision_layer(gates):
    """Each gradient is its operand's dtype, and those of A and B are sums that were never rounded to half precision."""
    inputs = make((20,), 32, 48, 6, gates=gates, dtype=torch.float16)
    inputs |= {name: t for name, t in make((20,), 32, 48, 6, gates=gates).items() if name in ("lora_A", "lora_B", "z")}
    assert_all_within_budget(fused, ref, [inputs], torch.float16)
    assert {name: g.dtype for name, g in output_and_gradients(fused, inputs).items()} == {
        f"d{name}": t.dtype for name, t in inputs.items()
    } | {"y": torch.float16}


@pytest.fixture(params=["fused", "addmm"])
def base_path(request, monkeypatch):
    monkeypatch.setattr(configs, "pick_base_path", lambda *sizes: request.param)


@pytest.mark.parametrize("gates", GATES)
def test_the_frozen_product_may_be_cublas(gates, monkeypatch):
    monkeypatch.setattr(configs, "pick_base_path", lambda *sizes: "addmm")
    assert_budget((20,), 32, 48, 40, gates=gates, dtype=torch.float16)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.usefixtures("base_path")
@pytest.mark.parametrize("trained", [True, False], ids=["gate gets a gradient", "gate is fixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_closed_reaches_nothing(dtype, trained):
    """NaN in closed columns stays in their own dz: they are selected away, never multiplied by 0."""
    inputs = make((40,), 32, 48, 20, dtype=dtype)
    closed, is_open = inputs["z"] == 0, inputs["z"] != 0
    inputs["lora_A"][closed], inputs["lora_B"][:, closed] = float("nan"), float("inf")
    fixed = {} if trained else {"z": inputs.pop("z")}
    found = output_and_gradients(partial(fused, **fixed), inputs)
    if trained:
        dz = found.pop("dz")
        assert dz[closed].isnan().all() and dz[is_open].isfinite().all()
    assert all(t.isfinite().all() for t in found.values())
    assert (found["dlora_A"][closed] == 0).all() and (found["dlora_B"][:, closed] == 0).all()


def test_nothing_open_is_the_base_layer():
    """To the bit: no rank is looped over."""
    inputs = make((40,), 32, 48, 20, gates="closed", dtype=torch.float16)
    inputs["lora_A"].fill_(float("nan"))
    inputs["lora_B"].fill_(float("nan"))
    other = make_inputs((40,), 32, 48, 1, gates="closed", dtype=torch.float16)
    assert torch.equal(fused(**inputs), fused(**other | {name: inputs[name] for name in ("x", "weight", "bias")}))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.usefixtures("base_path")
@pytest.mark.parametrize("trained", [True, False], ids=["gates get a gradient", "gates are fixed"])
def test_a_rank_that_is_closed_for_all_tokens_reaches_nothing(trained):
    inputs = make((5,), 32, 48, 40, gates="token", dtype=torch.float16)
    inputs["z"][:, 20:] = 0
    inputs["lora_A"][20:], inputs["lora_B"][:, 20:] = float("nan"), float("inf")
    fixed = {} if trained else {"z": inputs.pop("z")}
    found = output_and_gradients(partial(fused, **fixed), inputs)
    if trained:
        dz = found.pop("dz")
        assert dz[:, 20:].isnan().all() and dz[:, :20].isfinite().all()
    assert all(t.isfinite().all() for t in found.values())
    assert (found["dlora_A"][20:] == 0).all() and (found["dlora_B"][:, 20:] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_tokens_closed_gates_are_selected_away():
    """Of h and of g; A itself is still multiplied into dx, because another token's gate is open."""
    inputs = make((5,), 32, 48, 6, gates="token", dtype=torch.float16)
    inputs["z"][1:, 2] = 0
    inputs["lora_A"][2] = float("nan")
    found = output_and_gradients(fused, inputs)
    assert found["y"][1:].isfinite().all() and found["y"][0].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_tiles_without_an_open_gate_are_not_read():
    """The inputs of tokens that no fixed gate is open for reach no h, and their gradient is the frozen layer's."""
    inputs = make((130,), 32, 48, 6, gates="token", dtype=torch.float16)
    z = inputs.pop("z")
    z[64:128] = 0  # a tile of tokens
    open_tokens = torch.cat((torch.arange(64), torch.arange(128, 130)))
    rest = {name: t[open_tokens] if name == "x" else t for name, t in inputs.items()}
    inputs["x"][64:128] = float("nan")
    found = fused(**inputs, z=z)
    torch.testing.assert_close(found[open_tokens], fused(**rest, z=z[open_tokens]))
    *_, gated, _, _, _ = torch.ops.cobra.gated_lora_forward_triton(
        inputs["x"], inputs["weight"], None, inputs["lora_A"], inputs["lora_B"], z, None, None, 1.0, False
    )
    assert (gated[64:128, :16] == 0).all()  # the tile of open ranks


@pytest.mark.parametrize("pattern", ["mixed", "open", "closed", "one open", "one closed"])
@pytest.mark.parametrize(("r", "dtype"), [(1, torch.float32), (16, torch.float32), (37, torch.float32), (150, torch.float16)])
def test_open_ranks_come_first(r, dtype, pattern):
    from cobra_kernels import gated_lora_fused

    z = {
        "mixed": (torch.arange(r) % 3 > 0).float(),
        "open": torch.ones(r),
        "closed": torch.zeros(r),
        "one open": (torch.arange(r) == r // 2).float(),
        "one closed": (torch.arange(r) != r // 2).float(),
    }[pattern]
    inputs = make_inputs((1,), 16, 16, r, gates=None, bias=False, dtype=dtype)
    *_, source, extent = gated_lora_fused.forward(
        **inputs, bias=None, gate=z, temperature=None, draw=None, scaling=1.0, keep_closed=True
    )
    tile, (open_end, end) = configs.pick_rank_tile(r, dtype == torch.float16), extent.tolist()
    is_open, closed = z.nonzero().flatten().tolist(), (z == 0).nonzero().flatten().tolist()
    assert open_end == -(-len(is_open) // tile) * tile and end == open_end + -(-len(closed) // tile) * tile <= len(source)
    expected = torch.full((len(source),), -1, dtype=torch.int32)
    expected[: len(is_open)] = torch.tensor(is_open, dtype=torch.int32)
    expected[open_end : open_end + len(closed)] = torch.tensor(closed, dtype=torch.int32)
    assert torch.equal(source, expected)


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_padded_rank_is_the_least_that_holds_every_partition(tile):
    for r in range(1, 200):
        needed = max(-(-opened // tile) + -(-(r - opened) // tile) for opened in range(r + 1)) * tile
        assert configs.padded_rank(r, tile, True) == needed
        assert configs.padded_rank(r, tile, False) == -(-r // tile) * tile


@pytest.mark.parametrize(
    ("seed", "step", "site"), [(0, 0, 0), (BIG, 1, 7), (2**32, BIG, 1), (2**63 + 11, 2**33 + 3, 2**32 - 5)], ids=str
)
def test_sampled_gates_are_those_of_sample_gates(seed, step, site):
    """Bit for bit: every half of seed and step reaches the words."""
    inputs = make_inputs((1,), 8, 8, 70, gates=None)
    logits, temperature = torch.linspace(-6, 6, 70), torch.tensor(0.3)
    sample = ConcreteSample(logits, draw_words(seed, step, site), temperature)
    operands = (inputs["x"], inputs["weight"], None, inputs["lora_A"], inputs["lora_B"], logits, temperature, sample.draw)
    z = torch.ops.cobra.gated_lora_forward_triton(*operands, 1.0, True)[3]
    expected = sample_gates(logits[None], seed=seed, step=step, temperature=temperature.item(), first_site=site)[0]
    assert torch.equal(z, expected)
    assert torch.equal(sample.gates(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_output_and_gradients_within_budget(dtype):
    """The gradient of the logits is that of the concrete sample."""
    several = []
    for seed in range(2):
        inputs = make_inputs((20,), 32, 48, 20, gates=None, dtype=dtype, seed=seed)
        several.append(inputs | {"logits": torch.linspace(-2, 2, 20)})

    def sampled(logits, **operands):
        return fused(z=ConcreteSample.of(logits, seed=3, step=5, site=2, temperature=0.5), **operands)

    def plain(logits, **operands):
        z = sample_gates(logits[None], seed=3, step=5, temperature=0.5, first_site=2)[0]
        return ref(z=z.to(operands["x"].dtype), **operands)

    assert_all_within_budget(sampled, plain, several, dtype)


@pytest.mark.parametrize("gates", ["rank", "token"])
@pytest.mark.parametrize(
    "required",
    [("x",), ("lora_A",), ("lora_B",), ("z",), ("weight", "bias"), ("lora_A", "lora_B"), ("x", "z")],
    ids="-".join,
)
def test_any_subset_of_gradients(required, gates):
    """What is frozen changes no gradient of what is not."""
    inputs = make((5,), 12, 16, 6, gates=gates)
    full = output_and_gradients(fused, inputs)
    fixed = {name: t for name, t in inputs.items() if name not in required}
    found = output_and_gradients(partial(fused, **fixed), {name: inputs[name] for name in required})
    for name, value in found.items():
        torch.testing.assert_close(value, full[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", ["rank", "token"])
def test_bits_repeat(gates, dtype):
    inputs = make((70,), 32, 48, 10, gates=gates, dtype=dtype)
    first, again = (output_and_gradients(fused, inputs) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("shape", [((0, 4), 12, 18, 6), ((3,), 12, 0, 6)], ids=["no token", "no column"])
@pytest.mark.parametrize("gates", ["rank", "token"])
def test_nothing_to_launch(shape, gates):
    assert_budget(*shape, gates=gates, dtype=torch.float32)


def test_autocast():
    """The product is autocast's, and the gradients are the parameters' fp32."""
    inputs = make((20,), 32, 48, 6)

    def autocast(**operands):
        with torch.autocast("cpu", dtype=torch.float16):
            return fused(**operands)

    found = output_and_gradients(autocast, inputs)
    assert found.pop("y").dtype == torch.float16
    assert {g.dtype for g in found.values()} == {torch.float32}
    expected = output_and_gradients(ref, inputs, torch.float64)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=5e-3, atol=5e-3 * expected[name].abs().max().item())


@pytest.mark.parametrize("gate", ["concrete", "hard_concrete", "straight_through", "open"])
def test_an_adapter_trains_as_on_torch(gate):
    """Loss and every gradient of a step, with gates drawn inside, as those of torch's path; evaluation too."""
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        model, adapter = attached(Mlp, backend=backend, gate=gate, seed=2**40 + 3)
        stir(adapter)
        adapter.step()
        drawn = [isinstance(layer.branch()[2], ConcreteSample) for layer in layers_of(adapter)]
        assert drawn == [backend == "triton" and gate == "concrete"] * 2
        loss = model(torch.linspace(-1, 1, 30).reshape(5, 6)).square().sum() + adapter.kl_loss()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append({"loss": loss.detach()} | gradients | {"mean": model.eval()(torch.ones(1, 6)).detach()})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gates", ["rank", "token", "drawn", None])
def test_opcheck(gates):
    """Schemas, and shapes, strides and dtypes of what the ops return."""
    inputs = make((6,), 16, 32, 5, gates=None if gates == "drawn" else gates, dtype=torch.float16)
    small, draw = (inputs["lora_A"], inputs["lora_B"], inputs.get("z"), None), None
    if gates == "drawn":
        small, draw = (*small[:2], torch.linspace(-2, 2, 5), torch.tensor(0.5)), draw_words(3, 5, 2)
    forward, backward = torch.ops.cobra.gated_lora_forward_triton, torch.ops.cobra.gated_lora_backward_triton
    operands = (inputs["x"], inputs["weight"], inputs["bias"], *small, draw, SCALING, True)
    y, *saved = forward(*operands)
    torch.library.opcheck(forward.default, operands)
    needs = [True, False, True, gates in ("rank", "drawn")]
    torch.library.opcheck(backward.default, (y, inputs["x"], inputs["weight"], *small, *saved, SCALING, needs))


@pytest.mark.parametrize("gates", ["rank", "token", "drawn"])
def test_compiles_without_a_graph_break(gates):
    """Forward and backward."""
    function, inputs = with_gates(gates, (5,), 12, 16, 6)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, eager = (output_and_gradients(each, inputs) for each in (compiled, function))
    torch.testing.assert_close(found, eager)


@pytest.mark.parametrize("gates", ["rank", "token", "drawn"])
def test_checkpointing_gives_the_same_bits(gates):
    function, inputs = with_gates(gates, (5,), 12, 16, 6)

    def recomputed(**operands):
        return checkpoint(function, use_reentrant=False, preserve_rng_state=False, **operands)

    plain, twice = (output_and_gradients(each, inputs) for each in (function, recomputed))
    assert all(torch.equal(plain[name], twice[name]) for name in plain)


def with_gates(gates, *shape):
    """A function of operands, and the operands: gates by rank, by token, or drawn from logits inside."""

    def drawn(logits, **operands):
        return fused(z=ConcreteSample(logits, draw_words(3, 5, 2), torch.tensor(0.5)), **operands)

    if gates == "drawn":
        return drawn, make(*shape, gates=None) | {"logits": torch.linspace(-2, 2, shape[-1])}
    return fused, make(*shape, gates=gates)
