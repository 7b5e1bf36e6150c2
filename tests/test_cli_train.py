"""`cobra train` as a shell calls it: every task, and whatever ends a run, it goes on with the same bits."""

import gc
import json
import os
import re
import shlex
import shutil
import signal
from functools import partial
from pathlib import Path

import peft
import pyarrow
import pytest
import safetensors.torch
import torch
import transformers
import yaml
from models import minilm_folder, tokenizer
from pyarrow import parquet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli_diagnose import ROWS, model_folder, written
from test_storage import ended, kill_at, limit_file_size
from typer.testing import CliRunner

import cobra
from cobra import storage
from cobra.cli.app import app
from cobra.cli.encoder import MeanPoolClassifier
from cobra.cli.training.folder import RunFolder
from cobra.integrations.transformers import CHECKPOINT
from cobra.report.run import FILES, Run

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")

BRIEF = ("--steps", 10, "--batch-size", 4, "--no-report")
QUICK = (*BRIEF, "--calibration-steps", 4, "--calibration-examples", 4)
ODD = ("--set", "dropout=0.1", "--weight-decay", 0.1, "--accumulation", 2, "--warmup-steps", 2)
EVERY = ("--save-every", 3, "--log-every", 1)


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def done(*arguments) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Every training starts with a full garbage collection: of all that other tests left, it takes longer than the rest."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "classifier": model_folder(folder / "critic", "BertForSequenceClassification", initializer_range=0.1),
        "encoder": model_folder(folder / "encoder", "BertModel", initializer_range=0.1),
        "lm": model_folder(folder / "lm", "GPT2LMHeadModel", "gpt2", bos_token_id=101, eos_token_id=102),
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data") / "texts.csv", ROWS * 5)


@pytest.fixture
def base(folders, texts):
    """A run of 10 steps, 6 of them the search, with everything random that there is."""
    return ("--model", folders["classifier"], "--data", texts, "--budget", 20, *QUICK, *ODD, *EVERY)


def logits_of(model, texts) -> torch.Tensor:
    batch = tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


# a whole run


def test_run_folder(folders, texts, tmp_path):
    """Every file that the report reads; an adapter that peft loads; a merged model that says the same."""
    out = tmp_path / "r"
    options = [option for option in QUICK if option != "--no-report"]
    result = run(
        "--model", folders["classifier"], "--data", texts, "--budget", 20, *options, "--log-every", 1, "--merge", "--out", out
    )
    assert result.exit_code == 0 and result.stderr == "", result.output
    assert "critic, classification, 10 steps" in result.stdout and result.stdout.rstrip().endswith("index.html")
    found = Run.load(out)
    assert not found.missing and set(found.files) == set(FILES) and found.cut == 6
    assert found.plan.total == 20 and [row["step"] for row in found.history] == list(range(1, 11))
    assert [*found.gates] == list(range(7)) and found.metrics["examples"] == 2
    assert "Gates over training" in (out / "report" / "index.html").read_text(encoding="utf-8")
    settings = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert settings["command"][:4] == ["cobra", "train", "--model", str(folders["classifier"])]
    assert settings["config"]["rank_budget"]["amount"] == 20 and settings["versions"]["torch"] == torch.__version__
    assert yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["batch_size"] == 4

    sentences = [text for text, _ in ROWS]
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(out / "merged")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folders["classifier"])
    adapted = peft.PeftModel.from_pretrained(plain, str(out / "adapter"))
    torch.testing.assert_close(logits_of(adapted, sentences), logits_of(merged, sentences))
    assert transformers.AutoTokenizer.from_pretrained(out / "merged").vocab_size == tokenizer().vocab_size
    assert {path.name for path in out.rglob("*") if path.suffix in {".pt", ".pth", ".bin", ".pkl"}} == set()


def test_json_and_a_finished_run(base, tmp_path):
    """One object and nothing else; a run that is finished says it again and does nothing."""
    first = done(*base, "--out", tmp_path / "r")
    assert first["ranks"] == 20 and first["steps"] == 10 and first["bad_steps"] == 0
    assert set(first["before"]) == set(first["after"]) == {"accuracy", "nll", "ece", "examples"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}
    assert done("--resume", "--out", tmp_path / "r") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")} == before


