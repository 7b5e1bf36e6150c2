"""The page on the command line is true: its lines run in order in one folder, on small models and with few steps."""

import json
import re
import shlex
from pathlib import Path

import pytest
from models import minilm_folder
from test_cli_diagnose import ROWS, model_folder, written
from typer.testing import CliRunner

import cobra
from cobra.cli.app import app
from cobra.cli.training.folder import RESULT

PAGE = (Path(cobra.__file__).parents[1] / "docs" / "command-line.md").read_text(encoding="utf-8")
QUICK = "--steps 3 --batch-size 4 --no-report --device cpu"
CALIBRATION = "--calibration-steps 2 --calibration-examples 4"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def files(folder: Path) -> None:
    """What the page takes for granted: a table, answers, a language model, its file of settings."""
    written(folder / "texts.csv", ROWS * 4)
    rows = [{"question": f"what follows {a} ?", "answer": f"{a + 1} ."} for a in range(20)]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model_folder(folder / "lm", "GPT2LMHeadModel", "gpt2")
    model_folder(folder / "critic", "BertForSequenceClassification")
    for text in blocks("yaml"):
        name = re.match(r"# (\S+)\n", text)[1]
        (folder / name).write_text(text.replace("minilm", "critic").replace("300000", "3000"), encoding="utf-8")


@pytest.mark.filterwarnings("ignore:the path integral misses")
def test_command_lines(tmp_path, monkeypatch):
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("shell") for line in block.splitlines()]
    assert len(lines) >= 8 and minilm_folder().is_dir()
    for line in lines:
        _, command, *words = shlex.split(line.replace("minilm", "critic").replace("--budget 288", "--budget 60"))
        if command == "train" and "--resume" not in words:
            words += shlex.split(QUICK if "--scores" in words else f"{QUICK} {CALIBRATION}")
        result = CliRunner().invoke(app, [command, *words])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    results = [json.loads((tmp_path / "runs" / name / RESULT).read_bytes()) for name in ("first", "sft", "second", "third")]
    assert [found["task"] for found in results] == ["classification", "causal-lm", "classification", "classification"]
    assert (tmp_path / "runs" / "first" / "merged" / "model.safetensors").is_file()


def test_free_settings_are_those_that_the_page_names():
    from dataclasses import fields

    from cobra.cli.training.settings import TrainSettings

    named = re.search(r"changes nothing that is trained\n\(([^)]*)\)", PAGE)[1]
    free = {f"--{each.name.replace('_', '-')}" for each in fields(TrainSettings) if each.metadata.get("free")}
    assert set(re.findall(r"--[a-z-]+", named)) == free
