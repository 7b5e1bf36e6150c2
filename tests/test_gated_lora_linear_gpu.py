"""The Triton path of `gated_lora_linear` on the device it is for: bf16 too, no wait for the device, graphs, far offsets."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import cobra
from cobra_kernels import ConcreteSample, gated_lora_configs, gated_lora_linear, gated_lora_linear_ref, sample_gates
from cobra_kernels.testing import assert_all_within_budget, make_inputs, output_and_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SCALING = 1.7
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ref = partial(gated_lora_linear_ref, scaling=SCALING)
fused = partial(gated_lora_linear, scaling=SCALING, backend="triton")

# rows, K, N, r
SHAPES = {
    "one token": ((1,), 256, 512, 8),
    "decoding": ((48,), 4096, 256, 16),
    "primes, which no tile divides": ((7, 37), 131, 257, 7),
    "rank of several tiles": ((300,), 256, 512, 200),
    "rank 1024": ((130,), 256, 320, 1024),
    "enough tiles for the largest": ((2048,), 512, 2304, 64),
    "sums in planes": ((4500,), 256, 272, 12),
}


def make(*shape, gates="rank", **options):
    """Operands with open and closed gates side by side."""
    inputs = make_inputs(*shape, gates=gates, device="cuda", **options)
    if gates in ("rank", "token"):
        inputs["z"][..., ::3] = 0
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", ["rank", "token", "closed", None])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_every_gradient_within_budget(shape, gates, dtype):
    assert_all_within_budget(fused, ref, [make(*shape, gates=gates, dtype=dtype, seed=seed) for seed in range(2)], dtype)


@pytest.mark.parametrize("path", ["fused", "addmm"])
@pytest.mark.parametrize("gates", ["rank", "token", "closed", None])
def test_either_way_of_the_frozen_product(gates, path, monkeypatch):
    monkeypatch.setattr(gated_lora_configs, "pick_base_path", lambda *sizes: path)
    assert_all_within_budget(fused, ref, [make((300,), 256, 512, 100, gates=gates, dtype=torch.bfloat16)], torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["slices", "transposed"])
def test_strided_operands(layout, dtype):
    several = [make((70,), 128, 192, 40, layout=layout, dtype=dtype, seed=seed) for seed in range(2)]
    assert_all_within_budget(fused, ref, several, dtype)


@pytest.mark.parametrize("gates", ["rank", "token"])
def test_fp32_adapter_on_a_bf16_layer(gates):
    inputs = make((300,), 256, 512, 20, gates=gates, dtype=torch.bfloat16)
    adapter = make((300,), 256, 512, 20, gates=gates)
    inputs |= {name: adapter[name] for name in ("lora_A", "lora_B", "z")}
    assert_all_within_budget(fused, ref, [inputs], torch.bfloat16)


@pytest.mark.parametrize("gates", ["rank", "token"])
def test_bits_repeat(gates):
    inputs = make((4500,), 512, 768, 100, gates=gates, dtype=torch.bfloat16)
    first, again = (output_and_gradients(fused, inputs) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("step", [0, 2**33 + 3])
def test_sampled_gates_are_the_cpus(step):
    """Bit for bit, through fp64 logarithms and exponentials of another library."""
    logits = torch.linspace(-8, 8, 1000)
    x, weight = torch.zeros(1, 16, device="cuda"), torch.zeros(16, 16, device="cuda")
    small = torch.zeros(1000, 16, device="cuda"), torch.zeros(16, 1000, device="cuda")
    sample = ConcreteSample.of(logits.cuda(), seed=2**63 + 11, step=step, site=7, temperature=0.3)
    operands = (x, weight, None, *small, sample.logits, sample.temperature, sample.draw, 1.0, True)
    z = torch.ops.cobra.gated_lora_forward_triton(*operands)[3]
    expected = sample_gates(logits[None], seed=2**63 + 11, step=step, temperature=torch.tensor(0.3).item(), first_site=7)[0]
    assert torch.equal(z.cpu(), expected)


@pytest.mark.parametrize("gates", ["rank", "token", None])
def test_nothing_waits_for_the_device(gates):
    leaves = {name: t.requires_grad_() for name, t in make((300,), 256, 512, 20, gates=gates, dtype=torch.bfloat16).items()}
    dy = torch.randn(300, 512, device="cuda").bfloat16()
    torch.autograd.grad(fused(**leaves), list(leaves.values()), dy)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(fused(**leaves), list(leaves.values()), dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_follows_the_gates():
    """Its launches were sized while other gates were open."""
    inputs = make((300,), 256, 512, 100, dtype=torch.bfloat16)
    z = inputs.pop("z")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        fused(**inputs, z=z)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = fused(**inputs, z=z)
    for pattern in (torch.ones(100), torch.zeros(100), torch.arange(100) % 7):
        z.copy_(pattern)
        graph.replay()
        with torch.no_grad():
            assert torch.equal(y, fused(**inputs, z=z))


def test_offsets_beyond_32_bits():
    """The last rows of an x of more than 2^31 elements."""
    K, N, rows = 4096, 64, 2**31 // 4096 + 200
    x = torch.zeros(rows, K, dtype=torch.bfloat16, device="cuda")
    small = make((128,), K, N, 8, dtype=torch.bfloat16)
    x[-128:] = small.pop("x")
    leaf = x.requires_grad_()
    y = fused(leaf, **small)
    expected = ref(x[-128:].detach(), **small)
    torch.testing.assert_close(y[-128:], expected, rtol=2e-2, atol=2e-2)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert torch.equal(dx[-128:], dx[:128])


def test_compiles_without_a_graph_break():
    inputs = make((70,), 128, 192, 12, dtype=torch.bfloat16)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    found, eager = (output_and_gradients(function, inputs) for function in (compiled, fused))
    torch.testing.assert_close(found, eager)


def test_an_adapter_trains_as_on_torch():
    """A step's loss and gradients with gates that are drawn inside the products."""
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 32)).cuda()
        config = cobra.CobraConfig(rank_budget=8, r_max=20, total_steps=10, backend=backend, modules_to_save=())
        adapter = cobra.attach(model, config)
        for p in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(p, std=0.1)
        adapter.step()
        loss = model(torch.linspace(-1, 1, 50 * 64, device="cuda").reshape(50, 64)).square().sum() + adapter.kl_loss()
        loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"loss": loss.detach()})
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_silent_branch_is_the_base_layer():
    inputs = make((300,), 256, 512, 20, gates="closed", dtype=torch.bfloat16)
    y = fused(**inputs)
    expected = F.linear(*(inputs[name].double() for name in ("x", "weight", "bias")))
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