def test_language_model_on_responses(folders, tmp_path):
    """Learns them; merged and saved; curves for tensorboard."""
    rows = [{"q": f"what follows {a} ?", "a": f"{a + 1} ."} for a in range(9)] * 4
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = done(
        *("--model", folders["lm"], "--data", tmp_path / "qa.jsonl", "--prompt", "q", "--response", "a", "--merge"),
        *(*QUICK, "--lr", 0.02, "--report-to", "tensorboard", "--out", tmp_path / "r", "--unit", "parameters"),
    )
    assert found["after"]["nll"] < found["before"]["nll"] and found["after"]["tokens"] == found["before"]["tokens"]
    assert found["merge"]["rounding loss"] < 1e-3
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    assert {"train/nll", "train/kl", "train/expected_rank"} <= set(events.Tags()["scalars"])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "merged")
    assert merged.config.architectures == ["GPT2LMHeadModel"]


def test_regression_of_an_encoder(folders, tmp_path):
    """A new head, labels that are real, a Parquet file; blocks share their gates."""
    rows = [(text, label + 0.5) for text, label in ROWS * 5]
    names = ("text", "label")
    parquet.write_table(pyarrow.table(dict(zip(names, zip(*rows, strict=True), strict=True))), tmp_path / "a.parquet")
    options = ("--granularity", "block", "--out", tmp_path / "r")
    found = done("--model", folders["encoder"], "--data", tmp_path / "a.parquet", *QUICK, *options)
    assert found["task"] == "regression" and set(found["after"]) >= {"mse", "mae"}
    assert found["notes"] == ["the new head was fitted on frozen features of 18 rows"]
    state = safetensors.torch.load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors")
    assert any("classifier" in name for name in state)


def test_lora(folders, texts, tmp_path):
    """Equal ranks within the budget, nothing calibrated; a budget below one rank a layer is refused."""
    base = ("--model", folders["classifier"], "--data", texts, *QUICK, "--method", "lora")
    found = done(*base, "--budget", 30, "--out", tmp_path / "r")
    plan = cobra.RankPlan.load(tmp_path / "r" / "plan.json")
    assert set(plan.ranks.values()) == {2} and found["ranks"] == 26 and found["path residual"] is None
    assert not (tmp_path / "r" / "scores.safetensors").exists()
    result = run(*base, "--budget", 12, "--out", tmp_path / "s")
    assert result.exit_code == 2 and "budget=12 ranks: one rank in each of 13 layers takes 13" in result.stderr


def test_lora_of_a_largest_rank(folders, texts, tmp_path):
    """Below what the budget gives, the largest rank holds."""
    data = ("--model", folders["classifier"], "--data", texts, *QUICK, "--method", "lora", "--budget", 30)
    assert done(*data, "--r-max", 1, "--out", tmp_path / "r")["ranks"] == 13
    config = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_bytes())
    assert config["r"] == 1 and config["rank_pattern"] == {}


def test_lora_of_a_multiple(folders, texts, tmp_path):
    """The budget's rank, 3, goes down to it."""
    data = ("--model", folders["classifier"], "--data", texts, *QUICK, "--method", "lora", "--budget", 40)
    assert done(*data, "--multiple", 2, "--out", tmp_path / "r")["ranks"] == 26


def test_xlnet(texts, tmp_path):
    """Its layers see tokens first: what would be calibrated is refused with what needs no calibration, which trains."""
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    data = ("--model", model_folder(tmp_path / "m", "XLNetForSequenceClassification", "xlnet", **sizes), "--data", texts)
    result = run(*data, *BRIEF, "--out", tmp_path / "r")
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith("error: transformer.layer.0.ff.layer_1 has an")
    assert result.stderr.endswith("or train without a calibration: --preset singular, or --method lora\n")
    assert not (tmp_path / "r").exists()
    found = done(*data, *BRIEF, "--budget", 4, "--preset", "singular", "--out", tmp_path / "s")
    assert found["ranks"] == 4 and found["bad_steps"] == 0


