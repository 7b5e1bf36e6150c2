"""The document is filled from rows, and notices when it is not what they say."""

import json
import sys

import pytest
from accuracy_rows import row

from bench.accuracy import evidence
from bench.accuracy.rows import read_rows

TEXT = """# Title

Prose before.

<!-- table: main -->
old
<!-- end -->

Prose between.

<!-- figure: differences -->
<!-- end -->
"""


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "evidence.md"
    path.write_text(TEXT)
    return path


def rows_of(levels: dict[str, float]) -> list[dict]:
    return [row(method, seed=seed, level=level) for method, level in levels.items() for seed in range(3)]


def test_written_then_current_then_stale(document):
    rows = rows_of({"lora": 0.7, "cobra": 0.8})
    assert evidence.stale(document, rows)
    evidence.write(document, rows)
    assert evidence.stale(document, rows) == []
    text = document.read_text()
    assert text.startswith("# Title\n\nProse before.\n") and "\nProse between.\n" in text and "old" not in text
    assert "| cobra | 80.0 ± " in text and "](evidence/differences.svg)" in text
    assert (document.parent / "evidence" / "differences.svg").is_file()
    changed = rows_of({"lora": 0.7, "cobra": 0.75})
    assert evidence.stale(document, changed) == ["table main", "accuracy-by-rank.svg", "differences.svg"]


def test_edited_numbers_are_noticed(document):
    rows = rows_of({"lora": 0.7, "cobra": 0.8})
    evidence.write(document, rows)
    document.write_text(document.read_text().replace("| cobra | 80.0", "| cobra | 90.0"))
    assert evidence.stale(document, rows) == ["table main"]


def test_without_rows_nothing_is_left_over(document):
    evidence.write(document, rows_of({"lora": 0.7, "cobra": 0.8}))
    evidence.write(document, [])
    assert document.read_text().count("No rows yet.") == 2
    assert not list((document.parent / "evidence").iterdir())
    assert evidence.stale(document, []) == []


def test_unequal_budgets_are_not_published(document):
    with pytest.raises(ValueError, match="budgets differ"):
        evidence.write(document, [row(), row("cobra", parameters=1200)])
    evidence.write(document, [row(), row("dora", parameters=1200)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nothing -->\n<!-- end -->\n", "asks for table 'nothing'; there are runs, main"),
        ("<!-- figure: main -->\n<!-- end -->\n", "asks for figure 'main'"),
        ("<!-- table: main -->\n", "has no <!-- end -->"),
        ("<!-- end -->\n", "after no open block"),
        ("<!-- table: main -->\n<!-- table: runs -->\n<!-- end -->\n", "after <!-- table: main -->"),
    ],
)
def test_markers(document, text, message):
    document.write_text(text)
    with pytest.raises(ValueError, match=message):
        evidence.write(document, [])


def test_command(document, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "final.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_of({"lora": 0.7})))
    arguments = ["evidence", "--document", str(document), "--rows", str(folder)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    assert evidence.main() == 1
    assert "not what the rows say: table main" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", arguments)
    assert evidence.main() == 0
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    assert evidence.main() == 0


def test_the_committed_document_is_what_the_rows_say():
    """After new rows: make evidence."""
    assert evidence.stale(evidence.DOCUMENT, read_rows()) == []
