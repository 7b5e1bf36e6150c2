"""A run's page: true to the files it was made from, whole by itself, and honest about what is missing."""

import json
import re
from itertools import pairwise

import pytest
import torch
from reports import CUT, Page, keep_only, lines, made_run, rows, train_run, whole_run
from typer.testing import CliRunner

import cobra
from cobra import storage
from cobra.cli.app import app
from cobra.report import tables
from cobra.report.markup import MOST_ROWS, SMALLEST_PIXELS, Table, table
from cobra.report.page import MARK, write_report
from cobra.report.plots.canvas import SMALLEST_TYPE
from cobra.report.run import FILES, Run, append_step
from cobra.report.sections import sections

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses", "ignore:baseline")

FIGURES = ("ranks", "prior_posterior", "gates", "factors", "elbo", "search", "gate_trajectories", "reliability", "merge")
TABLES = ("metrics", "completeness", "settings", "fingerprints")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, its report); to be left as it is."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    torch.manual_seed(0)
    train_run(folder)
    return folder, write_report(folder)


@pytest.fixture(scope="module")
def page(trained):
    return Page(trained[1].page)


@pytest.fixture
def run(tmp_path):
    """A run's files, to be spoilt."""
    (tmp_path / "run").mkdir()
    return whole_run(tmp_path / "run")


def words(folder) -> str:
    """What the sections say, without drawing them."""
    parts = [part for section in sections(Run.load(folder)) for part in section.parts]
    return " ".join(part if isinstance(part, str) else part.caption for part in parts)


