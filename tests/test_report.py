"""A run's page: true to the files it was made from, whole by itself, and honest about what is missing or broken."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from models import Mlp, image_batch, mlp_batch, vit

import cobra
from cobra import storage
from cobra.plan import SitePlan
from cobra.report import measures, plots, tables
from cobra.report.names import grid
from cobra.report.page import MARK, write_report
from cobra.report.run import FILES, Run, append_gates, append_step
from cobra.scores import Completeness

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses", "ignore:baseline")

BINS = [{"confidence": 0.55, "accuracy": 0.5, "count": 40}, {"confidence": 0.9, "accuracy": 0.95, "count": 60}]
CUT = 6


def train_run(folder) -> None:
    """A tiny run from calibration to merge, every file recorded as docs/report.md says."""
    model, batch = vit(), image_batch()
    scores = cobra.calibrate(model, [batch], steps=3, progress=False)
    scores.save(folder / "scores.safetensors")
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=20, r_max=4, total_steps=CUT, gate_lr_scale=30.0), scores)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2))
    for step in range(10):
        if step == CUT:
            plan = adapter.extract()
            plan.save(folder / "plan.json")
            adapter.apply(plan, optimizer)
        nll, kl = model(**batch).loss, adapter.kl_loss()
        (nll + kl).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
        values = (
            {"phase": "search", "temperature": 0.5, "expected_rank": 20.0, "undecided": 0.9}
            if step < CUT
            else {"phase": "tune"}
        )
        append_step(folder, step, nll=nll.item(), kl=float(kl.detach()) if torch.is_tensor(kl) else kl, lr=1e-2, **values)
        if step < CUT and step % 2 == 0:
            append_gates(folder, step, adapter.extract())
    report = adapter.merge(probe=batch)
    sites = [vars(site) for site in report.sites]
    storage.write_json(folder / "merge.json", {"sites": sites, "logit_difference": report.logit_difference})
    storage.write_json(folder / "eval.json", {"accuracy": 0.75, "by class": {"a": 0.5}, "bins": BINS})
    config = {"fusion": "product", "target_modules": ["query", "value"]}
    storage.write_json(folder / "run.json", {"command": ["cobra", "train", "a b"], "seed": 7, "config": config})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, its report folder); to be left as it is."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    train_run(folder)
    return folder, write_report(folder).parent


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run's files without the report, to be spoilt."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((trained[0] / name).read_bytes())
    return folder


def made_run(folder, names, phi=None, gamma=None, kept=2, gates=4):
    """A folder with scores and a plan of these layer names."""
    G = len(names)
    phi, gamma = (torch.arange(1.0, G + 1) if v is None else torch.tensor(v) for v in (phi, gamma))
    settings = {
        "estimator": "paper",
        "quadrature": "midpoint",
        "steps": 3,
        "baseline": "zero",
        "granularity": "site",
        "examples": 2,
    }
    members, shapes = tuple((n,) for n in names), (((6, 4),),) * G
    whole = Completeness(0.1, 0.5, 1.0)
    cobra.LayerScores(tuple(names), members, shapes, phi, gamma, torch.zeros(2, G), whole, {}, settings, "f").save(
        folder / "scores.safetensors"
    )
    posterior = tuple(0.9 - 0.2 * k for k in range(gates))
    sites = tuple(SitePlan(n, (n,), 10, tuple(range(kept)), posterior) for n in names)
    cobra.RankPlan(sites, "one", "f").save(folder / "plan.json")
    return folder


class Page(HTMLParser):
    """Tags as they open and close, attributes, and text by the tag it stands in."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.open, self.unbalanced = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.text.append(text)

    @property
    def plain(self):
        return " ".join(" ".join(self.text).split())


