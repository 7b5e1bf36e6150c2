"""The commands, as a shell calls them."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from models import image_batch, logits_of, vit
from test_lora import trained
from typer.testing import CliRunner

import cobra
from cobra.cli.app import app
from cobra.plan import RankPlan

run = CliRunner().invoke


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    cobra.calibrate(vit(), [image_batch()], steps=4, progress=False).save(path)
    return path


pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")


def test_version():
    result = run(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"cobra-peft {cobra.__version__}\n")
    assert "Decides where an adapter's rank belongs" in run(app, ["--help"]).output


def test_plan(scores, tmp_path):
    """A table for people; the file is a plan that an adapter applies."""
    result = run(app, ["plan", str(scores), "--budget", "24", "--r-max", "8", "--out", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    plan = RankPlan.load(tmp_path / "plan.json")
    assert plan.total == 24 and result.output == plan.table() + "\n"
    model = vit()
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=0, r_max=8, gate="open"))
    adapter.apply(plan)
    assert sum(group.rank for group in adapter.groups) == 24


@pytest.mark.parametrize("show", ["json", "csv", "peft", "axolotl"])
def test_plan_for_other_tools(scores, show):
    options = ["--budget", "1500", "--unit", "parameters", "--multiple", "2", "--tied", "qkv", "--r-max", "8", "--format", show]
    result = run(app, ["plan", str(scores), *options])
    assert result.exit_code == 0, result.output
    if show == "json":
        plan = RankPlan.from_dict(json.loads(result.output))
        assert plan.parameters <= 1500 and plan.provenance["budget"]["tied"] == ["qkv"]
    elif show == "csv":
        assert result.output.splitlines()[0] == "layer,group,rank,gates,least_kept,rank_parameters"
    elif show == "peft":
        from peft import LoraConfig

        assert LoraConfig(**json.loads(result.output)).rank_pattern is not None
    else:
        keys = yaml.safe_load(result.output)
        assert keys["adapter"] == "lora" and set(keys["lora_rank_pattern"]) == set(keys["lora_alpha_pattern"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "99999"], "the capacity of 12 groups"),
        (["--budget", "8", "--unit", "watts"], "unit='watts' is not one of"),
        (["--budget", "8", "--tied", "moe"], "moe"),
        (["--budget", "8", "--maximum", "8"], "--maximum 8: expected NAME=RANK"),
        (["--budget", "8", "--maximum", "nowhere=8"], "nowhere"),
        (["--budget", "8", "--out", "."], ". is a folder; name a file"),
    ],
)
def test_plan_errors(scores, options, message):
    """Exit code 2, one line, no traceback."""
    result = run(app, ["plan", str(scores), *options])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.startswith("error: ")


def test_plan_with_limits_and_warnings(scores, tmp_path):
    """A layer with most of the prior is told of on the error stream, and one option limits it."""
    found = cobra.LayerScores.load(scores)
    name = found.sites[2]
    steep = torch.full_like(found.conductance, 1.0)
    steep[2] = 100.0
    replace(found, conductance=steep, gradient=torch.ones_like(steep)).save(tmp_path / "steep.safetensors")
    command = ["plan", str(tmp_path / "steep.safetensors"), "--budget", "24", "--format", "json"]
    result = run(app, command)
    assert result.exit_code == 0 and result.stderr.startswith(f"warning: {name} has 90% of the prior and gets ")
    assert RankPlan.from_dict(json.loads(result.stdout)).ranks[name] > 12
    result = run(app, [*command, "--maximum", f"{name}=3"])
    assert result.exit_code == 0 and not result.stderr
    assert RankPlan.from_dict(json.loads(result.stdout)).ranks[name] == 3


def test_plan_of_a_missing_file(tmp_path):
    result = run(app, ["plan", str(tmp_path / "none"), "--budget", "1"])
    assert result.exit_code == 2 and "no such file; expected a COBRA layer scores" in result.stderr


def test_check(tmp_path):
    """Exit code 0 where every engine asked for loads it, 1 where one does not, 2 where it is no adapter."""
    _, adapter = trained(vit)
    adapter.save_pretrained(tmp_path / "a")
    good = run(app, ["check", str(tmp_path / "a"), "--for", "peft,vllm"])
    assert good.exit_code == 0 and good.output.startswith("engine"), good.output
    bad = run(app, ["check", str(tmp_path / "a"), "--json"])
    assert bad.exit_code == 1
    verdicts = json.loads(bad.output)["verdicts"]
    assert verdicts["peft"]["ok"] and not verdicts["sglang"]["ok"]
    assert run(app, ["check", str(tmp_path)]).exit_code == 2
    unknown = run(app, ["check", str(tmp_path / "a"), "--for", "torch"])
    assert unknown.exit_code == 2 and "torch" in unknown.stderr


def test_merge(tmp_path):
    """Two adapters at once, into a folder that the model's own class loads."""
    base = vit()
    base.save_pretrained(tmp_path / "base")
    parts = []
    for i in (0, 1):
        _, adapter = trained(vit, i)
        adapter.save_pretrained(tmp_path / f"a{i}", layout="padded")
        parts.append((adapter.to_lora(), (0.7, 0.3)[i]))
    folders = [str(tmp_path / name) for name in ("base", "a0", "a1")]
    result = run(app, ["merge", *folders, "--weight", "0.7", "--weight", "0.3", "--out", str(tmp_path / "m")])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("site")
    merged = type(base).from_pretrained(tmp_path / "m").eval()
    expected = vit()
    cobra.combine(parts).attach(expected).merge()
    torch.testing.assert_close(
        logits_of(merged, image_batch()), logits_of(expected.eval(), image_batch()), rtol=1e-5, atol=1e-5
    )
    again = run(app, ["merge", *folders, "--out", str(tmp_path / "m")])
    assert again.exit_code == 2 and "exists; name a new folder" in again.stderr
    few = run(app, ["merge", *folders, "--weight", "1", "--out", str(tmp_path / "n")])
    assert few.exit_code == 2 and "1 weights for 2 adapters" in few.stderr
    assert not (tmp_path / "n").exists()


def test_report(scores, tmp_path):
    """The page of a run that has scores and nothing else; code 2 where there is no run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scores.safetensors").write_bytes(scores.read_bytes())
    result = run(app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "vit.layers.0" in next((tmp_path / "run").rglob("*.html")).read_text(encoding="utf-8")
    assert run(app, ["report", str(tmp_path / "none")]).exit_code == 2


def test_env():
    result = run(app, ["env", "--json"])
    assert result.exit_code == 0 and json.loads(result.output)["torch"].startswith(torch.__version__.split("+")[0])
