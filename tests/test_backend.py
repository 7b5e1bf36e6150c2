"""Which path is taken, and what is said of those that are not."""

import json
import sys
from pathlib import Path

import pytest
import torch

from cobra_kernels import backend

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def passed_on(folder: Path) -> bool:
    records = [json.loads(path.read_text()) for path in folder.glob("tests-*.json")]
    return bool(records) and all(record["state"] == "passed" for record in records)


def test_what_auto_takes_has_passed_on_its_hardware():
    """No capability is named whose results are not committed."""
    environments = [path for path in RESULTS.glob("*/environment.json") if passed_on(path.parent)]
    capabilities = {tuple(json.loads(path.read_text()).get("capability", ())) for path in environments}
    assert set(backend.PROVEN) <= capabilities


@pytest.mark.parametrize(("name", "expected"), [(None, False), ("auto", False), ("torch", False), ("triton", True)])
def test_a_cpu_takes_triton_only_on_request(name, expected, monkeypatch):
    monkeypatch.setattr(backend, "PROVEN", ((8, 0), (9, 0)))
    assert backend.uses_triton(name, torch.ones(2)) is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_reason_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert backend.describe_triton().endswith("cannot run here: the package triton is not installed")
    monkeypatch.undo()
    if backend.find_spec("triton"):
        assert backend.describe_triton().endswith("cannot run here: torch sees no CUDA device")
    assert "never run on a GPU" in backend.describe_triton()


def test_operations_with_kernels_are_found_by_name():
    assert {"gated_lora_linear", "packed_lora"} <= set(backend.triton_operations())
    assert "gated_lora_small" not in backend.triton_operations()  # a part of another operation
