"""Settings of `cobra train`: from files, from options, and over one another; a slip is an error that names it."""

import inspect
from dataclasses import fields

import pytest
import yaml
from typer.testing import CliRunner

from cobra.cli.app import app
from cobra.cli.training.configfile import read_config, write_config
from cobra.cli.training.folder import CONFIG
from cobra.cli.training.options import command_line, given_settings, with_options
from cobra.cli.training.settings import CalibrateSettings, TrainSettings
from cobra.cli.training.settle import settle
from cobra.config import PRESETS, CobraConfig

BASE = {"model": "minilm", "data": "reviews"}
OTHERS = {
    "task": "classification",
    "budget": 300,
    "unit": "parameters",
    "tied": ("qkv", "gate_up"),
    "cobra": {"beta": 0.1, "fusion": "sum", "temperature": [2.0, 0.5]},
    "lr": 1e-3,
    "merge": True,
    "report": False,
    "out": "runs/a b",
}


def written(path, **values):
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_file_round_trip(tmp_path):
    """What a run writes into its folder is what it reads from there, every field of it."""
    settings = TrainSettings(**BASE, **OTHERS)
    write_config(tmp_path / "c.yaml", settings)
    values = read_config(tmp_path / "c.yaml", TrainSettings)
    assert values.keys() == {each.name for each in fields(TrainSettings)}
    assert TrainSettings(**values) == settings != TrainSettings(**BASE)


def test_command_line_round_trip():
    """run.json's command says the same settings, and only those that are not the defaults."""
    settings = TrainSettings(**BASE, **OTHERS)
    words = command_line("train", settings)
    assert words[:2] == ["cobra", "train"] and "--no-report" in words and "--seed" not in words
    found = {}

    @with_options(TrainSettings)
    def train(given: dict, resume: bool = False) -> None:
        found.update(given_settings(given, TrainSettings))

    import typer

    command = typer.Typer()
    command.command()(train)
    result = CliRunner().invoke(command, words[2:])
    assert result.exit_code == 0, result.output
    assert TrainSettings(**found) == settings


@pytest.mark.parametrize("kind", [TrainSettings, CalibrateSettings])
def test_every_field_is_an_option(kind):
    """With its default in the help where it says something."""
    command = {TrainSettings: "train", CalibrateSettings: "calibrate"}[kind]
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for each in fields(kind):
        argument = kind is CalibrateSettings and each.name in ("model", "data")
        flag = each.metadata.get("flag") or f"--{each.name.replace('_', '-')}"
        assert (each.name if argument else flag) in shown, each.name
    assert "[64]" in shown and "[0]" in shown


def test_numbers_of_yaml(tmp_path):
    """1e-3 is a text in YAML 1.1, and a number to everyone else."""
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-3\nepochs: 2\ncobra:\n  beta: 1e-2\n", encoding="utf-8")
    values = read_config(path, TrainSettings)
    assert values == {"lr": 1e-3, "epochs": 2.0, "cobra": {"beta": 1e-2}} and isinstance(values["epochs"], float)
    assert read_config(written(tmp_path / "empty.yaml"), TrainSettings) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 4", "c.yaml: unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("learning-rate: 4", "unknown key 'learning-rate'; known are model, data, task"),
        ("batch-size: 4", "unknown key 'batch-size'; did you mean 'batch_size'?"),
        ("batch_size: 4.5", "batch_size: expected a whole number, found 4.5"),
        ("batch_size: true", "batch_size: expected a whole number, found True"),
        ("lr: fast", "lr: expected a number, found 'fast'"),
        ("merge: 1", "merge: expected true or false, found 1"),
        ("data: 3", "data: expected a text, found 3"),
        ("data: null", "no data: give --data"),
        ("tied: qkv", "tied: expected a list of texts, found 'qkv'"),
        ("cobra: 3", "cobra: expected a mapping, found 3"),
        ("cobra: {bete: 3}", "CobraConfig has no field 'bete'; did you mean 'beta'?"),
        ("cobra: {seed: 3}", "cobra: seed: this one has a setting of its own"),
        ("cobra: {beta: [1]}", "cobra: beta: expected a number, found [1]"),
        ("cobra: {beta: foo}", "cobra: beta: expected a number, found 'foo'"),
        ("cobra: {temperature: [1, x]}", "cobra: temperature: expected two numbers, found [1, 'x']"),
        ("cobra: {share_inputs: 1}", "cobra: share_inputs: expected true or false, found 1"),
        ("cobra: {target_modules: 3}", "cobra: target_modules: expected a text or a list of texts, found 3"),
        (
            "{scores: s.safetensors, baseline: mean}",
            "baseline='mean' changes nothing, as the scores are measured already: leave",
        ),
        ("{preset: singular, calibration_steps: 9}", "calibration_steps=9 changes nothing, as nothing is calibrated"),
        ("{cobra: {gate: open, basis: singular, init: uniform}, estimator: direct}", "estimator='direct' changes nothing"),
        ("cobra: {fusion: best}", "fusion='best' is not one of"),
        ("- lr", "expected a mapping of settings"),
        ("lr: [", "c.yaml: not a YAML file"),
        ("lr: 0", "lr=0.0: expected above 0"),
        ("epochs: .inf", "epochs=inf: expected a finite number"),
        ("batch_size: 0", "batch_size=0: expected at least 1"),
        ("search_share: 1.5", "search_share=1.5: expected at most 1"),
        ("eval_share: 1.0", "eval_share=1.0: expected below 1"),
        ("unit: rank", "unit='rank': expected one of ranks, parameters, bytes, flops"),
        ("prompt: q", "prompt and response go together"),
        ("chat: true", "chat needs prompt and response"),
        ("{prompt: q, response: a, task: regression}", "prompt and response are for task causal-lm, not regression"),
        ("{method: lora, cobra: {gate: mean}}", "method lora has equal ranks and open gates"),
        ("eval_data: other.csv", "reviews has test reviews of its own"),
    ],
)
def test_slips(tmp_path, text, message):
    """The file and the key are named, and the nearest one offered."""
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    given = {} if text.startswith("data:") else {"data": "reviews"}
    with pytest.raises(ValueError) as raised:
        settle({"model": "minilm", "out": str(tmp_path / "r"), **given}, path, resume=False)
    assert message in str(raised.value)