def rows(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


FIGURES = ("ranks", "prior_posterior", "gates", "factors", "elbo", "search", "gate_trajectories", "reliability")
TABLES = ("metrics", "merge", "completeness", "settings", "fingerprints")


def test_everything_is_there(trained):
    """The page, PNG + SVG + CSV of each figure, CSV of each table, and nothing else."""
    out = trained[1]
    expected = {"index.html"} | {f"{n}.{k}" for n in FIGURES for k in ("png", "svg", "csv")} | {f"{n}.csv" for n in TABLES}
    assert {path.name for path in out.iterdir()} == expected
    for name in FIGURES:
        assert (out / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert b"</svg>" in (out / f"{name}.svg").read_bytes()[-20:]
    assert [path.name for path in trained[0].iterdir() if path.name.startswith(".")] == []


def test_well_formed(trained):
    """Tags nest, ids are unique, and every reference within the page has its target."""
    page = Page(trained[1] / "index.html")
    assert (page.unbalanced, page.open) == ([], [])
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [value for _, a in page.tags for key, value in a.items() if key in {"href", "xlink:href"}]
    text = (trained[1] / "index.html").read_text(encoding="utf-8")
    wanted = {v[1:] for v in links if v.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", text))
    wanted |= {v for _, a in page.tags for key in ("aria-labelledby",) if key in a for v in a[key].split()}
    assert wanted and wanted <= set(ids)


def test_self_contained(trained):
    """No script, nothing from a network, a policy that allows neither; links lead to files beside the page."""
    text = (trained[1] / "index.html").read_text(encoding="utf-8")
    page = Page(trained[1] / "index.html")
    assert not re.search(r"https?:|@import|//cdn", text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "img"}
    assert not [a for _, a in page.tags if any(key.startswith("on") or key == "src" for key in a)]
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "script-src" not in policy
    files = [a["href"] for tag, a in page.tags if tag == "a" and not a["href"].startswith("#")]
    assert files and all((trained[1] / name).is_file() and "/" not in name for name in files)
    images = [a["xlink:href"] for tag, a in page.tags if tag == "image"]
    assert images and all(v.startswith("data:image/png;base64,") for v in images)


def test_readable_by_everyone(trained):
    """A language, a title in every drawing, a table behind every figure, two themes, and a phone's width."""
    page = Page(trained[1] / "index.html")
    text = (trained[1] / "index.html").read_text(encoding="utf-8")
    drawings = [a for tag, a in page.tags if tag == "svg"]
    assert len(drawings) == len(FIGURES) and all(a["role"] == "img" and a["aria-labelledby"] for a in drawings)
    assert [tag for tag, _ in page.tags].count("caption") == len(FIGURES) + len(TABLES)
    assert ("html", {"lang": "en"}) in page.tags
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    inline = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in inline and "var(--surface)" in inline and "#ffffff" not in inline and "#1c2024" not in inline


def test_values_equal_the_objects(trained):
    """Every digit of the CSV files is that of scores, plan, history and reports."""
    folder, out = trained
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
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    found = rows(out / "elbo.csv")
    assert [float(r["nll"]) for r in found] == [row["nll"] for row in history]
    assert [r["temperature"] for r in found] == ["0.5"] * CUT + [""] * 4
    recorded = [json.loads(line) for line in (folder / "gates.jsonl").read_text().splitlines()]
    expected = [(g, k, row["step"], p) for row in recorded for g, values in row["gates"].items() for k, p in enumerate(values)]
    found = [(r["group"], int(r["gate"]), int(r["step"]), float(r["probability"])) for r in rows(out / "gate_trajectories.csv")]
    assert found == expected and len({step for _, _, step, _ in found}) == 3
    merge = json.loads((folder / "merge.json").read_text())
    assert [float(r["lost to rounding"]) for r in rows(out / "merge.csv")] == [s["rounding_loss"] for s in merge["sites"]]
    assert [int(r["examples"]) for r in rows(out / "reliability.csv")] == [40, 60]
    assert float(rows(out / "completeness.csv")[0]["value"]) == scores.completeness.path


def test_summary(trained):
    """Budget, spent, empty layers, the largest, and the certainty of the cut, as the plan has them."""
    folder, out = trained
    plan, text = cobra.RankPlan.load(folder / "plan.json"), Page(out / "index.html").plain
    empty = sum(rank == 0 for rank in plan.ranks.values())
    assert f"20 ranks went to {len(plan.ranks) - empty} of {len(plan.ranks)} layers, the whole budget of 20 ranks." in text
    flips = sum(0.4 <= p <= 0.6 for s in plan.sites for p in s.posterior)
    assert f"{flips} of {sum(len(s.posterior) for s in plan.sites)} gates" in text
    assert "Expected calibration error 0.050" in text  # 0.4 · 0.05 + 0.6 · 0.05
    assert f"the cut, at step {CUT}." in text
    assert "cobra train 'a b'" in text and "config.target_modules" in text and plan.fingerprint in text
    assert "Missing from the run" not in text and "Not shown" not in text


def test_same_run_same_bytes(trained, run, tmp_path):
    """Figures of scores and plan, drawn again, are those of the whole report."""
    for name in ("history.jsonl", "gates.jsonl"):
        (run / name).unlink()
    again = write_report(run).parent
    figures = [path.name for path in again.iterdir() if path.name not in {"index.html", "fingerprints.csv"}]
    assert "ranks.png" in figures and "factors.svg" in figures
    for name in figures:
        assert (again / name).read_bytes() == (trained[1] / name).read_bytes(), name


def only(run, *names):
    for name in FILES:
        if name not in names:
            (run / name).unlink()


@pytest.mark.parametrize("name", FILES)
def test_one_file_alone(run, name):
    """The page shows it, and says of every other that it is missing."""
    only(run, name)
    text = Page(write_report(run)).plain
    assert f"Missing from the run, and from this page: {', '.join(other for other in FILES if other != name)}." in text
    for other in FILES:
        assert (f"Not shown: the run has no {other}" in text) is (other != name)


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        write_report(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds none of a run's files: scores\.safetensors, plan\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


SPOILT = {
    "scores.safetensors": [(b"PK\x03\x04", "truncated or foreign")],
    "plan.json": [
        (b'{"kind": "rank plan", "version": 1, "si', "truncated or foreign"),
        (b'{"kind": "rank plan", "version": 1, "sites": [], "fold": "other", "fingerprint": ""}', "fold='other'"),
        (
            b'{"kind": "rank plan", "version": 1, "fold": "one", "fingerprint": "", "sites": '
            b'[{"name": "up", "members": ["up"], "cost": 1, "kept": [], "posterior": [7]}]}',
            "posterior of up should be probabilities",
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
    """The error names the file and what is wrong in it; no report appears."""
    (run / name).write_bytes(content)
    with pytest.raises(cobra.FormatError, match=rf"{re.escape(name)}: .*{re.escape(message)}"):
        write_report(run)
    assert not (run / "report").exists()


def test_scores_that_are_not_finite(tmp_path):
    made_run(tmp_path, ["up", "mid"], gamma=[1.0, float("nan")])
    with pytest.raises(cobra.FormatError, match=r"scores\.safetensors: gradient must be finite and not negative"):
        write_report(tmp_path)


def test_half_a_last_line(run):
    """A killed run leaves one: the rest is shown, and the page says so."""
    only(run, "history.jsonl")
    with open(run / "history.jsonl", "a") as f:
        f.write('{"step": 10, "nl')
    assert "history.jsonl ends in the middle of line 11" in Page(write_report(run)).plain
    assert len(rows(run / "report" / "elbo.csv")) == 10


def test_resumed_run(tmp_path):
    """Steps that were logged twice count once, with what was said last; values may be missing or not finite."""
    for step in (0, 1, 2, 1, 2, 3):
        append_step(tmp_path, step, nll=float(step) if step != 3 else float("nan"))
    append_step(tmp_path, 2, kl=0.5, lr=None)
    history = Run.load(tmp_path).history
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    assert history[2] == {"step": 2, "nll": 2.0, "kl": 0.5, "lr": None}
    write_report(tmp_path)
    assert [r["nll"] for r in rows(tmp_path / "report" / "elbo.csv")] == ["0.0", "1.0", "2.0", "nan"]


def test_cut_from_the_plan(run):
    """Without phases the plan's own step marks the cut."""
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    (run / "history.jsonl").write_text("".join(json.dumps({"step": r["step"], "nll": r["nll"]}) + "\n" for r in lines))
    assert Run.load(run).cut == CUT


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
    (tmp_path / "eval.json").write_text(json.dumps({"<img src=x>": "<b>"}))
    (tmp_path / "gates.jsonl").write_text(json.dumps({"step": 0, "gates": {name: [0.5] * 4 for name in HOSTILE}}) + "\n")
    path = write_report(tmp_path)
    page = Page(path)
    assert (page.unbalanced, page.open) == ([], [])
    assert not {tag for tag, _ in page.tags} & {"script", "img", "b", "i"}
    assert not [key for _, a in page.tags for key in a if key.startswith("on")]
    assert "<script>alert(1)</script>.0.a" in page.plain and "&lt;b&gt;.5.f" in page.plain
    assert [r["layer"] for r in rows(path.parent / "ranks.csv")] == HOSTILE


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("names", "phi", "gamma"),
    [
        (["only"], None, None),
        (["up", "mid", "down"], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        (["up", "mid"], [0.0, 0.0], [0.0, 0.0]),
        (["up", "mid"], [0.0, 1.0], [1.0, 0.0]),
    ],
    ids=["one layer", "no spread", "zeros", "disjoint"],
)
def test_no_correlation(tmp_path, names, phi, gamma):
    """One layer, equal scores, or none at all: a page without a warning, and words where there is no number."""
    text = Page(write_report(made_run(tmp_path, names, phi, gamma))).plain
    if len(names) == 2 and phi == [0.0, 1.0]:
        assert "Pearson -1.00" in text
    else:
        assert "Pearson not defined" in text
    assert ("are not compared: fusion='product' leaves no group" in text) is (len(names) == 2)


STACKS = {"blocks": "model.layers.{}.{}", "no grid": "{1}{0}", "experts": "model.layers.0.experts.{}.{}"}


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_figures_of_many_layers(tmp_path, stack):
    """500 layers: sizes that open, whatever the names; every layer in the table."""
    names = [stack.format(i, m) for i in range(100) for m in ("q", "k", "v", "up", "down")]
    made_run(tmp_path, names)
    scores, plan = cobra.LayerScores.load(tmp_path / "scores.safetensors"), cobra.RankPlan.load(tmp_path / "plan.json")
    figures = [plots.rank_heatmap(plan), plots.prior_posterior(scores, plan), plots.gate_probabilities(plan)]
    assert all(1 < side < 20 for figure in figures for side in figure.get_size_inches())
    assert np.isfinite(grid(plan.ranks).values).sum() == 500
    assert {row[0]: row[1] for row in tables.ranks(plan).rows} == plan.ranks


@pytest.mark.parametrize("stack", ["model.layers.{}.experts.{}.up", "l{}x{}"], ids=["experts of blocks", "list"])
def test_figures_of_thousands_of_layers(tmp_path, stack):
    made_run(tmp_path, [stack.format(i, j) for i in range(40) for j in range(200)], gates=2)
    scores, plan = cobra.LayerScores.load(tmp_path / "scores.safetensors"), cobra.RankPlan.load(tmp_path / "plan.json")
    figures = [plots.rank_heatmap(plan), plots.prior_posterior(scores, plan), plots.gate_probabilities(plan)]
    assert all(1 < side < 20 for figure in figures for side in figure.get_size_inches())


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_page_of_many_layers(tmp_path, stack):
    path = write_report(made_run(tmp_path, [stack.format(i, m) for i in range(100) for m in ("q", "k", "v", "up", "down")]))
    assert path.stat().st_size < 3e6
    assert len(rows(path.parent / "ranks.csv")) == 500


@pytest.mark.parametrize(
    ("names", "values", "row_names", "columns"),
    [
        (["h.0.q", "h.0.v", "h.1.q", "h.1.v"], [[0, 1], [2, 3]], ["0", "1"], ["q", "v"]),
        (["enc.h.0.q", "enc.h.0.v", "dec.h.0.q"], [[0, 1], [2, None]], ["enc.0", "dec.0"], ["q", "v"]),
        (["h.0.q", "h.0.v", "pooler"], [[0, 1, None], [None, None, 2]], ["0", "pooler"], ["q", "v", "pooler"]),
        (["up", "mid"], [[0], [1]], ["up", "mid"], [""]),
    ],
    ids=["blocks", "two stacks", "pooler", "list"],
)
def test_grid(names, values, row_names, columns):
    """Where each layer stands: every value once, in its block's row and its module's column."""
    found = grid({name: i for i, name in enumerate(names)})
    assert [[None if np.isnan(v) else v for v in row] for row in found.values.tolist()] == values
    assert (found.rows, found.columns) == (row_names, columns)


def test_rank_zero_and_empty_plans(tmp_path):
    made_run(tmp_path, ["up", "mid"], kept=0)
    assert (
        "0 ranks went to 0 of 2 layers. 2 layers got none and are as in the base model." in Page(write_report(tmp_path)).plain
    )
    cobra.RankPlan((), "one", "f").save(tmp_path / "plan.json")
    assert "no rank plan yet" in Page(write_report(tmp_path)).plain


def test_plan_from_scores_alone(tmp_path):
    scores = cobra.calibrate(Mlp(), [mlp_batch()], steps=3, progress=False)
    scores.save(tmp_path / "scores.safetensors")
    cobra.plan_ranks(scores, 5).save(tmp_path / "plan.json")
    text = Page(write_report(tmp_path)).plain
    assert "how certain they are is not known" in text and "there was no training of gates" in text


def test_scores_of_another_model(run, tmp_path):
    only(run, "plan.json", "scores.safetensors")
    other = made_run(tmp_path / "other", ["up", "mid"])
    (run / "scores.safetensors").write_bytes((other / "scores.safetensors").read_bytes())
    assert "are not compared: scores and plan are of different models (fingerprints f and " in Page(write_report(run)).plain


def test_gates_that_change_size(run):
    only(run, "gates.jsonl")
    with open(run / "gates.jsonl", "a") as f:
        f.write('{"step": 9, "gates": {"up": [0.5]}}\n')
    text = Page(write_report(run)).plain
    assert "Gate trajectories are not drawn: the gates at steps 0 and 9 are of different groups" in text


def test_gates_within_the_history(run):
    """One file may hold both."""
    (run / "history.jsonl").write_bytes((run / "history.jsonl").read_bytes() + (run / "gates.jsonl").read_bytes())
    (run / "gates.jsonl").unlink()
    found = Run.load(run)
    assert list(found.gates) == [0, 2, 4] and len(found.history) == 10 and found.missing == []


def test_report_replaces_only_reports(run, tmp_path):
    """Somebody's folder stays; an old report goes as a whole."""
    only(run, "merge.json")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="mine: holds files that are no report"):
        write_report(run, mine)
    with pytest.raises(ValueError, match="holds files that are no report"):
        write_report(run, run)
    with pytest.raises(ValueError, match=r"page\.html: expected a folder"):
        write_report(run, tmp_path / "page.html")
    page = write_report(run, tmp_path / "new" / "report")
    (page.parent / "old.csv").write_text("left over")
    assert write_report(run, page.parent) == page
    assert MARK in page.read_text(encoding="utf-8") and not (page.parent / "old.csv").exists()
    assert (mine / "thesis.tex").read_text() == "x"


def test_failure_leaves_the_old_report(run, monkeypatch):
    """A disk that fills up in the middle."""
    only(run, "history.jsonl", "merge.json")
    page = write_report(run)
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


def test_correlations():
    """Against values worked out by hand: ties share ranks, intervals are Fisher's."""
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0]
    r = measures.pearson(x, y)
    assert r.value == pytest.approx(0.8)
    half = 1.959964 / 2**0.5
    assert (r.low, r.high) == pytest.approx(tuple(torch.tanh(torch.tensor([1.0986123 - half, 1.0986123 + half])).tolist()))
    assert measures.spearman(x, [v**3 for v in y]).value == pytest.approx(0.8)
    assert measures.spearman([1, 1, 2], [1, 2, 3]).value == pytest.approx(3**0.5 / 2)
    assert str(measures.pearson([1, 1], [1, 2])) == "not defined (one group, or no spread)"
    assert str(measures.pearson([1, 2], [1, 2])) == "1.00"


def test_red_zone(tmp_path):
    """High gradient at low contribution, and the other way round; small layers belong to neither."""
    folder = made_run(tmp_path, ["red", "under", "small", "even"], phi=[1.0, 6.0, 0.1, 2.0], gamma=[6.0, 1.0, 0.9, 2.0])
    scores = cobra.LayerScores.load(folder / "scores.safetensors")
    found = measures.factors(scores)
    assert (found.red, found.under) == ([0], [1])
    assert found.gradient.sum() == pytest.approx(4)
    assert [row[-1] for row in tables.factors(scores).rows] == ["red zone", "contribution above gradient", "", ""]
    assert "Red zone: red. Opposite: under." in Page(write_report(folder)).plain


def test_wilson():
    """Never outside 0 and 1, and within them where the share is at the end."""
    assert measures.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = measures.wilson(1.0, 10)
    assert low == pytest.approx(0.7225, abs=1e-4) and high == pytest.approx(1)