@pytest.mark.parametrize("options", [(), ("--method", "lora")])
@pytest.mark.parametrize(("kind", "outputs"), [("multi_label_classification", 2), ("regression", 3)])
def test_several_labels_of_a_row(texts, tmp_path, kind, outputs, options):
    """Refused with nothing left behind."""
    folder = model_folder(tmp_path / "m", "BertForSequenceClassification", problem_type=kind, num_labels=outputs)
    result = run("--model", folder, "--data", texts, *QUICK, *options, "--out", tmp_path / "r")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert f"of a row at once ({'num' if outputs == 3 else 'problem'}" in result.stderr
    assert "rows have one label here: take its base model" in result.stderr and not (tmp_path / "r").exists()


def test_singular_basis(folders, texts, tmp_path):
    """Nothing is calibrated, and the plan says what it went by."""
    out = tmp_path / "r"
    options = [option for option in BRIEF if option != "--no-report"]
    found = done(
        "--model", folders["classifier"], "--data", texts, "--budget", 20, "--preset", "singular", *options, "--out", out
    )
    assert found["ranks"] == 20 and found["path residual"] is None and not (out / "scores.safetensors").exists()
    assert json.loads((out / "plan.json").read_bytes())["provenance"]["source"] == "singular"
    assert (out / "report" / "index.html").is_file()


@pytest.mark.parametrize(
    ("preset", "given", "r_max", "cut"),
    [
        ("singular", (), 13, 4),  # 8 times 20 / 13
        ("singular", ("--r-max", 5, "--search-share", 0.5), 5, 5),
        ("paper", ("--calibration-steps", 2, "--calibration-examples", 4), 16, 10),
    ],
)
def test_presets_bring_their_width_and_their_cut(folders, texts, tmp_path, preset, given, r_max, cut):
    """As measured, or as published; what is given holds."""
    out = tmp_path / "r"
    data = ("--model", folders["classifier"], "--data", texts, "--budget", 20)
    found = done(*data, *BRIEF, "--preset", preset, *given, "--log-every", 1, "--out", out)
    assert json.loads((out / "run.json").read_bytes())["config"]["r_max"] == r_max
    assert [row["phase"] for row in RunFolder(out).history()] == ["search"] * cut + ["cut"] * (10 - cut)
    assert found["ranks"] == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((10, "--unit", "parameters"), "budget=10 parameters: the cheapest rank costs 32; raise it to at least 32"),
        ((0,), "budget=0 ranks: the cheapest rank costs 1; raise it to at least 1"),
        ((1, "--multiple", 2, "--tied", "qkv"), "budget=1 ranks: the fewest ranks that multiple and tied allow cost 2"),
        ((0, "--method", "lora"), "budget=0 ranks: one rank in each of 13 layers takes 13"),
        ((25, "--method", "lora", "--multiple", 2), "budget=25 ranks: multiple=2 ranks in each of 13 layers takes 26"),
        ((26, "--method", "lora", "--multiple", 2, "--r-max", 1), "r_max=1: every rank is a multiple of 2; raise r_max to at"),
    ],
)
def test_a_budget_below_the_cheapest_rank(folders, texts, tmp_path, options, message):
    """Refused before any work, with nothing left behind."""
    base = ("--model", folders["classifier"], "--data", texts, *BRIEF)
    result = run(*base, "--budget", *options, "--out", tmp_path / "r")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.output
    assert not (tmp_path / "r").exists()


