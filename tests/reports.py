"""Runs for the tests of reports, trained or written by hand, and what reads a page back."""

import csv
import json
from html.parser import HTMLParser

import torch
from models import image_batch, vit

import cobra
from cobra import storage
from cobra.plan import SitePlan
from cobra.report.run import FILES, append_gates, append_step
from cobra.scores import Completeness

BINS = [{"confidence": 0.55, "accuracy": 0.5, "count": 40}, {"confidence": 0.9, "accuracy": 0.95, "count": 60}]
CUT = 6
SETTINGS = {
    "estimator": "paper",
    "quadrature": "midpoint",
    "steps": 3,
    "baseline": "zero",
    "granularity": "site",
    "examples": 2,
}


def train_run(folder) -> None:
    """A tiny run from calibration to merge, every file recorded."""
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
        values = {"phase": "search", "temperature": 0.5, "expected_rank": 20.0} if step < CUT else {"phase": "tune"}
        append_step(folder, step, nll=nll.item(), kl=kl.item() if torch.is_tensor(kl) else kl, lr=1e-2, **values)
        if step < CUT and step % 2 == 0:
            append_gates(folder, step, adapter.extract())
    report = adapter.merge(probe=batch)
    sites = [vars(site) for site in report.sites]
    storage.write_json(folder / "merge.json", {"sites": sites, "logit_difference": report.logit_difference})
    write_evaluation(folder)


def write_evaluation(folder) -> None:
    storage.write_json(folder / "eval.json", {"accuracy": 0.75, "before": {"accuracy": 0.5}, "bins": BINS})
    config = {"fusion": "product", "target_modules": ["query", "value"]}
    record = {"command": ["cobra", "train", "a b"], "seed": 7, "config": config, "seconds": {"train": 60.0, "merge": 2.0}}
    storage.write_json(folder / "run.json", record)


def made_run(folder, names, phi=None, gamma=None, kept=2, gates=4, residual=0.01, energy=(), **provenance):
    """A folder with scores and a plan of these layer names."""
    G = len(names)
    phi, gamma = (torch.arange(1.0, G + 1) if v is None else torch.tensor(v) for v in (phi, gamma))
    members, shapes = tuple((n,) for n in names), (((6, 4),),) * G
    completeness = Completeness(residual, 0.5, 1.0)
    cobra.LayerScores(tuple(names), members, shapes, phi, gamma, torch.zeros(2, G), completeness, {}, SETTINGS, "f").save(
        folder / "scores.safetensors"
    )
    posterior = tuple(0.9 - 0.2 * k for k in range(gates))
    sites = tuple(SitePlan(n, (n,), 10, tuple(range(kept)), posterior, tuple(energy)) for n in names)
    cobra.RankPlan(sites, "one", "f", provenance).save(folder / "plan.json")
    return folder


def whole_run(folder):
    """Every file, by hand: three layers, four gates each, eight steps."""
    made_run(folder, ["up", "mid", "down"], phi=[1.0, 4.0, 1.0], gamma=[6.0, 1.0, 2.0])
    plan = cobra.RankPlan.load(folder / "plan.json")
    for step in range(8):
        append_step(folder, step, nll=1 / (step + 1), kl=0.01 * step, phase="search" if step < CUT else "tune", temperature=0.5)
    for step in (0, 2, 4):
        append_gates(folder, step, plan)
    merged = {"rank": 2, "delta_norm": 0.5, "weight_norm": 2.0, "rounding_loss": 1e-6, "merged": True}
    sites = [{"name": name, **merged} for name in ("up", "mid", "down")]
    storage.write_json(folder / "merge.json", {"sites": sites, "logit_difference": None})
    write_evaluation(folder)
    return folder


def keep_only(folder, *names):
    for name in FILES:
        if name not in names:
            (folder / name).unlink()
    return folder


class Page(HTMLParser):
    """Tags as they open and close, attributes, and text by the tag it stands in."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.open, self.unbalanced = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source.replace("<wbr>", ""))
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

    def of(self, tag) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def plain(self):
        return " ".join(" ".join(self.text).split())


def rows(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
