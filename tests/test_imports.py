"""What the packages import, what they never do, and what `import cobra` says beside COBRApy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import cobra
import cobra_kernels

ROOT = Path(cobra.__file__).parents[1]
PACKAGES = {package.__name__: Path(package.__file__).parent for package in (cobra, cobra_kernels)}
OPTIONAL = ["triton", "transformers", "peft", "matplotlib", "pandas", "tqdm", "rich", "typer", "captum", "gguf"]
OPTIONAL_FOLDERS = {"integrations", "export", "report", "cli"}
STANDARD = frozenset(sys.stdlib_module_names)
PICKLING = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def python(code: str, *options: str, path: Path = ROOT) -> subprocess.CompletedProcess:
    """A fresh interpreter that finds the packages, and first of all what is in `path`."""
    command = [sys.executable, *options, "-c", f"import sys; sys.path[:0] = {[str(path), str(ROOT)]}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=path)


@cache
def sources(package: str) -> tuple[tuple[Path, ast.Module], ...]:
    """Path within the package and syntax tree of every module."""
    root = PACKAGES[package]
    return tuple((path.relative_to(root), ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(root.rglob("*.py")))


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level package of each import, and whether it waits inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0], lazy
        yield from imports(node, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_import_needs_no_optional_package():
    """torch, numpy and safetensors are enough."""
    blocked = python(f"sys.modules.update(dict.fromkeys({OPTIONAL}))\nimport cobra, cobra_kernels\nprint(cobra.__file__)")
    assert blocked.returncode == 0, blocked.stderr
    assert Path(blocked.stdout.strip()).parent == PACKAGES["cobra"]


def test_import_is_silent_and_loads_no_more_than_it_needs(tmp_path):
    """Kernels come without the package above them; optional packages that are installed stay unloaded: each costs a second,
    and some start a backend."""
    heavy = {"transformers", "peft", "matplotlib", "captum", "gguf", "typer"}
    code = f"import cobra_kernels\nprint('cobra' in sys.modules)\nimport cobra\nprint(*sorted({heavy} & set(sys.modules)))"
    found = python(code, "-W", "error::RuntimeWarning", path=tmp_path)
    assert (found.returncode, found.stdout.split(), found.stderr) == (0, ["False"], "")


def test_arrows_of_the_kernels():
    allowed = STANDARD | {"torch", "triton", "cobra_kernels"}
    found = {(str(path), name) for path, tree in sources("cobra_kernels") for name, _ in imports(tree)}
    assert {(path, name) for path, name in found if name not in allowed} == set()
    assert ("gate_kl.py", "torch") in found


def test_arrows_of_the_core():
    """Everything outside the optional folders; tqdm and pandas only where a function asks for them."""
    allowed = STANDARD | {"torch", "numpy", "safetensors", "cobra", "cobra_kernels"}
    found = {
        (str(path), name, lazy)
        for path, tree in sources("cobra")
        if path.parts[0] not in OPTIONAL_FOLDERS
        for name, lazy in imports(tree)
    }
    stray = {(path, name) for path, name, lazy in found if name not in allowed and not (lazy and name in {"tqdm", "pandas"})}
    assert stray == set()
    assert ("progress.py", "tqdm", True) in found


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_imports_tests_or_benchmarks(package):
    """Nor their libraries: what is installed must run without them."""
    forbidden = {"tests", "bench", "conftest", "pytest", "hypothesis"}
    assert {(str(path), name) for path, tree in sources(package) for name, _ in imports(tree) if name in forbidden} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_pickle(package):
    """Files are safetensors and JSON: opening one must not be able to run code."""
    found = set()
    for path, tree in sources(package):
        found |= {(str(path), name) for name, _ in imports(tree) if name in PICKLING}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                found |= {(str(path), alias.name) for alias in node.names if alias.name in {"save", "load"}}
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.save", "torch.load"}:
                found.add((str(path), ast.unparse(node)))
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                found.add((str(path), node.arg))
    assert found == set()


@pytest.fixture
def cobrapy(tmp_path):
    """A folder that says that the distribution `cobra` is installed."""
    info = tmp_path / "cobra-0.32.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cobra\nVersion: 0.32.1\n")
    return tmp_path


def test_warns_beside_cobrapy(cobrapy):
    """At the line that imports, with the version and the way out."""
    shown = python("import cobra", path=cobrapy)
    assert shown.returncode == 0, shown.stderr
    assert "<string>:2: RuntimeWarning: the distribution 'cobra' 0.32.1 (COBRApy)" in shown.stderr
    assert "pip uninstall cobra cobra-peft" in shown.stderr
