"""Rows survive many writers, and a run is one process's until it ends, however it ends."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.accuracy.rows import append_row, claim, read_rows

WRITER = """
import sys
from pathlib import Path
from bench.accuracy.rows import append_row
for i in range(30):
    append_row({"key": f"{sys.argv[2]} {i}", "phase": "search", "filling": "x" * 200_000}, Path(sys.argv[1]))
"""
READER = """
import sys
from pathlib import Path
from bench.accuracy.rows import read_rows
print("reads", flush=True)
print(len(read_rows(Path(sys.argv[1]))))
"""
HOLDER = """
import sys
from pathlib import Path
from bench.accuracy.rows import claim
with claim("run", Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def started(code: str, *arguments) -> subprocess.Popen:
    command, root = [sys.executable, "-c", code, *map(str, arguments)], Path(__file__).parents[1]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_writers_take_turns(tmp_path):
    """Lines far longer than any buffer, by four processes at once."""
    writers = [started(WRITER, tmp_path, name) for name in "abcd"]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        rows = read_rows(tmp_path)  # raises for a line that is not whole
        assert len(rows) >= seen
        seen = len(rows)
    assert [writer.wait() for writer in writers] == [0] * 4
    for writer in writers:
        writer.communicate()
    rows = read_rows(tmp_path)
    assert {row["key"] for row in rows} == {f"{name} {i}" for name in "abcd" for i in range(30)} and len(rows) == 120
    assert all(len(row["filling"]) == 200_000 for row in rows)


def test_readers_wait_for_a_writer_in_the_middle_of_a_line(tmp_path):
    line = json.dumps({"key": "1", "phase": "search"}) + "\n"
    with open(tmp_path / "search.jsonl", "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(line[:9])
        f.flush()
        reader = started(READER, tmp_path)
        assert reader.stdout.readline() == "reads\n"
        with pytest.raises(subprocess.TimeoutExpired):
            reader.wait(0.5)
        f.write(line[9:])
    assert reader.communicate()[0] == "1\n"


def test_rows_come_back_as_they_were(tmp_path):
    """One file a phase; what JSON leaves raw in a string ends no line."""
    rows = [{"key": "1", "phase": "search", "diverged": "a\u2028b\u0085c é\n"}, {"key": "2", "phase": "final", "test": None}]
    for row in rows:
        append_row(row, tmp_path)
    (tmp_path / "diagnosis.jsonl").write_text('{"architecture": "bert"}\n')  # not a run
    assert {path.name for path in tmp_path.iterdir()} == {"search.jsonl", "final.jsonl", "diagnosis.jsonl"}
    assert sorted(read_rows(tmp_path), key=lambda row: row["key"]) == rows
    assert read_rows(tmp_path / "nothing") == []


def test_a_broken_line_is_named(tmp_path):
    for key in "123":
        append_row({"key": key, "phase": "final"}, tmp_path)
    path = tmp_path / "final.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"final.jsonl:2 is not a row \(.*\); delete the line and run it again"):
        read_rows(tmp_path)
    path.write_text("\n".join([lines[0], lines[2]]) + "\n")
    assert [row["key"] for row in read_rows(tmp_path)] == ["1", "3"]
    assert json.loads(lines[1])["key"] == "2"


def test_a_claim_excludes_other_processes_until_it_ends(tmp_path):
    other = started(HOLDER, tmp_path)
    assert other.stdout.readline() == "True\n"
    with claim("run", tmp_path) as mine, claim("another run", tmp_path) as free:
        assert (mine, free) == (False, True)
    other.communicate()  # the block ends
    with claim("run", tmp_path) as mine:
        assert mine
        second = started(HOLDER, tmp_path)
        assert second.communicate()[0] == "False\n"


def test_a_killed_process_leaves_no_claim(tmp_path):
    other = started(HOLDER, tmp_path)
    assert other.stdout.readline() == "True\n"
    other.kill()
    other.communicate()
    with claim("run", tmp_path) as mine:
        assert mine


def test_a_run_that_fails_ends_its_claim(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), claim("run", tmp_path):
        raise RuntimeError("out of memory")
    with claim("run", tmp_path) as mine:
        assert mine