def test_a_class_that_transformers_does_not_know(texts, tmp_path):
    """MiniLM with mean pooling: said at the end, in the card and in the folders, which the Auto classes refuse."""
    out = tmp_path / "r"
    result = run("--model", "minilm", "--data", texts, "--budget", 40, *QUICK, "--lr", 0.01, "--merge", "--json", "--out", out)
    assert result.exit_code == 0, result.output
    name = "cobra.cli.encoder.MeanPoolClassifier"
    assert result.stderr.splitlines()[-1].startswith(f"note: adapter/ and merged/ load with {name} alone")
    assert json.loads(result.stdout)["architecture"] == name
    for folder, error in (("merged", ValueError), ("adapter", OSError)):
        with pytest.raises(error):
            transformers.AutoModelForSequenceClassification.from_pretrained(out / folder)

    code = re.search(
        "## Loading.*?```python\n(.*?)```", (out / "adapter" / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )[1]
    code = code.replace("path/to/the/base/model", str(minilm_folder())).replace("path/to/this/folder", str(out / "adapter"))
    found: dict = {}
    exec(code, found)
    merged = MeanPoolClassifier.from_pretrained(out / "merged")
    sentences = [text for text, _ in ROWS]
    torch.testing.assert_close(logits_of(found["model"], sentences), logits_of(merged, sentences))

    words = ["export", out / "checkpoints" / "checkpoint-10", "--base", minilm_folder(), "--out", tmp_path / "a"]
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 0
    assert cobra.load_adapter(tmp_path / "a").provenance["architecture"] == name


# what ends a run


def same(one: Path, other: Path) -> bool:
    """Adapter, ranks and the last checkpoint, bit for bit."""
    names = ["adapter/adapter_model.safetensors", "plan.json", f"checkpoints/checkpoint-10/{CHECKPOINT}"]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def whole(folders, texts, tmp_path_factory):
    """The run that nothing ended."""
    out = tmp_path_factory.mktemp("whole") / "r"
    done("--model", folders["classifier"], "--data", texts, "--budget", 20, *QUICK, *ODD, *EVERY, "--out", out)
    return out


def test_scores_of_cobra_calibrate(whole, folders, texts, tmp_path):
    """The very same scores make the very same run; those of another model are refused before anything is written."""
    scores = ("--scores", whole / "scores.safetensors")
    data = ("--model", folders["classifier"], "--data", texts, "--budget", 20)
    done(*data, *BRIEF, *ODD, *EVERY, *scores, "--out", tmp_path / "r")
    assert same(tmp_path / "r", whole)
    result = run("--model", folders["lm"], "--data", texts, "--task", "classification", *scores, "--out", tmp_path / "c")
    assert result.exit_code == 2 and "scores" in result.stderr and not (tmp_path / "c").exists()


def test_config_file(whole, tmp_path):
    """The same run from a file as from options."""
    done("--config", whole / "config.yaml", "--out", tmp_path / "r")
    assert same(tmp_path / "r", whole)


def child(prepare, *arguments) -> int:
    """How a process that runs the command after `prepare()` ends; what it said is in a file beside its folder."""

    def act():
        prepare()
        result = run(*arguments)
        Path(f"{arguments[-1]}.said").write_text(result.stderr, encoding="utf-8")
        os._exit(result.exit_code)

    return ended(act)


def signal_at(call: str, number: int, *signals: int) -> None:
    """Signals to itself at the n-th call of a function of os."""
    true, left = getattr(os, call), [number]

    def signalling(*args):
        left[0] -= 1
        if not left[0]:
            for each in signals:
                os.kill(os.getpid(), each)
        return true(*args)

    setattr(os, call, signalling)


# renames: config, run, before, scores, then two a checkpoint (schedule, cobra) at steps 3, 6, 9 and 10, ...
IN_CALIBRATION, AT_STEP_3, IN_STEP_6, AFTER_TRAINING = 4, 6, 7, 13


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(base, whole, tmp_path, number, code):
    """The step is finished and saved, and the line to go on with is said; with it the run ends with the same bits."""
    out = tmp_path / "r"
    assert child(partial(signal_at, "replace", AT_STEP_3, number), *base, "--out", out) == code
    said = Path(f"{out}.said").read_text(encoding="utf-8")
    newest = RunFolder(out).newest().name.rpartition("-")[2]
    assert said == f"{signal.Signals(number).name}: the last checkpoint is of step {newest}; to go on: " + (
        f"cobra train --resume --out {out}\n"
    )
    assert int(newest) in (3, 4) and not (out / "result.json").exists()
    done("--resume", "--out", out)
    assert same(out, whole)
    rows = RunFolder(out).history()
    assert [row["step"] for row in rows] == list(range(1, 11)) and {row["phase"] for row in rows} == {"search", "cut"}


def test_a_folder_that_cannot_be_made(base, tmp_path):
    """Refused as input before the calibration, with nothing to go on with."""
    (tmp_path / "file").write_text("x", encoding="utf-8")
    result = run(*base, "--out", tmp_path / "file" / "r")
    assert result.exit_code == 2
    assert "Not a directory; name a folder that can be made with --out" in result.stderr
    assert "--resume" not in result.stderr


def test_interrupted_before_training(base, whole, tmp_path):
    """At once: there is nothing to finish."""
    out = tmp_path / "r"
    assert child(partial(signal_at, "replace", IN_CALIBRATION, signal.SIGINT), *base, "--out", out) == 130
    assert "no checkpoint yet; to go on: cobra train --resume" in Path(f"{out}.said").read_text(encoding="utf-8")
    done("--resume", "--out", out)
    assert same(out, whole)


def test_second_signal_ends_at_once(base, whole, tmp_path):
    """By the signal itself; files are whole all the same."""
    out = tmp_path / "r"
    two = partial(signal_at, "replace", IN_STEP_6, signal.SIGINT, signal.SIGINT)
    assert child(two, *base, "--out", out) == -signal.SIGINT
    assert RunFolder(out).newest().name == "checkpoint-3"
    done("--resume", "--out", out)
    assert same(out, whole)


@pytest.mark.parametrize("number", [1, 3, AT_STEP_3, 8, AFTER_TRAINING])
def test_killed(base, whole, tmp_path, number):
    """SIGKILL at renames from the first to the last: the newest complete checkpoint loads, half ones are not looked at."""
    out = tmp_path / "r"
    assert child(partial(kill_at, "replace", number), *base, "--out", out) == -signal.SIGKILL
    for checkpoint in RunFolder(out).complete():
        storage.read_tensors(checkpoint / CHECKPOINT, "training checkpoint")
    done(*(("--resume",) if (out / "config.yaml").exists() else base), "--out", out)
    assert same(out, whole) and not list(out.rglob(".*.tmp"))
    assert [row["step"] for row in RunFolder(out).history()] == list(range(1, 11))


def test_a_run_begun_when_every_cut_went_by_gates_ends_so(base, tmp_path):
    """Its checkpoint names no basis; today's default would be the singular one at this budget."""
    out = tmp_path / "r"
    options = (*base, "--budget", 6, "--search-share", 0.9)
    assert child(partial(kill_at, "replace", IN_STEP_6), *options, "--out", out) == -signal.SIGKILL
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["config"]["basis"] == "singular"
    checkpoints = RunFolder(out).complete()
    assert checkpoints
    for checkpoint in checkpoints:
        tensors, meta = storage.read_tensors(checkpoint / CHECKPOINT, "training checkpoint")
        del meta["config"]["basis"]
        named = {key: value for key, value in meta.items() if key not in ("kind", "version")}
        storage.write_tensors(checkpoint / CHECKPOINT, tensors, "training checkpoint", named)
    done("--resume", "--out", out)
    assert json.loads((out / "plan.json").read_bytes())["provenance"]["source"] == "gates"


def test_a_line_half_written(base, whole, tmp_path):
    """A kill in the middle of a line of history costs that line."""
    out = tmp_path / "r"
    assert child(partial(kill_at, "replace", IN_STEP_6), *base, "--out", out) == -signal.SIGKILL
    for name in ("history.jsonl", "gates.jsonl"):
        with open(out / name, "a", encoding="utf-8") as f:
            f.write('{"step": 7, "nll"')
    done("--resume", "--out", out)
    assert same(out, whole)
    assert Run.load(out).notes == () and (out / "gates.jsonl").read_bytes() == (whole / "gates.jsonl").read_bytes()


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: bytes(len(data))], ids=["cut short", "zeros"])
def test_a_damaged_checkpoint(base, whole, tmp_path, damage):
    """The one before it is taken, and the run ends with the same bits; where there is no other, nothing is touched."""
    out = tmp_path / "r"
    assert child(partial(kill_at, "replace", 9), *base, "--out", out) == -signal.SIGKILL
    older, newer = (folder / CHECKPOINT for folder in RunFolder(out).complete())
    newer.write_bytes(damage(newer.read_bytes()))
    shutil.copytree(out, tmp_path / "s")
    result = run("--resume", "--out", out)
    assert result.exit_code == 0, result.output
    assert f"warning: {newer} is damaged: going on from step 3" in result.stderr
    assert same(out, whole)

    older, newer = (tmp_path / "s" / path.relative_to(out) for path in (older, newer))
    out = tmp_path / "s"
    older.write_bytes(b"")
    result = run("--resume", "--out", out)
    assert result.exit_code == 2 and older.exists() and newer.exists()
    assert f"{older} is damaged, and no other checkpoint is whole: put back a copy, or delete" in result.stderr
    shutil.rmtree(out / "checkpoints")
    done("--resume", "--out", out)
    assert same(out, whole)


