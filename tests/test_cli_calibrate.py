"""`cobra calibrate` as a shell calls it: scores of every task, the very ones of the library, and what is refused."""

import json

import pytest
import torch
from test_cli_diagnose import ROWS, model_folder, written
from typer.testing import CliRunner

import cobra
from cobra.cli.app import app
from cobra.cli.training.prepare import prepare
from cobra.cli.training.settings import CalibrateSettings

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")


def run(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "critic", "BertForSequenceClassification")


@pytest.fixture
def texts(tmp_path):
    return written(tmp_path / "texts.csv", ROWS * 3)


def test_scores_are_those_of_the_library(classifier, texts, tmp_path):
    """And the table names every layer, the residual, and the command for ranks, which works."""
    out = tmp_path / "s.safetensors"
    result = run(classifier, texts, "--examples", 6, "--steps", 4, "--out", out)
    assert result.exit_code == 0 and result.stderr == "", result.output
    scores = cobra.LayerScores.load(out)
    assert scores.settings["examples"] == 6 and scores.settings["steps"] == 4
    subject = prepare(CalibrateSettings(model=str(classifier), data=str(texts)))
    expected = cobra.calibrate(subject.model, subject.batches(subject.train[:6], 8), steps=4, max_examples=6)
    assert torch.equal(scores.conductance, expected.conductance) and torch.equal(scores.gradient, expected.gradient)
    assert scores.settings["granularity"] == "site" and len(scores.sites) == 13
    told = "".join(result.stdout.split())
    assert "critic,6rows" in told and "bert.pooler.dense" in told and "attributionsmissF(x)-F(x0)by" in told
    command = result.stdout.rstrip().rpartition("ranks from it: cobra ")[2].replace("\n", "").split()
    assert command[0] == "plan" and command[-1] == str(8 * 13)
    assert CliRunner().invoke(app, command).exit_code == 0


def test_json(classifier, texts, tmp_path):
    options = ("--granularity", "block", "--estimator", "direct", "--baseline", "mean", "--steps", 3, "--json")
    result = run(classifier, texts, *options, "--out", tmp_path / "s.safetensors")
    found = json.loads(result.stdout)
    assert [layer["name"] for layer in found["layers"]] == ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler.dense"]
    assert sum(layer["prior"] for layer in found["layers"]) == pytest.approx(1) and found["examples"] == 12
    settings = cobra.LayerScores.load(found["scores"]).settings
    assert (settings["estimator"], settings["baseline"], settings["granularity"]) == ("direct", "mean", "block")


@pytest.mark.parametrize(
    ("architecture", "kind", "options", "task"),
    [
        ("GPT2LMHeadModel", "gpt2", (), "causal-lm"),
        ("GPT2LMHeadModel", "gpt2", ("--prompt", "text", "--response", "label"), "causal-lm"),
        ("BertModel", "bert", (), "classification"),
        ("BertModel", "bert", ("--task", "regression"), "regression"),
    ],
)
def test_tasks(texts, tmp_path, architecture, kind, options, task):
    """A bare encoder's head is fitted first, which is said on the error stream."""
    folder = model_folder(tmp_path / "m", architecture, kind)
    result = run(folder, texts, *options, "--steps", 2, "--examples", 4, "--json", "--out", tmp_path / "s.safetensors")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["task"] == task and all(layer["contribution"] > 0 and layer["gradient"] > 0 for layer in found["layers"])
    assert ("note: the new head was fitted on frozen features of 12 rows" in result.stderr) == (kind == "bert")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label", "stars"), "no column 'stars'"),
        (("--examples", 0), "examples=0: expected at least 1"),
        (("--estimator", "guess"), "estimator='guess': expected one of paper, conductance, direct"),
        (("--task", "regression"), "is a classification model, and the task is regression"),
    ],
)
def test_refused(classifier, texts, tmp_path, options, message):
    result = run(classifier, texts, *options, "--out", tmp_path / "s.safetensors")
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    assert not (tmp_path / "s.safetensors").exists()
