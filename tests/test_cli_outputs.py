"""Outputs that cannot be written: every command refuses them before its work, in one line, and makes nothing."""

import os
from pathlib import Path

import pytest
from test_cli_merge import refused
from typer.testing import CliRunner

from cobra.cli.app import app
from cobra.cli.outputs import check_file, check_folder, check_new_folder

# command -> the first work it does after its options, and its words before --out
WORK = {
    "calibrate": ("cobra.cli.training.prepare.prepare", ("minilm", "texts.csv")),
    "plan": ("cobra.LayerScores.load", ("scores.safetensors", "--budget", "8")),
    "diagnose": ("cobra.cli.diagnose.measure", ("minilm", "texts.csv")),
    "merge": ("cobra.load_adapter", ("minilm", "adapter")),
    "export": ("cobra.load_adapter", ("adapter",)),
    "report": ("cobra.report.page.write_report", (".",)),
}


@pytest.fixture
def refuses(tmp_path, monkeypatch):
    """Runs a command with an --out in a folder that holds a file and a folder; its work would end it with a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "folder").mkdir()

    def refuses(command: str, out: str, *words: str) -> None:
        work, options = WORK[command]
        monkeypatch.setattr(work, None)
        refused(CliRunner().invoke(app, [command, *options, "--out", out]), *words)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]

    return refuses


@pytest.mark.parametrize("command", WORK)
def test_under_a_file(refuses, command):
    refuses(command, "file/new/one", "file is no folder; name another place with --out")


@pytest.mark.parametrize("command", WORK)
def test_not_writable(refuses, command, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    refuses(command, "new/one", "is not writable; name another place with --out")


@pytest.mark.parametrize("command", ["calibrate", "plan"])
def test_a_folder_for_a_file(refuses, command):
    refuses(command, "folder", "folder is a folder; name a file with --out")


@pytest.mark.parametrize("command", ["merge", "export"])
def test_what_is_there(refuses, command):
    refuses(command, "folder", "folder exists; name a new folder")


def test_a_file_for_a_folder(refuses):
    refuses("diagnose", "file", "file is no folder; name another place with --out")


def test_what_can_be_written(tmp_path, monkeypatch):
    """Files and folders that are there, and new ones however deep; nothing is made yet."""
    monkeypatch.chdir(tmp_path)
    for name in ("new", "one/two/three", tmp_path / "a" / "b", "../beside"):
        for check in (check_file, check_new_folder, check_folder):
            check(Path(name))
    check_folder(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x", encoding="utf-8")
    check_file(tmp_path / "file")
