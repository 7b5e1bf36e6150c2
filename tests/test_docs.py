"""Every Python snippet of the documentation runs, in order, on this machine."""

import re
from pathlib import Path

import pytest
import torch

import cobra

DOCS = sorted((Path(cobra.__file__).parents[1] / "docs").glob("*.md"))


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in DOCS if snippets(page)], ids=lambda page: page.name)
def test_snippets(page, tmp_path, monkeypatch):
    """One namespace a page, an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "docs"}
    with torch.enable_grad():
        for number, code in enumerate(snippets(page), 1):
            exec(compile(code, f"{page.name}, snippet {number}", "exec"), namespace)
