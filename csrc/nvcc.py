"""Compiles csrc/*.cu into one library and reads what ptxas says of each kernel. For setup.py: needs Python alone, and no GPU.

Beside the library stands a report, _cuda.json, also where there is no library: then it says why. `python csrc/nvcc.py` builds
beside the package and prints the report as a table.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LIBRARY, REPORT = "_cuda.so", "_cuda.json"
# machine code for A100 and H100; the PTX of the first is what a driver translates for other devices, since none needs more
ARCHITECTURES = ("arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a")
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")
TIMEOUT = 300  # seconds for one compiler

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class BuildError(Exception):
    """There is no library, for the reason given."""


def build(folder: Path, sources: Path = Path(__file__).parent) -> dict:
    """Leaves library and report in folder, unless those there are of the same sources; returns the report.

    built: whether there is a library; reason: why not
    kernels: name, arch, registers, stack, spill_stores, spill_loads and static shared memory in bytes
    """
    state = _digest(sources)
    report = read_report(folder)
    if report.get("built") and report["sources"] == state and (folder / LIBRARY).exists():
        return report
    start = time.monotonic()
    (folder / LIBRARY).unlink(missing_ok=True)
    try:
        report = {"built": True} | _compile(folder, sources)
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        report = {"built": False, "reason": str(error)}
    report |= {"sources": state, "seconds": round(time.monotonic() - start, 1)}
    temporary = folder / f"{REPORT}.{os.getpid()}"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(folder / REPORT)
    return report


def read_report(folder: Path) -> dict:
    """What the last build left in folder; empty where there was none."""
    try:
        return json.loads((folder / REPORT).read_text())
    except (OSError, ValueError):
        return {}


def find_nvcc() -> Path | None:
    """Of CUDA_HOME, else of PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    return Path(found) if found else None


def kernels_of(report: str) -> Iterator[dict]:
    """A row for each kernel and architecture in what `ptxas -v` printed."""
    for match in ENTRY.finditer(report):
        row = match.groupdict()
        shared = re.search(r"(\d+) bytes smem", row.pop("rest"))
        numbers = {key: int(row.pop(key)) for key in ("registers", "stack", "spill_stores", "spill_loads")}
        yield row | numbers | {"shared": int(shared[1]) if shared else 0}


def spilling(kernels: list[dict]) -> list[str]:
    """Those that keep registers in memory."""
    return [f"{row['name']} for {row['arch']}" for row in kernels if row["stack"] + row["spill_stores"] + row["spill_loads"]]


def _digest(sources: Path) -> str:
    """Of everything that the library is made from."""
    files = sorted(path for path in sources.iterdir() if path.suffix in (".cu", ".h", ".py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _compile(folder: Path, sources: Path) -> dict:
    if not sys.platform.startswith("linux"):
        raise BuildError(f"CUDA kernels are built on Linux alone, and this is {sys.platform}")
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was found neither in CUDA_HOME nor on PATH when the package was built")
    version = re.search(r"release ([\d.]+)", _run([nvcc, "--version"]))
    with tempfile.TemporaryDirectory() as objects:
        targets = [flag for each in ARCHITECTURES for flag in ("-gencode", each)]
        command = [nvcc, *FLAGS, *targets, "--threads", "0", "-Xptxas", "-v", "-c"]
        files = {source: Path(objects, source.stem + ".o") for source in sorted(sources.glob("*.cu"))}
        running = [_start([*command, source, "-o", target]) for source, target in files.items()]
        kernels = list(kernels_of("".join([_finish(process) for process in running])))
        if spilling(kernels):
            raise BuildError(f"these kernels spill registers to memory: {', '.join(spilling(kernels))}")
        library = Path(objects, LIBRARY)
        _run([nvcc, "-shared", "-cudart", "static", *files.values(), "-o", library])
        temporary = folder / f"{LIBRARY}.{os.getpid()}"
        shutil.copyfile(library, temporary)
        temporary.replace(folder / LIBRARY)
    kernels = sorted(_demangled(kernels), key=lambda row: (row["name"], row["arch"]))
    return {"nvcc": version[1] if version else "unknown", "kernels": kernels}


def _start(command: list) -> subprocess.Popen:
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def _finish(process: subprocess.Popen) -> str:
    try:
        output = process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    if process.returncode:
        lines = [line for line in output.splitlines() if line.strip()]
        raise BuildError(f"nvcc failed with status {process.returncode}: {' | '.join(lines[:5])}"[:800])
    return output


def _run(command: list) -> str:
    return _finish(_start(command))


def _demangled(kernels: list[dict]) -> list[dict]:
    """With names as they are written in C++, where c++filt is at hand."""
    if not kernels or not shutil.which("c++filt"):
        return kernels
    names = _run(["c++filt", "-p", *(row["name"] for row in kernels)]).splitlines()
    return [row | {"name": name.removeprefix("cobra::")} for row, name in zip(kernels, names, strict=True)]


def table(report: dict) -> str:
    """Markdown: a row for each kernel, with the registers of a thread on each architecture and its static shared memory."""
    architectures = sorted({row["arch"] for row in report["kernels"]})
    lines = ["| kernel | " + " | ".join(f"registers, {arch}" for arch in architectures) + " | static shared memory |"]
    lines.append("| --- |" + " ---: |" * (len(architectures) + 1))
    for name in dict.fromkeys(row["name"] for row in report["kernels"]):
        rows = {row["arch"]: row for row in report["kernels"] if row["name"] == name}
        numbers = [str(rows[arch]["registers"]) for arch in architectures]
        lines.append(
            f"| `{name.replace('cobra::', '')}` | {' | '.join(numbers)} | {max(r['shared'] for r in rows.values()):,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    result = build(Path(__file__).parents[1] / "cobra_kernels")
    print(table(result) if result["built"] else result["reason"])
