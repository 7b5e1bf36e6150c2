"""csrc/gates.cu without a GPU: its kernels, compiled for the CPU and run thread by thread, have the bits of csrc/gates.cpp."""

import pytest
import torch
from cuda_host import compile_for_host

from cobra_kernels import cuda_extension, extension, gate_noise, gates_and_kl, gates_ops
from cobra_kernels.gates_options import GateOptions

pytestmark = pytest.mark.skipif(extension.load() is None, reason="the compiled extension was not built")
ALL = (True, True, True)

# options, shape, offsets, whether the noise is given
CALLS = {
    "one gate": (GateOptions(wanted=ALL), (1, 1), None, False),
    "several rounds of a block": (GateOptions(-7, 2**40, 2, 0.7, wanted=ALL), (3, 300), None, False),
    "hard, sampled": (GateOptions(11, -3, 0, 0.7, -0.1, 1.1, True, ALL), (5, 37), None, False),
    "uneven sites": (GateOptions(1, 2, 2**32 - 9, 0.7, -0.4, 1.05, True, ALL), (151,), [0, 5, 5, 150, 151], False),
    "z of given noise": (GateOptions(), (300,), None, True),
    "sampled KL of given noise": (GateOptions(sampled=True, wanted=(False, True, False)), (7, 43), None, True),
    "Bernoulli KL": (GateOptions(wanted=(False, True, False)), (131,), None, False),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compile_for_host("gates.cu", tmp_path_factory.mktemp("host"))


@pytest.fixture
def on_host(host, monkeypatch):
    """backend="cuda" for tensors of the CPU."""
    monkeypatch.setattr(cuda_extension, "require", lambda *_: host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_bits_are_the_cpus(call, dtype, on_host):
    options, shape, offsets, given = call
    logits, prior = (4 * torch.randn(2, *shape)).to(dtype)
    noise = gate_noise(1, logits.numel(), seed=1, step=2).reshape(shape).to(dtype) if given else None
    offsets, temperature = None if offsets is None else torch.tensor(offsets), torch.tensor(0.3) if given else None
    operands = (logits, prior, noise, offsets, temperature)
    gradients = [torch.randn(shape).to(dtype), torch.tensor(0.25, dtype=dtype).expand(shape), torch.randn(shape).to(dtype)]
    gradients = [t if wanted else None for t, wanted in zip(gradients, options.wanted, strict=True)]
    plain, cobra = gates_ops._plain(options), torch.ops.cobra
    assert all(map(torch.equal, cobra.gates_forward_cuda(*operands, *plain), cobra.gates_forward(*operands, *plain)))
    found = cobra.gates_backward_cuda(*gradients, *operands, *plain)
    assert found.any() and torch.equal(found, cobra.gates_backward(*gradients, *operands, *plain))


def test_through_the_public_function(on_host):
    logits, prior = 4 * torch.randn(2, 9, 21)
    leaf = logits.requires_grad_()
    draw = dict(seed=3, step=5, temperature=0.5, stretch=(-0.1, 1.1))
    found, expected = (gates_and_kl(leaf, prior, backend=backend, **draw) for backend in ("cuda", None))
    assert all(map(torch.equal, found, expected))
    gradients = [torch.autograd.grad(gates.z.sum() + gates.kl.sum(), leaf)[0] for gates in (found, expected)]
    assert torch.equal(*gradients)


def test_no_gates(on_host):
    for shape in ((0, 4), (3, 0)):
        gates = gates_and_kl(torch.zeros(shape), torch.zeros(shape), seed=0, step=0, temperature=0.5, backend="cuda")
        assert all(t.shape == shape for t in gates)


def test_where_it_cannot_run_it_says_so():
    with pytest.raises(RuntimeError, match="backend='cuda' needs CUDA tensors"):
        gates_and_kl(torch.zeros(2, 3), torch.zeros(2, 3), seed=0, step=0, temperature=0.5, backend="cuda")