def stamps(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the run that nothing ended: without merged/ and report/, compact."""
    return Path(shutil.copytree(whole, tmp_path / "r"))


def test_a_finished_run_refuses_what_it_lacks(finished):
    """By name, with commands that make it; without those options, and once it is made, it says its result again."""
    before = stamps(finished)
    lacking = ("--merge", "--layout", "padded", "--report", "--report-to", "tensorboard")
    result = run("--resume", "--out", finished, *lacking)
    assert result.exit_code == 2 and result.stdout == "" and stamps(finished) == before, result.output
    told = f"the run in {finished} is finished, without merge, layout, report, report_to, and --resume adds nothing to it"
    assert told in result.stderr and result.stderr.count("\n") == 1
    ways = dict(re.findall(r"for (\w+): cobra ([^;\n]+)", result.stderr))
    assert ways["report"] == ways["report_to"] == f"report {finished}"
    for name in ("merge", "layout"):
        made = CliRunner().invoke(app, shlex.split(ways[name]))
        assert made.exit_code == 0, made.output
    assert json.loads((finished / "adapter-padded" / "cobra.json").read_bytes())["layout"] == "padded"
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(finished / "merged")
    assert merged.config.architectures == ["BertForSequenceClassification"]
    (finished / "report").mkdir()
    said = json.loads((finished / "result.json").read_bytes())
    for options in ((), ("--merge", "--report"), ("--layout", "compact", "--no-merge", "--no-report", "--save-every", 7)):
        assert done("--resume", "--out", finished, *options) == said


@pytest.mark.parametrize("damage", [b"", b'{"step": 1', b"[1]\n", b"\0\0\0\n"], ids=["empty", "cut short", "a list", "zeros"])
def test_a_damaged_result(finished, damage):
    """Named, with the way out."""
    (finished / "result.json").write_bytes(damage)
    result = run("--resume", "--out", finished)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert str(finished / "result.json") in result.stderr and "or delete it: --resume then ends the run again" in result.stderr


def test_damaged_files_of_a_run(finished, whole, monkeypatch):
    """Named with the way out before any work, and left as they are; without them the run ends with the same bits."""
    (finished / "result.json").unlink()
    rows = (finished / "history.jsonl").read_bytes().splitlines(keepends=True)
    with monkeypatch.context() as patch:
        patch.setattr("cobra.cli.training.run.prepare", None)
        for name, damage, way in (
            ("config.yaml", b"", "is damaged, it names no model: put back a copy"),
            ("run.json", b"{", "is damaged, Expecting property name"),
            ("run.json", b"[]", "expected a JSON object, found '[]': put back a copy, or delete it: its data"),
            ("before.json", b"", "put back a copy, or delete it: it is then measured again"),
            ("history.jsonl", b"".join([rows[0], b"{bad\n", *rows[2:]]), ": line 2 is damaged, b'{bad': put back a copy"),
            ("history.jsonl", b'{"loss": 1}\n', ": line 1 is damaged"),
            ("gates.jsonl", b"\0\0\n", ": line 1 is damaged"),
        ):
            whole_file = (finished / name).read_bytes()
            (finished / name).write_bytes(damage)
            before = stamps(finished)
            result = run("--resume", "--out", finished)
            assert result.exit_code == 2 and result.stderr.startswith(f"error: {finished / name}"), result.output
            assert way in result.stderr and result.stderr.count("\n") == 1 and stamps(finished) == before
            (finished / name).write_bytes(whole_file)
    (finished / "run.json").unlink()
    (finished / "before.json").unlink()
    (finished / "history.jsonl").write_bytes(b"".join([rows[0], *rows[2:]]))
    found = done("--resume", "--out", finished)
    assert same(finished, whole) and found["before"] == json.loads((whole / "before.json").read_bytes())
    assert [row["step"] for row in RunFolder(finished).history()] == [1, *range(3, 11)]


def test_full_disk(base, whole, tmp_path):
    """Exit code 1, the file named, and how to go on; what was there before is whole."""
    size = (RunFolder(whole).newest() / CHECKPOINT).stat().st_size
    out = tmp_path / "r"
    assert child(partial(limit_file_size, size - 1, kill=False), *base, "--out", out) == 1
    said = Path(f"{out}.said").read_text(encoding="utf-8")
    assert "File too large; nothing was written" in said and f"checkpoint-3/{CHECKPOINT}" in said
    assert said.endswith(f"no checkpoint yet; to go on: cobra train --resume --out {out}\n")
    done("--resume", "--out", out)
    assert same(out, whole)


def test_gradients_that_are_not_finite(base, tmp_path):
    """Every step is skipped and its layers named, until the limit; then exit code 1, and no offer to do it again."""
    result = run(*base, "--lr", 1e30, "--max-bad-steps", 3, "--save-every", 100, "--out", tmp_path / "r")
    assert result.exit_code == 1 and result.stdout == ""
    first, second, *rest = result.stderr.splitlines()
    assert first.startswith("warning: gradients of") and "layers, first" in first and "step skipped (1 so far)" in first
    assert "step skipped (2 so far)" in second
    assert rest[0].startswith("error: gradients were not finite in 3 steps in a row (max_bad_steps), now those of ")
    assert rest[-1] == "no checkpoint yet"
    rows = RunFolder(tmp_path / "r").history()
    assert rows[-1]["bad_steps"] == 2 and "nll" not in rows[-1]


def test_resuming_refuses(base, folders, tmp_path):
    """Other settings, other data, no run; and a run is not begun where one is."""
    out = tmp_path / "r"
    data = written(tmp_path / "d.csv", ROWS * 5)
    base = ("--model", folders["classifier"], "--data", data, *QUICK, *EVERY)
    assert child(partial(kill_at, "replace", IN_STEP_6), *base, "--out", out) == -signal.SIGKILL
    for arguments, message in (
        (("--resume", "--lr", 0.1, "--out", out), "lr was 0.0005 when the run in"),
        (("--resume", "--set", "beta=0.5", "--out", out), "cobra was {} when the run in"),
        (("--resume", "--out", tmp_path / "none"), "no such file; --resume goes on with the run in --out"),
        ((*base, "--out", out), "is there and not empty"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    written(data, ROWS * 6)
    result = run("--resume", "--out", out)
    assert result.exit_code == 2 and "d.csv has changed since" in result.stderr
    assert RunFolder(out).newest().name == "checkpoint-3"


@pytest.mark.slow
def test_smollm2_on_prose(tmp_path):
    """A pretrained language model on real text: what it is trained for gets likelier."""
    found = done(
        *("--model", "smollm2", "--data", "reviews", "--task", "causal-lm", "--train-examples", 400, "--eval-examples", 32),
        *("--calibration-examples", 4, "--calibration-steps", 8, "--baseline", "mean", "--longest", 48),
        *("--steps", 30, "--batch-size", 8, "--out", tmp_path / "r", "--merge"),
    )
    assert found["after"]["perplexity"] < found["before"]["perplexity"]
    assert found["ranks"] == 8 * 210 and (tmp_path / "r" / "report" / "index.html").is_file()
