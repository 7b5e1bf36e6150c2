"""The rows of the diagnosis: committed ones say what they are, a small one is made anew."""

import json
from dataclasses import replace

import pytest

from bench.accuracy.diagnosis import SUBJECTS, markdown, read_rows, row_of, write_row

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")


def test_committed_rows():
    """Seven architectures and more, on text but for the images; which weights are random is said in each."""
    rows = read_rows()
    assert len(rows) >= 7 and {row["architecture"] for row in rows} <= SUBJECTS.keys()
    for row in rows:
        random = SUBJECTS[row["architecture"]].random_init
        assert row["weights"] == ("random" if random else "pretrained") and ("random weights" in row["model"]) == random
        assert any("weights are random" in note for note in row["notes"]) == random
        assert ("random images" in row["data"]) == (row["architecture"] == "vit")
        for part in (row["site"], row["block"]):
            low, high = part["pearson"]["over_examples"]
            assert -1 <= low <= high <= 1
            for i in (1, 2):
                assert sum(layer[i] for layer in part["layers"]) == pytest.approx(1, abs=1e-3)
    assert sum(row["weights"] == "pretrained" for row in rows) >= 2


def test_markdown():
    """A line for each row, with as many cells as the head."""
    rows = read_rows()
    lines = markdown(rows).splitlines()
    assert len(lines) == len(rows) + 2 and len({line.count("|") for line in lines}) == 1
    assert sum("random weights" in line for line in lines) == sum(row["weights"] == "random" for row in rows)


def test_row(tmp_path):
    """Written in place of an earlier one, JSON that every reader takes; blocks come from the same calibration."""
    path = tmp_path / "rows.jsonl"
    row = row_of("vit", replace(SUBJECTS["vit"], examples=4, steps=4, draws=2))
    for name in ("vit", "minilm", "vit"):
        write_row({**row, "architecture": name}, path)
    assert [found["architecture"] for found in read_rows(path)] == ["minilm", "vit"]
    found = json.loads(path.read_text(encoding="utf-8").splitlines()[1], parse_constant=pytest.fail)
    assert (len(found["site"]["layers"]), len(found["block"]["layers"])) == (72, 12)
    assert found["settings"]["examples"] == 4 and found["site"]["stability"][1]["what"] == "seeds"
    assert "| 72 |" in markdown([found])
