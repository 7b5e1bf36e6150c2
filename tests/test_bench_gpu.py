"""What of `make gpu` can be told without a device: its runner over parts that pass, fail, hang and are skipped; its tables."""

import json

import pytest
import torch

from bench import gpu
from bench.cuda_gated_lora_linear import cuda_cases
from bench.cuda_operations import cuda_cases as operation_cases
from bench.sweep_gated_lora_linear import fastest

GPU_TEST = "import pytest\npytestmark = pytest.mark.gpu\n"
CASES = """
import time
from dataclasses import dataclass
@dataclass(frozen=True)
class Comparison:
    name: str
    def rows(self):
        return [{"name": self.name}]
def cuda_cases():
    return ["first", "second", "third"]
"""
FILES = {
    "pytest.ini": "[pytest]\nmarkers = gpu: needs a device\n",
    "tests/test_right_gpu.py": GPU_TEST + "def test_right(): pass\n",
    "tests/test_wrong_gpu.py": GPU_TEST + "def test_wrong(): assert False\n",
    "tests/test_other_gpu.py": "# pytest.mark.gpu\ndef test_of_the_cpu(): pass\n",
    "bench/sweep_tiles.py": (
        "def sweep(deadline, known):\n    return [*known, {'seconds': 1.0}]\ndef fastest(rows):\n    return rows[-1:]\n"
    ),
    "bench/cuda_right.py": CASES + "\ndef run_on_cuda(case):\n    return [Comparison(case)]\n",
    "bench/cuda_wrong.py": CASES
    + "\ndef run_on_cuda(case):\n    if case == 'second': raise ValueError('no tile')\n    return [Comparison(case)]\n",
    "bench/cuda_device.py": CASES + "\nNEEDS_CUDA = True\ndef run_on_cuda(case):\n    raise SystemExit('ran')\n",
    "bench/bench_of_the_cpu.py": "def run():\n    raise SystemExit('ran')\n",
}
STATES = {
    "tests-right": "passed",
    "tests-wrong": "failed",
    "tests-other": "skipped",
    "sweep-tiles": "passed",
    "benchmark-right": "passed",
    "benchmark-wrong": "failed",
    "benchmark-device": "skipped",
}


HANGS = CASES + "\ndef run_on_cuda(case):\n    time.sleep(600 * (case == 'second'))\n    return [Comparison(case)]\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # each of them costs its import
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def records(root) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (root / "bench" / "results" / "cpu").glob("*-*.json")}


def test_one_run_survives_what_fails(root):
    assert gpu.main(["--device", "cpu"], root) == 1
    found = records(root)
    assert {name: record["state"] for name, record in found.items()} == STATES
    assert [row["name"] for row in found["benchmark-right"]["rows"]] == ["first", "second", "third"]
    assert [row["name"] for row in found["benchmark-wrong"]["rows"]] == ["first", "third"]
    assert found["benchmark-wrong"]["failed"] == {"second": "ValueError: no tile"}
    assert found["tests-wrong"]["output"][-1].startswith("1 failed")
    tuned = json.loads((root / "bench" / "results" / "cpu" / "configs.json").read_text())
    assert tuned == {"tiles": [{"seconds": 1.0}]}


def test_what_hangs_is_ended_and_gone_on_with(root):
    """The next run keeps the cases that were done."""
    path, arguments = root / "bench/cuda_hangs.py", ["--device", "cpu", "--only", "hangs", "--seconds"]
    path.write_text(HANGS)
    assert gpu.main([*arguments, "6"], root) == 1
    stopped = records(root)["benchmark-hangs"]
    assert stopped["state"] == "out of time" and [row["name"] for row in stopped["rows"]] == ["first"]
    (root / "bench/results/cpu/benchmark-hangs.json").write_text(
        json.dumps(stopped | {"code": gpu.code_of(root, gpu.environment("cpu")), "done": ["first", "second"]})
    )
    assert gpu.main([*arguments, "60"], root) == 0
    assert [row["name"] for row in records(root)["benchmark-hangs"]["rows"]] == ["first", "third"]


def test_what_passed_on_this_code_is_not_run_again(root):
    arguments = ["--device", "cpu", "--only", "right"]
    assert gpu.main(arguments, root) == 0
    before = records(root)
    assert gpu.main(arguments, root) == 0
    assert records(root) == before
    (root / "tests/test_right_gpu.py").write_text(GPU_TEST + "def test_right(): assert False\n")
    assert gpu.main(arguments, root) == 1
    assert records(root)["tests-right"]["state"] == "failed"


def test_parts_are_found_by_name():
    """Every test of a device, every sweep, every file with cases, of this repository, each with a record of its own."""
    found = {part.record for part in gpu.parts(gpu.ROOT, "cpu")}
    files = [path.stem for path in (gpu.ROOT / "tests").glob("test_*_gpu.py")]
    assert {f"tests-{name.removeprefix('test_').removesuffix('_gpu')}.json" for name in files} <= found
    expected = {"sweep-gated_lora_linear.json", "benchmark-gated_lora_linear.json", "benchmark-operations.json"}
    assert expected | {"build-extensions.json"} <= found
    assert sum(gpu.ENDS[kind] >= 1 for kind in gpu.ENDS) == 1 and gpu.LIMIT < 9 * 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refuses_without_a_device():
    with pytest.raises(SystemExit, match=r"needs (a CUDA device, and torch .* sees none|triton)"):
        gpu.main([])


def test_refuses_without_a_package(monkeypatch):
    monkeypatch.setattr(gpu, "NEEDED", ("numpy", "a_package_that_is_not_there"))
    with pytest.raises(SystemExit, match=r"needs a_package_that_is_not_there, which this Python lacks"):
        gpu.main([])


@pytest.mark.parametrize("cases", [cuda_cases(), operation_cases()], ids=["layers", "operations"])
def test_every_case_once(cases):
    assert len({str(case) for case in cases}) == len(cases)


def test_table_has_the_fastest_that_ran():
    size = {"kernel": "base", "M": 8, "K": 16, "N": 16, "rank_tile": 16}
    rows = [
        size | {"picked": True, "config": {"BLOCK_M": 64}, "seconds": 3.0},
        size | {"picked": False, "config": {"BLOCK_M": 128}, "seconds": 2.0},
        size | {"picked": False, "config": {"BLOCK_M": 256}, "seconds": None, "error": "OutOfResources"},
        size | {"M": 9, "picked": True, "config": {"BLOCK_M": 64}, "seconds": None, "error": "OutOfResources"},
        size | {"M": 9, "picked": False, "config": {"BLOCK_M": 32}, "seconds": 1.0},
    ]
    first, second = fastest(rows)
    assert (first["config"], first["seconds"], first["speedup"]) == ({"BLOCK_M": 128}, 2.0, 1.5)
    assert (second["M"], second["seconds"], second["speedup"]) == (9, 1.0, None)
