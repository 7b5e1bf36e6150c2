"""The CUDA library: that it is built, keeps its registers, and that an install without it says why."""

import json
import re
import runpy
from pathlib import Path

import pytest

from cobra_kernels import cuda_extension

CSRC = Path(__file__).parents[1] / "csrc"
nvcc = runpy.run_path(str(CSRC / "nvcc.py"))
needs_nvcc = pytest.mark.skipif(nvcc["find_nvcc"]() is None, reason="there is no nvcc in CUDA_HOME or on PATH")

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5cobra4calmEPf' for 'sm_80'
ptxas info    : Function properties for _ZN5cobra4calmEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 192 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 52.071 ms
ptxas info    : Compiling entry function '_ZN5cobra5spillEPf' for 'sm_90a'
ptxas info    : Function properties for _ZN5cobra5spillEPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of these sources: what the install left beside the package, or a build of its own."""
    installed = Path(cuda_extension.__file__).parent
    found = nvcc["read_report"](installed)
    fresh = found.get("built") and found["sources"] == nvcc["_digest"](CSRC)
    return found if fresh else nvcc["build"](tmp_path_factory.mktemp("cuda"))


@needs_nvcc
def test_every_kernel_is_built_for_both_architectures(report):
    assert report["built"], report["reason"]
    written = {name for path in CSRC.glob("*.cu") for name in re.findall(r"(\w+_kernel)\(", path.read_text())}
    for arch in ("sm_80", "sm_90a"):
        assert {re.search(r"\w+_kernel", row["name"])[0] for row in report["kernels"] if row["arch"] == arch} == written


@needs_nvcc
def test_no_kernel_spills(report):
    """And a block of its threads has registers enough."""
    assert report["built"], report["reason"]
    assert nvcc["spilling"](report["kernels"]) == []
    assert all(16 <= row["registers"] <= 255 and row["shared"] <= 48 * 1024 for row in report["kernels"])


def test_ptxas_is_read():
    calm, spill = nvcc["kernels_of"](PTXAS)
    assert calm == {
        "name": "_ZN5cobra4calmEPf",
        "arch": "sm_80",
        "registers": 32,
        "stack": 0,
        "spill_stores": 0,
        "spill_loads": 0,
        "shared": 192,
    }
    assert (spill["arch"], spill["registers"], spill["spill_loads"], spill["shared"]) == ("sm_90a", 255, 12, 0)
    assert nvcc["spilling"]([calm, spill]) == ["_ZN5cobra5spillEPf for sm_90a"]


def test_without_nvcc_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "_cuda.so").write_bytes(b"of an older build")
    report = nvcc["build"](tmp_path)
    assert not report["built"] and "neither in CUDA_HOME nor on PATH" in report["reason"]
    assert json.loads((tmp_path / "_cuda.json").read_text()) == report
    assert [path.name for path in tmp_path.iterdir()] == ["_cuda.json"]


@needs_nvcc
def test_a_failed_compiler_is_told_and_nothing_is_left(tmp_path):
    sources, folder = tmp_path / "csrc", tmp_path / "package"
    sources.mkdir(), folder.mkdir()
    (sources / "broken.cu").write_text("this is no C++\n")
    report = nvcc["build"](folder, sources)
    assert not report["built"] and "broken.cu" in report["reason"]
    assert [path.name for path in folder.iterdir()] == ["_cuda.json"]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(cuda_extension, "load", lambda: None)
    reasons = {
        "`pip install` builds them": {},
        "nvcc was found neither": {"built": False, "reason": "nvcc was found neither in CUDA_HOME nor on PATH"},
        "build it again": {"built": True},
    }
    for reason, left in reasons.items():
        monkeypatch.setattr(cuda_extension, "report", lambda left=left: left)
        assert reason in cuda_extension.why_not()


@pytest.mark.skipif(cuda_extension.load() is None, reason=f"no CUDA library: {cuda_extension.why_not()}")
def test_library_loads_without_a_gpu():
    """The driver is looked for at the first launch, not before."""
    assert cuda_extension.load().cobra_cuda_merge_tiles(65, 128) == 2
    assert cuda_extension.why_not() == ""