def test_everything_is_there(trained):
    """The page, PNG + SVG + CSV of each figure, CSV of each table, and nothing else."""
    folder, report = trained
    out = report.page.parent
    expected = {"index.html"} | {f"{n}.{k}" for n in FIGURES for k in ("png", "svg", "csv")} | {f"{n}.csv" for n in TABLES}
    assert {path.name for path in out.iterdir()} == expected == {path.name for path in report.files}
    for name in FIGURES:
        assert (out / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert b"</svg>" in (out / f"{name}.svg").read_bytes()[-20:]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert report.missing == {} and "Missing from the run" not in Page(report.page).plain


def test_well_formed(page):
    """Tags nest, ids are unique, every reference within the page has its target, and no heading skips a level."""
    assert (page.unbalanced, page.open) == ([], [])
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [value for _, a in page.tags for key, value in a.items() if key in {"href", "xlink:href"}]
    wanted = {v[1:] for v in links if v.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", page.source))
    wanted |= {v for _, a in page.tags if "aria-labelledby" in a for v in a["aria-labelledby"].split()}
    assert wanted and wanted <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_self_contained(page, trained):
    """No script, nothing from a network, a policy that allows neither; links lead to files beside the page."""
    assert not re.search(r"https?:|@import|//cdn", page.source)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "img"}
    assert not [a for _, a in page.tags if any(key.startswith("on") or key == "src" for key in a)]
    policy = next(a["content"] for a in page.of("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "script-src" not in policy
    files = [a["href"] for a in page.of("a") if not a["href"].startswith("#")]
    assert files and all((trained[1].page.parent / name).is_file() and "/" not in name for name in files)
    images = [a["xlink:href"] for a in page.of("image")]
    assert images and all(v.startswith("data:image/png;base64,") for v in images)


def test_readable_by_everyone(page):
    """A language, a name for every drawing, a table behind every figure, two themes, and a phone's width."""
    drawings = page.of("svg")
    assert len(drawings) == len(FIGURES) and all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in drawings)
    assert len(page.of("caption")) == len(FIGURES) + len(TABLES)
    assert ("html", {"lang": "en"}) in page.tags
    assert "prefers-color-scheme:dark" in page.source and "width=device-width" in page.source
    scrolled = [a for _, a in page.tags if a.get("class") in {"wide", "table"}]
    assert len(scrolled) == 2 * len(FIGURES) + len(TABLES) and all(a["tabindex"] == "0" and a["aria-label"] for a in scrolled)


def test_drawings_follow_the_theme(page):
    """No colour of the light theme is left, no ground hides the page's, and type never shrinks below what can be read."""
    inline = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    for drawing in inline:
        assert not re.search(r"#(?:ffffff|1c2024|0072b2|b84c00|626a73|000000)\b", drawing) and "var(--ink)" in drawing
        assert 'patch_1"' not in drawing
    sizes = [re.search(r"min-width:(\d+)px;max-width:(\d+)px", a["style"]).groups() for a in page.of("svg")]
    for least, most in sizes:
        assert SMALLEST_TYPE * 4 / 3 * int(least) / int(most) == pytest.approx(SMALLEST_PIXELS, abs=0.1)


def test_values_equal_the_objects(trained):
    """Every digit of the CSV files is that of scores, plan, history and reports."""
    folder, out = trained[0], trained[1].page.parent
    scores, plan = cobra.LayerScores.load(folder / "scores.safetensors"), cobra.RankPlan.load(folder / "plan.json")
    assert {r["layer"]: int(r["rank"]) for r in rows(out / "ranks.csv")} == plan.ranks
    found = rows(out / "prior_posterior.csv")
    assert [float(r["prior share"]) for r in found] == scores.prior.tolist()
    assert [float(r["expected rank"]) for r in found] == [sum(s.posterior) for s in plan.sites]
    assert sum(float(r["posterior share"]) for r in found) == pytest.approx(1)
    assert sum(float(r["kept share"]) for r in found) == pytest.approx(1)
    found = rows(out / "factors.csv")
    assert [float(r["contribution"]) for r in found] == scores.conductance.tolist()
    assert [float(r["gradient"]) for r in found] == scores.gradient.tolist()
    found = rows(out / "gates.csv")
    assert [float(r["probability"]) for r in found] == [p for s in plan.sites for p in s.posterior]
    assert sum(r["kept"] == "True" for r in found) == plan.total == 20
    found = rows(out / "elbo.csv")
    assert [float(r["nll"]) for r in found] == [row["nll"] for row in lines(folder / "history.jsonl")]
    assert [r["temperature"] for r in found] == ["0.5"] * CUT + [""] * 4
    recorded = lines(folder / "gates.jsonl")
    expected = [(g, k, row["step"], p) for row in recorded for g, values in row["gates"].items() for k, p in enumerate(values)]
    found = [(r["group"], int(r["gate"]), int(r["step"]), float(r["probability"])) for r in rows(out / "gate_trajectories.csv")]
    assert found == expected and len({step for _, _, step, _ in found}) == 3
    lost = [float(r["lost to rounding"]) for r in rows(out / "merge.csv")]
    assert lost == [s["rounding_loss"] for s in json.loads((folder / "merge.json").read_text())["sites"]]
    assert [int(r["examples"]) for r in rows(out / "reliability.csv")] == [40, 60]
    assert float(rows(out / "completeness.csv")[0]["value"]) == scores.completeness.path


def test_text(trained, page):
    """What was decided first, then how to run it again."""
    plan = cobra.RankPlan.load(trained[0] / "plan.json")
    empty = sum(rank == 0 for rank in plan.ranks.values())
    text = page.plain
    assert f"20 ranks went to {len(plan.ranks) - empty} of {len(plan.ranks)} layers, the whole budget of 20 ranks" in text
    assert text.index("20 ranks went") < text.index("Decided") < text.index("At what cost") < text.index("Rank by layer")
    assert f"the cut, at step {CUT}." in text and "Expected calibration error 0.050" in text
    assert "cobra train 'a b'" in text and "config.target_modules" in text and plan.fingerprint in text
    assert "plan.budget.amount" in text


def test_same_run_same_bytes(trained, tmp_path):
    """Figures of scores and plan, drawn again, are those of the whole report."""
    for name in ("scores.safetensors", "plan.json"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    again = write_report(tmp_path)
    figures = [path for path in again.files if path.name not in {"index.html", "fingerprints.csv", "settings.csv"}]
    assert {path.stem for path in figures} >= {"ranks", "prior_posterior", "gates", "factors"}
    for path in figures:
        assert path.read_bytes() == (trained[1].page.parent / path.name).read_bytes(), path.name


SECTIONS = {
    "scores.safetensors": ["factors", "calibration", "reproduce"],
    "plan.json": ["ranks", "prior", "reproduce"],
    "history.jsonl": ["training", "reproduce"],
    "gates.jsonl": ["training", "reproduce"],
    "merge.json": ["merge", "reproduce"],
    "eval.json": ["evaluation", "reproduce"],
    "run.json": ["reproduce"],
}


@pytest.mark.parametrize("name", FILES)
def test_one_file_alone(run, name):
    """Only the sections that it can fill."""
    assert [section.anchor for section in sections(Run.load(keep_only(run, name)))] == SECTIONS[name]


def test_command(run):
    """It names the page and what is missing; as JSON, every file."""
    keep_only(run, "merge.json", "eval.json")
    shown = CliRunner().invoke(app, ["report", str(run)])
    page = (run / "report" / "index.html").resolve()
    assert shown.exit_code == 0 and shown.output.splitlines()[0] == str(page)
    assert "not in the run: gates.jsonl; not on the page: gates over training" in shown.output
    assert "Missing from the run, and from this page: " in Page(page).plain
    found = json.loads(CliRunner().invoke(app, ["report", str(run), "--json"]).output)
    assert set(found["missing"]) == set(FILES) - {"merge.json", "eval.json"}
    assert sorted(found["files"]) == sorted(str(path) for path in page.parent.iterdir()) and found["page"] == str(page)


def test_broken_file_leaves_no_report(run):
    (run / "merge.json").write_text("{}")
    with pytest.raises(cobra.FormatError, match=r"merge\.json: sites should be a list"):
        write_report(run)
    assert not (run / "report").exists()


HOSTILE = [
    "<script>alert(1)</script>.0.a",
    '" onload="alert(1)" x=".1.b',
    "]]>--><svg onload=alert(1)>.2.c",
    r"$\frac{1}{$.3.d",
    "a\nb\x00.4.e",
    "層" * 80,
    "&lt;b&gt;.5.f",
]


@pytest.mark.filterwarnings("error")
def test_hostile_names(tmp_path):
    """Names are text wherever they stand: in tables, drawings and titles."""
    made_run(tmp_path, HOSTILE, gamma=[9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    for name in HOSTILE:
        append_step(tmp_path, 0, nll=1.0, phase=name)
    (tmp_path / "run.json").write_text(json.dumps({"command": "</pre><script>x()</script>", "a<b>": {"c": ["<i>"]}}))
    (tmp_path / "eval.json").write_text(json.dumps({"<img src=x>": "<b>", "</dl><script>": 1.0}))
    (tmp_path / "gates.jsonl").write_text(json.dumps({"step": 0, "gates": {name: [0.5] * 4 for name in HOSTILE}}) + "\n")
    report = write_report(tmp_path)
    page = Page(report.page)
    assert (page.unbalanced, page.open) == ([], [])
    assert not {tag for tag, _ in page.tags} & {"script", "img", "b", "i"}
    assert not [key for _, a in page.tags for key in a if key.startswith("on")]
    assert "<script>alert(1)</script>.0.a" in page.plain and "&lt;b&gt;.5.f" in page.plain
    assert [r["layer"] for r in rows(report.page.parent / "ranks.csv")] == HOSTILE


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_many_layers(tmp_path):
    """A page that a browser opens."""
    report = write_report(
        made_run(tmp_path, [f"model.layers.{i}.{m}" for i in range(100) for m in ("q", "k", "v", "up", "down")])
    )
    assert report.page.stat().st_size < 3e6
    assert len(rows(report.page.parent / "ranks.csv")) == 500


def test_long_tables():
    """As many rows as a browser likes; the file has them all."""
    content = Table(("layer", "rank"), [(f"l{i}", i) for i in range(MOST_ROWS + 1)])
    assert table(content, "Ranks").count("<tr>") == MOST_ROWS + 1
    assert "the first 1,000 of 1,001 rows" in table(content, "Ranks")
    assert content.csv().count(b"\n") == MOST_ROWS + 2


def test_zones_are_named_with_their_ranks(run):
    """The red zone and its opposite, and what they got."""
    text = words(run)
    assert "gradients alone would send ranks: up (rank 2)." in text and "gradients alone would pass by: mid (rank 2)." in text
    zones = [row[-1] for row in tables.factors(Run.load(run).scores).rows]
    assert zones == ["red zone", "contribution above gradient", ""]


def test_share_of_the_kl(run):
    """0.07 beside a data term of 1/8."""
    assert "The KL term is at most 56.0 % of the data term." in words(run)


def test_plan_from_scores_alone(tmp_path):
    """No posterior: it is neither drawn nor spoken of."""
    found = sections(Run.load(made_run(tmp_path, ["up", "mid"], source="scores")))
    names = [part.name for section in found for part in section.parts if not isinstance(part, str)]
    assert "prior_posterior" in names and "gates" not in names
    assert "there was no training of gates" in words(tmp_path)


def test_plan_in_the_singular_basis(tmp_path):
    """Its ranks are no gates: no gate is said to be kept, and ranks have their energies."""
    folder = made_run(tmp_path, ["up", "mid"], energy=(8.0, 1.0, 0.75, 0.25), source="singular")
    found = [part for section in sections(Run.load(folder)) for part in section.parts if not isinstance(part, str)]
    assert "gates" not in [part.name for part in found] and "in the singular basis" in words(folder)
    (ranks,) = (part.rows for part in found if part.name == "ranks")
    assert [row[3:5] for row in ranks.rows] == [(1.0, 0.75)] * 2


def test_scores_of_another_model(run, tmp_path):
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"fingerprint": "other"}))
    assert "are not compared: scores and plan are of different models (fingerprints f and other)" in words(run)


def test_factors_that_never_meet(tmp_path):
    made_run(tmp_path, ["up", "mid"], [0.0, 1.0], [1.0, 0.0])
    assert "are not compared: fusion='product' leaves no group" in words(tmp_path).replace("&#x27;", "'")


def test_gates_that_change_size(run):
    with open(run / "gates.jsonl", "a") as f:
        f.write('{"step": 9, "gates": {"up": [0.5]}}\n')
    assert "Gate trajectories are not drawn: the gates at steps 0 and 9 are of different groups" in words(run)


def test_report_replaces_only_reports(run, tmp_path):
    """Somebody's folder stays; an old report goes as a whole."""
    keep_only(run, "merge.json")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="mine: holds files that are no report"):
        write_report(run, mine)
    with pytest.raises(ValueError, match="holds files that are no report"):
        write_report(run, run)
    with pytest.raises(ValueError, match=r"page\.html: expected a folder"):
        write_report(run, tmp_path / "page.html")
    page = write_report(run, tmp_path / "new" / "report").page
    (page.parent / "old.csv").write_text("left over")
    assert write_report(run, page.parent).page == page
    assert MARK in page.read_text(encoding="utf-8") and not (page.parent / "old.csv").exists()
    assert (mine / "thesis.tex").read_text() == "x"


def test_failure_leaves_the_old_report(run, monkeypatch):
    """A disk that fills up in the middle."""
    keep_only(run, "history.jsonl", "merge.json")
    page = write_report(run).page
    before = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    write_bytes, left = storage.write_bytes, [5]

    def full(path, data):
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        write_bytes(path, data)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert {path.name: path.read_bytes() for path in page.parent.iterdir()} == before
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
