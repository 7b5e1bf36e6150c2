"""A run's folder read back: every file may be missing, none broken."""

import json
import re

import pytest
from reports import CUT, keep_only, lines, made_run, whole_run

import cobra
from cobra.report.run import FILES, Run, append_step


@pytest.fixture
def run(tmp_path):
    """A run's files, to be spoilt."""
    (tmp_path / "run").mkdir()
    return whole_run(tmp_path / "run")


@pytest.mark.parametrize("name", FILES)
def test_one_file_alone(run, name):
    found = Run.load(keep_only(run, name))
    assert list(found.files) == [name]
    assert found.missing == {other: shows for other, shows in FILES.items() if other != name}


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        Run.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds none of a run's files: scores\.safetensors, plan\.json"):
        Run.load(tmp_path)


SPOILT = {
    "scores.safetensors": [(b"PK\x03\x04", "truncated or foreign")],
    "plan.json": [
        (b'{"kind": "rank plan", "version": 1, "si', "truncated or foreign"),
        (b'{"kind": "rank plan", "version": 1, "sites": [], "fold": "other", "fingerprint": ""}', "fold='other'"),
        (
            b'{"kind": "rank plan", "version": 1, "fold": "one", "fingerprint": "", "sites": '
            b'[{"name": "up", "members": ["up"], "cost": 1, "kept": [], "posterior": [7]}]}',
            "sites[0].posterior=[7]: expected a list of numbers from 0 to 1",
        ),
    ],
    "history.jsonl": [
        (b'{"step": 0, "nll": 1}\n{"step"\n{"step": 2}\n', "line 2: expected a JSON object"),
        (b'{"nll": 1}\n', "line 1: step should be a whole number"),
        (b'{"step": 0, "nll": "low"}\n', "line 1: nll should be a number, found 'low'"),
        (b'{"step": 0, "phase": 1}\n', "line 1: phase should be a name"),
        (b"[1]\n", "line 1: the line should be a JSON object"),
    ],
    "gates.jsonl": [
        (b'{"step": 0}\n', "line 1: gates should be group -> probabilities"),
        (b'{"step": 0, "gates": {"up": [0.5, 1.5]}}\n', "line 1: gates of up should be probabilities"),
        (b'{"step": 0, "gates": {"up": [NaN]}}\n', "line 1: gates of up should be probabilities"),
    ],
    "merge.json": [
        (b"{}", "sites should be a list"),
        (b'{"sites": [{"name": "up", "rank": 1}]}', "delta_norm of up should be"),
    ],
    "eval.json": [
        (b"[]", "the file should be a JSON object"),
        (b'{"bins": [{"confidence": 0.5, "accuracy": 1.2, "count": 3}]}', "accuracy of bin 0 should be a share"),
        (b'{"bins": [{"confidence": 0.5, "accuracy": 0.2, "count": -3}]}', "count of bin 0 should be a whole number"),
    ],
    "run.json": [(b"\xff\xfe", "truncated or foreign")],
}


@pytest.mark.parametrize(("name", "content", "message"), [(n, *case) for n, cases in SPOILT.items() for case in cases])
def test_broken_file(run, name, content, message):
    """The error names the file and what is wrong in it."""
    (run / name).write_bytes(content)
    with pytest.raises(cobra.FormatError, match=rf"{re.escape(name)}: .*{re.escape(message)}"):
        Run.load(run)


def test_scores_that_are_not_finite(tmp_path):
    made_run(tmp_path, ["up", "mid"], gamma=[1.0, float("nan")])
    with pytest.raises(cobra.FormatError, match=r"scores\.safetensors: gradient must be finite and not negative"):
        Run.load(tmp_path)


def test_half_a_last_line(run):
    """A killed run leaves one: the rest is read, and a note says so."""
    with open(run / "history.jsonl", "a") as f:
        f.write('{"step": 10, "nl')
    found = Run.load(run)
    assert found.notes == ("history.jsonl ends in the middle of line 9; the lines before it are shown.",)
    assert len(found.history) == 8


def test_resumed_run(tmp_path):
    """Steps that were logged twice count once, with what was said last; values may be missing or not finite."""
    for step in (0, 1, 2, 1, 2, 3):
        append_step(tmp_path, step, nll=float(step) if step != 3 else float("nan"))
    append_step(tmp_path, 2, kl=0.5, lr=None)
    history = Run.load(tmp_path).history
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    assert history[2] == {"step": 2, "nll": 2.0, "kl": 0.5, "lr": None}


def test_cut(run):
    """The plan's own step, which may lie between logged ones; else where the phase changes."""
    assert Run.load(run).cut == CUT
    made_run(run, ["up"], step=3)
    assert Run.load(run).cut == 3
    made_run(run, ["up"], step=100)
    assert Run.load(run).cut == CUT
    (run / "history.jsonl").write_text("".join(json.dumps({"step": r["step"]}) + "\n" for r in lines(run / "history.jsonl")))
    assert Run.load(run).cut is None


def test_gates_within_the_history(run):
    """One file may hold both."""
    (run / "history.jsonl").write_bytes((run / "history.jsonl").read_bytes() + (run / "gates.jsonl").read_bytes())
    (run / "gates.jsonl").unlink()
    found = Run.load(run)
    assert list(found.gates) == [0, 2, 4] and len(found.history) == 8 and found.missing == {}
