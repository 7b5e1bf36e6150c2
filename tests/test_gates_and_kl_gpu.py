"""Gates on the device they are for: the CPU's bits from Triton and CUDA kernels, no wait for the device, graphs."""

import pytest
import torch

from cobra_kernels import cuda_extension, gates_and_kl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KINDS = [dict(kl=kl, stretch=stretch) for kl in ("bernoulli", "concrete") for stretch in (None, (-0.1, 1.1))]
DRAW = dict(seed=2**63 + 11, step=2**33 + 3, temperature=0.3)
SHAPES = [(1, 1), (36, 16), (224, 64), (7, 1024)]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if request.param == "cuda" and cuda_extension.load() is None:
        pytest.skip(f"no CUDA kernels: {cuda_extension.why_not()}")
    return request.param


def results(logits, prior, **options):
    """z, kl, open and the gradient of the logits, from gradients that differ between outputs and gates."""
    leaf = logits.detach().requires_grad_()
    gates = gates_and_kl(leaf, prior, **options)
    weights = [torch.linspace(-1, 2, leaf.numel()).reshape(leaf.shape).to(leaf) + i for i in range(3)]
    return [*(t.detach() for t in gates), *torch.autograd.grad(gates, leaf, weights)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_the_cpus(shape, kind, backend):
    logits, prior = 4 * torch.randn(2, *shape)
    found = results(logits.cuda(), prior.cuda(), **DRAW, **kind, backend=backend)
    assert all(map(torch.equal, [t.cpu() for t in found], results(logits, prior, **DRAW, **kind)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_uneven_sites(kind, backend):
    logits, prior = 4 * torch.randn(2, 151)
    offsets = torch.tensor([0, 5, 5, 150, 151])
    found = results(logits.cuda(), prior.cuda(), offsets=offsets.cuda(), **DRAW, **kind, backend=backend)
    assert all(map(torch.equal, [t.cpu() for t in found], results(logits, prior, offsets=offsets, **DRAW, **kind)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_torchs_own_path_is_within_the_last_bit(kind):
    logits, prior = 4 * torch.randn(2, 224, 64)
    found = results(logits.cuda(), prior.cuda(), **DRAW, **kind)
    for t, expected in zip(found, results(logits, prior, **DRAW, **kind), strict=True):
        torch.testing.assert_close(t.cpu(), expected, rtol=1.2e-7, atol=1e-14)


def test_a_captured_graph_follows_the_logits(backend):
    """Nothing waits for the device, or the capture would fail."""
    logits, prior = 4 * torch.randn(2, 36, 16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    T = torch.tensor(0.3, device="cuda")
    plain = (5, 7, 0, 1.0, 0.0, 1.0, False, (True, True, True))
    operator = getattr(torch.ops.cobra, f"gates_forward_{backend}")
    with torch.cuda.stream(side):
        operator(logits, prior, None, None, T, *plain)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = operator(logits, prior, None, None, T, *plain)
    logits.mul_(-1)
    T.fill_(0.7)
    graph.replay()
    assert all(map(torch.equal, outputs, operator(logits, prior, None, None, T, *plain)))
