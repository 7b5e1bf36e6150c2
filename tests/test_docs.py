"""The documentation is true: its Python runs, its command lines run, its pages are short, and every link leads somewhere."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import Mlp, image_batch, mlp_batch, vit

import cobra

ROOT = Path(cobra.__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
LONGEST = 140
ANY_LENGTH = {"deploy.md", "evidence.md"}  # all of deployment in one example; tables from rows
FENCE = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)(?:#[^)]*)?\)")


def snippets(page: Path) -> list[tuple[str, str]]:
    """Language and text of each."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def file_of(code: str) -> str | None:
    """The file that a snippet is the content of, as its first line says."""
    named = re.match(r"# (\w+\.py)\n", code)
    return named[1] if named else None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [p for p in DOCS if any(lang == "python" for lang, _ in snippets(p))], ids=lambda p: p.name)
def test_snippets(page, tmp_path, monkeypatch):
    """In order, one namespace a page, an empty folder to work in; those that are files are compiled here."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "docs"}
    with torch.enable_grad():
        for number, (language, code) in enumerate(snippets(page), 1):
            if language == "python":
                compiled = compile(code, f"{page.name}, snippet {number}", "exec")
                if not file_of(code):
                    exec(compiled, namespace)


def test_readme():
    """Its two loops, with a model and batches as it says they may be; from the first nothing but plain layers is left."""
    ten_lines, pairs = (code for language, code in snippets(ROOT / "README.md") if language == "python")
    model, batches = vit(), [image_batch()] * 3
    found: dict = {"model": model, "calibration_loader": batches, "loader": batches}
    exec(compile(ten_lines, "README.md, ten lines", "exec"), found)
    assert found["plan"].total == found["budget"].amount == 8 * 12 and min(found["plan"].ranks.values()) >= 1
    assert not any(isinstance(module, cobra.CobraLinear) for module in model.modules())
    model = Mlp()
    adapter = cobra.attach(model, cobra.CobraConfig(4, r_max=4, gate="mean"))
    found = {"torch": torch, "model": model, "adapter": adapter, "loader": [mlp_batch()]}
    exec(compile(pairs, "README.md, pairs", "exec"), found)
    found["loss"].backward()
    assert all(group.gate.grad is not None for group in adapter.groups)


def lines(page: Path) -> Iterator[str]:
    for language, code in snippets(page):
        if language == "sh":
            yield from (line for line in code.splitlines() if line and not line.startswith("#"))


# a thread of gloo that outlives Python's end aborts the process now and then; Linux lists threads
NO_THREAD_IS_LEFT = """
from pathlib import Path
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert "pt_gloo_runloop" not in names, "something holds the process group"
"""

SHELL = [pytest.param(page, line, id=f"{page.name}: {line[:40]}") for page in DOCS for line in lines(page)]


@pytest.mark.parametrize(("page", "line"), SHELL)
def test_command_lines(page, line, tmp_path):
    """Beside the files of their page, in processes of their own: two of them over gloo."""
    for language, code in snippets(page):
        if language == "python" and file_of(code):
            keeps_group = "fully_shard" in code  # DTensor's caches hold the group
            (tmp_path / file_of(code)).write_text(code if keeps_group else code + NO_THREAD_IS_LEFT)
    paths = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | paths)
    assert done.returncode == 0, done.stderr[-3000:]
    if re.search(r"proc\S*[ =]2 ", line):
        assert re.search(r"\d+ ranks (on 2 processes|from 2 shards)", done.stdout), done.stdout


def words_of_the_code() -> str:
    """All strings of the packages, those that Python joins in one, values in the place of a mark."""
    found = []
    for path in [*(ROOT / "cobra").rglob("*.py"), *(ROOT / "cobra_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_are_those_of_the_code():
    """What the page on troubleshooting quotes, part by part between its …"""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    code = words_of_the_code()
    parts = [part.strip() for message in quoted for part in message.split("…")]
    assert [part for part in parts if part not in code] == []
    assert len(quoted) > 30 and all(max(map(len, message.split("…"))) > 10 for message in quoted)


def test_every_page_is_reached_from_the_list():
    listed = set(LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS} - {"README.md"} <= listed
    assert "docs/README.md" in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", [page for page in DOCS if page.name not in ANY_LENGTH], ids=lambda page: page.name)
def test_pages_are_short(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= LONGEST