def test_slips_end_the_command(tmp_path):
    """Exit code 2, one line on the error stream, and nothing made."""
    path = written(tmp_path / "c.yaml", batchsize=4)
    result = CliRunner().invoke(app, ["train", "--config", str(path), "--out", str(tmp_path / "r")])
    assert (result.exit_code, result.stdout) == (2, "") and not (tmp_path / "r").exists()
    assert result.stderr == f"error: {path}: unknown key 'batchsize'; did you mean 'batch_size'?\n"


def test_missing_file(tmp_path):
    result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2 and "none.yaml: no such file; expected settings in YAML" in result.stderr


def test_options_of_the_command_line_come_first(tmp_path):
    path = written(tmp_path / "c.yaml", **BASE, lr=1e-2, steps=7)
    settings = settle({"lr": 1e-3, "out": str(tmp_path / "r")}, path, resume=False)
    assert (settings.lr, settings.steps, settings.model) == (1e-3, 7, "minilm")
    with pytest.raises(ValueError, match=r"--set beta: expected NAME=VALUE, such as beta=0\.1"):
        settle({**BASE, "cobra": ["beta"]}, None, resume=False)


def test_folders(tmp_path):
    """A run's folder is new or empty; one that is resumed is there."""
    (tmp_path / "empty").mkdir()
    assert settle({**BASE, "out": str(tmp_path / "empty")}, None, resume=False).out == str(tmp_path / "empty")
    (tmp_path / "empty" / "x").touch()
    with pytest.raises(ValueError, match="is there and not empty: name a new folder with --out, or go on with its run"):
        settle({**BASE, "out": str(tmp_path / "empty")}, None, resume=False)
    with pytest.raises(FileNotFoundError, match=r"config\.yaml: no such file; --resume goes on with the run in --out"):
        settle({"out": str(tmp_path / "none")}, None, resume=True)


def test_resuming_with_other_settings(tmp_path):
    """What changes the result may not change, and is named with both values; the rest may."""
    out = str(tmp_path)
    write_config(tmp_path / CONFIG, TrainSettings(**BASE, lr=1e-3, steps=9))
    assert settle({"out": out}, None, resume=True).steps == 9
    again = settle({"out": out, "lr": 1e-3, "save_every": 3, "layout": "padded"}, None, resume=True)
    assert (again.save_every, again.layout, again.lr, again.out) == (3, "padded", 1e-3, out)
    with pytest.raises(ValueError, match=r"lr was 0\.001 when the run in .* began, and is 0\.01 now"):
        settle({"out": out, "lr": 1e-2}, None, resume=True)
    with pytest.raises(ValueError, match=r"steps was 9 when the run"):
        settle({"out": out}, written(tmp_path / "other.yaml", steps=10), resume=True)


def test_settings_of_a_calibration_that_is_not_made(tmp_path):
    """As options they are refused at any value; a file that a run wrote has all of them, at their defaults."""
    out = {"out": str(tmp_path / "r")}
    with pytest.raises(ValueError, match="baseline='zero' changes nothing, as the scores are measured already: leave baseline"):
        settle({**BASE, **out, "scores": "s.safetensors", "baseline": "zero"}, None, resume=False)
    settings = TrainSettings(**BASE, scores="s.safetensors")
    write_config(tmp_path / "c.yaml", settings)
    assert settle(out, tmp_path / "c.yaml", resume=False).scores == "s.safetensors"
    assert settle({**BASE, **out, "preset": "paper", "baseline": "mean"}, None, resume=False).baseline == "mean"


def test_presets_bring_their_length_of_the_search():
    """The published form is cut at the end; what is said holds, and so does what an older run's file says."""
    shares = {preset: TrainSettings(**BASE, preset=preset).share_of_search for preset in (None, *PRESETS)}
    assert shares == {None: 0.6, "paper": 1.0, "singular": 0.4}
    assert TrainSettings(**BASE, preset="paper", search_share=0.6).share_of_search == 0.6


def test_configuration_of_the_adapter():
    """Settings reach CobraConfig; the published form is a preset; lora has open gates."""
    settings = TrainSettings(**BASE, r_max=4, seed=3, cobra={"beta": 0.5})
    config = settings.config(6, total_steps=5)
    assert config == CobraConfig(6, r_max=4, seed=3, beta=0.5, total_steps=5)
    several = TrainSettings(**BASE, cobra={"target_modules": ["query", "value"], "temperature": [2, 0.5], "alpha": None})
    assert several.config(6, total_steps=5) == CobraConfig(
        6, target_modules=("query", "value"), temperature=(2.0, 0.5), total_steps=5
    )
    for preset in PRESETS:
        assert TrainSettings(**BASE, preset=preset).config(6, total_steps=5) == CobraConfig.preset(preset, 6, total_steps=5)
    assert TrainSettings(**BASE, method="lora").config(6).gate == "open"


def test_signature_is_made_of_real_types():
    """So that typer needs no names to be looked up."""

    @with_options(CalibrateSettings, "model", "data")
    def command(given: dict, more: bool = False) -> None:
        """Words."""

    parameters = inspect.signature(command).parameters
    assert [*parameters][:3] == ["model", "data", "more"] and parameters["examples"].default is None
