"""What the three attribution operations promise to torch's dispatcher, and what asking for Triton says where it cannot run."""

import importlib.util
import sys

import pytest
import torch

import cobra_kernels as k
from cobra_kernels import interpolate_path

OPERANDS = {
    "interpolate_path": lambda: (torch.randn(3, 5, 7), torch.randn(7), torch.rand(4)),
    "conductance_reduce": lambda: (torch.randn(4, 3, 6), torch.randn(2, 3, 6), torch.randn(2, 4)),
    "ghost_grad_norm": lambda: (torch.randn(3, 5, 7), torch.randn(3, 5, 4)),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.cobra, name).default, OPERANDS[name]())


def test_gradients_of_the_path():
    x, baseline = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    operands = x.requires_grad_(), baseline.requires_grad_(), torch.rand(4, dtype=torch.float64)
    torch.library.opcheck(torch.ops.cobra.interpolate_path.default, operands)
    assert torch.autograd.gradcheck(lambda x, x0: interpolate_path(x, x0, operands[2]), operands[:2])


@pytest.mark.parametrize("name", OPERANDS)
def test_compiles_whole(name):
    operands = OPERANDS[name]()
    compiled = torch.compile(lambda *t: getattr(k, name)(*t), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*operands), getattr(k, name)(*operands))


@pytest.mark.parametrize("name", OPERANDS)
def test_meta_tensors_have_the_shape(name):
    operands = OPERANDS[name]()
    for op in (name, f"{name}_triton"):
        out = getattr(torch.ops.cobra, op).default(*(t.to("meta") for t in operands))
        assert out.shape == getattr(k, name)(*operands).shape and out.dtype == torch.float32


@pytest.mark.parametrize("name", OPERANDS)
def test_triton_raises_where_it_cannot_run(name, monkeypatch):
    operands = OPERANDS[name]()
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        getattr(k, name)(*operands, backend="cuda")
    if importlib.util.find_spec("triton"):
        with pytest.raises(RuntimeError, match="needs a CUDA device, and x is on cpu"):
            getattr(k, name)(*operands, backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs the package triton"):
        getattr(k, name)(*operands, backend="triton")
