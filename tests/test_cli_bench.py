"""`cobra bench`: rows of every part, equal work before it is timed, models of every task, and what is refused."""

import json
import sys

import pytest
import torch
from models import gpt2, vit
from test_cli_export import llama
from test_cli_merge import refused
from typer.testing import CliRunner

from cobra.cli.app import app
from cobra.cli.bench import check_alike

FEW = ("--rounds", 2, "--batch-size", 2, "--tokens", 8, "--rank", 2, "--points", 3)
STEPS = ["frozen model, gradient to the embeddings", "cobra LoRA, r=2", "cobra gates, r_max=2", "cobra gates, r_max=4"]
MERGING = ["copy of the weights of {} layers", "merge", "unmerge", "untouched model", "merged model"]


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def saved(build, folder) -> str:
    build().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("build", "layers"), [(vit, 12), (gpt2, 8), (llama, 7)])
def test_rows_of_every_part(build, layers, tmp_path):
    result = bench(saved(build, tmp_path / "model"), *FEW, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    names = [*STEPS, "peft LoRA, r=2", STEPS[0], "cobra.calibrate, 3 points", *MERGING]
    assert [row["name"] for row in found["rows"]] == [name.format(layers) for name in names]
    assert all(row["seconds"] > 0 and row["rounds"] == 2 for row in found["rows"])
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in found["rows"])
    calibrated = next(row for row in found["rows"] if row["name"].startswith("cobra.calibrate"))
    assert found["calibration_seconds_per_example"] == pytest.approx(calibrated["seconds"] / 2)
    assert found["settings"] == dict(model=str(tmp_path / "model"), rounds=2, batch_size=2, tokens=8, rank=2, points=3, seed=0)


def test_an_encoder_gets_a_head(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    result = bench(saved(lambda: BertModel(BertConfig(**sizes)), tmp_path / "model"), *FEW)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "model" and f"torch {torch.__version__}" in lines[1]
    assert "forward + backward, 2 examples, 6 layers adapted, 2 rounds" in lines
    assert lines[-1].startswith("calibration: ") and lines[-1].endswith(" s an example at 3 points")


def test_without_peft(tmp_path, monkeypatch):
    """It is compared where it is installed."""
    monkeypatch.setitem(sys.modules, "peft", None)
    result = bench(saved(llama, tmp_path / "model"), *FEW, "--json")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["rows"]][:5] == [*STEPS, STEPS[0]]


def test_different_work_is_not_timed():
    logits = torch.randn(2, 3)
    check_alike({"one": logits, "other": logits * (1 + 1e-6)})
    with pytest.raises(ValueError, match=r"other and one compute different things: outputs differ by 1\.0e-01 of the largest"):
        check_alike({"one": logits, "other": logits * 1.1})
    with pytest.raises(ValueError, match="compute different things"):
        check_alike({"one": logits, "other": logits * float("nan")})


def test_refuses(tmp_path):
    model = saved(llama, tmp_path / "model")
    refused(bench(model, *FEW, "--rank", 33), "rank=33: model.layers.0.self_attn.q_proj has 32 features", "at most 32")
    refused(bench(tmp_path / "nowhere"), "nowhere", "no such file")
