"""Shared by all tests: quiet libraries, fixed seeds, and memory that is poisoned where a kernel leaves it unwritten."""

import os

# one thread a process: tests run side by side, and threads that wait for one another's cores cost more than they bring
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

from cobra_kernels import extension

# torch lists what a device context redirects when the first is entered, and must see the true torch.empty there: else models
# are made on the CPU from then on, and a random head depends on which test came first
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Tensors from torch.empty start as NaN, so that an output left unwritten fails."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture(params=["portable", "AVX2", "AVX-512"])
def level(request, monkeypatch):
    """Each instruction set of the extension; where the machine lacks one, the best below it."""
    monkeypatch.setattr(extension, "CPU_LEVEL", ["portable", "AVX2", "AVX-512"].index(request.param))
