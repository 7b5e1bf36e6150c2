"""The main job from scores to a checkpoint that peft loads, beside plain LoRA on the same steps."""

from __future__ import annotations

import copy
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils import logging as transformers_logging

import cobra
from cobra import storage
from cobra.cli.base import with_class
from cobra.cli.encoder import MeanPoolClassifier, fit_head, load_encoder
from cobra.cli.reviews import Batches, load_reviews, make_batches
from cobra.cli.training.evaluation import evaluate_outputs
from cobra.lora import class_name
from cobra.progress import Progress
from cobra.report import plots
from cobra.report.page import write_report
from cobra.report.run import append_gates, append_step

LOG_EVERY = 10


@dataclass(frozen=True)
class DemoSettings:
    """average_rank: of the budget, ranks per linear layer; search_share: of the steps, before the ranks are cut"""

    out: Path
    steps: int = 400
    train_examples: int = 4000
    test_examples: int = 1500
    calibration_examples: int = 64
    seed: int = 0
    average_rank: int = 8
    lr: float = 1e-3
    batch_size: int = 16
    search_share: float = 0.6


@dataclass
class Seconds:
    """Wall-clock seconds by stage."""

    spent: dict[str, float] = field(default_factory=dict)
    console: Console = field(default_factory=Console)

    @contextmanager
    def of(self, stage: str):
        start = time.perf_counter()
        yield
        self.spent[stage] = time.perf_counter() - start
        self.console.print(f"  {stage:<42} {self.spent[stage]:6.1f} s")


@dataclass(frozen=True)
class Data:
    train: Batches
    test: Batches
    calibration: Batches


def run_demo(settings: DemoSettings) -> dict:
    """Runs everything, prints the table, writes the folder, and returns what the table says."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(settings.seed)
    seconds = Seconds()
    seconds.console.print("[bold]COBRA demo[/]: MiniLM-L6 on movie reviews, fresh or rotten, split by movie")
    with seconds.of("load, fit the head on frozen features"):
        model, data = _prepare(settings)
    frozen_accuracy, _ = _evaluate(model, data.test, "frozen model")
    lora_model = copy.deepcopy(model)

    result = _run_cobra(model, data, settings, seconds)
    lora = _run_lora(lora_model, data, settings, seconds)
    result |= {f"lora {k}": v for k, v in lora.items()} | {"frozen accuracy": frozen_accuracy}
    result["seconds"] = seconds.spent
    _report(result, settings, seconds.console)
    return result


def _prepare(settings: DemoSettings) -> tuple[MeanPoolClassifier, Data]:
    model, tokenizer = load_encoder()
    train, test = load_reviews(settings.seed)
    train, test = train[: settings.train_examples], test[: settings.test_examples]
    fit_head(model, make_batches(train, tokenizer, 64))
    data = Data(
        train=make_batches(train, tokenizer, settings.batch_size, steps=settings.steps, seed=settings.seed),
        test=make_batches(test, tokenizer, 64),
        calibration=make_batches(train[: settings.calibration_examples], tokenizer, 16),
    )
    return model, data


def _run_cobra(model: MeanPoolClassifier, data: Data, settings: DemoSettings, seconds: Seconds) -> dict:
    out, search_steps = settings.out, int(settings.steps * settings.search_share)
    with seconds.of("stages 1-2: calibrate"):
        examples, directions = settings.calibration_examples, 2 * settings.average_rank
        scores = cobra.calibrate(model, data.calibration, max_examples=examples, directions=directions)
    scores.save(out / "scores.safetensors")
    parameters = settings.average_rank * sum(K + N for shapes in scores.shapes for K, N in shapes)  # of a LoRA of this rank
    config = cobra.CobraConfig(
        rank_budget=cobra.Budget(parameters, "parameters"),
        r_max=2 * settings.average_rank,
        total_steps=search_steps,
        seed=settings.seed,
    )
    _record(out, settings, config)
    adapter = cobra.attach(model, config, scores)
    optimizer = AdamW(adapter.parameter_groups(settings.lr))
    schedule = _linear_decay(optimizer, settings.steps)
    losses: list[float] = []
    batches = iter(data.train)
    with seconds.of(f"stage 3: search, {search_steps} steps"):
        _train(model, batches, search_steps, optimizer, schedule, losses, adapter, out)
    with seconds.of("stage 4: extract, shrink"):
        plan = adapter.extract()
        plan.save(out / "plan.json")
        append_gates(out, search_steps, plan)
        adapter.apply(plan, optimizer)
    with seconds.of(f"train the cut adapter, {settings.steps - search_steps} steps"):
        _train(model, batches, settings.steps - search_steps, optimizer, schedule, losses, adapter, out)
    with seconds.of("evaluate"):
        accuracy, unmerged = _evaluate(model, data.test, "COBRA, unmerged")
    labels = torch.cat([batch["labels"] for batch in data.test])
    storage.write_json(out / "eval.json", evaluate_outputs([(unmerged, labels)], "classification").to_dict())
    parameters = adapter.trainable_parameters()
    with seconds.of("merge, evaluate"):
        with_class(adapter.to_lora(), class_name(type(model)), model.config).save_pretrained(out / "adapter")
        merge_report = adapter.merge()
        storage.write_json(out / "merge.json", asdict(merge_report))
        merged_accuracy, merged = _evaluate(model, data.test, "COBRA, merged")
        model.save_pretrained(out / "merged")
    with seconds.of("load in peft, evaluate"):
        adapter.unmerge()
        adapter.detach()
        through_peft = peft.PeftModel.from_pretrained(model, str(out / "adapter"))
        peft_accuracy, from_peft = _evaluate(through_peft, data.test, "COBRA, through peft")
    with seconds.of("report"):
        write_report(out)
    return {
        "accuracy": accuracy,
        "merged accuracy": merged_accuracy,
        "peft accuracy": peft_accuracy,
        "merged difference": (merged - unmerged).abs().max().item(),
        "peft difference": (from_peft - unmerged).abs().max().item(),
        "rounding loss": merge_report.worst_rounding_loss,
        "ranks": plan.total,
        "parameters": parameters,
        "correlation": scores.correlation,
        "path residual": scores.completeness.path,
        "losses": losses,
        "cut": search_steps,
    }


def _run_lora(model: MeanPoolClassifier, data: Data, settings: DemoSettings, seconds: Seconds) -> dict:
    """peft's LoRA with the same scale, steps, data and head."""
    names = [site.name for site in cobra.sites.find_sites(model)]
    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.average_rank,
        lora_alpha=2 * settings.average_rank,
        target_modules=names,
        modules_to_save=["classifier"],
    )
    lora = peft.get_peft_model(model, config)
    trained = {n: p for n, p in lora.named_parameters() if p.requires_grad}
    optimizer = AdamW(trained.values(), settings.lr, weight_decay=0.0)
    losses: list[float] = []
    with seconds.of(f"plain LoRA (peft), {settings.steps} steps"):
        _train(lora, iter(data.train), settings.steps, optimizer, _linear_decay(optimizer, settings.steps), losses)
    with seconds.of("evaluate LoRA"):
        accuracy, _ = _evaluate(lora, data.test, "LoRA")
    parameters = sum(p.numel() for n, p in trained.items() if "lora_" in n)
    return {"accuracy": accuracy, "parameters": parameters, "ranks": settings.average_rank * len(names), "losses": losses}


def _linear_decay(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


def _record(out: Path, settings: DemoSettings, config: cobra.CobraConfig) -> None:
    """run.json, and no history of a run before."""
    for name in ("history.jsonl", "gates.jsonl"):
        (out / name).unlink(missing_ok=True)
    versions = {"cobra-peft": cobra.__version__, "torch": torch.__version__, "peft": peft.__version__}
    record = {"config": config.to_dict(), "settings": {k: str(v) for k, v in asdict(settings).items()}, "versions": versions}
    storage.write_json(out / "run.json", {"command": "cobra demo", "seed": settings.seed, **record})


def _train(
    model,
    batches,
    steps: int,
    optimizer,
    schedule,
    losses: list[float],
    adapter: cobra.Adapter | None = None,
    out: Path | None = None,
) -> None:
    """out: the folder to which the history is added"""
    model.train()
    with Progress("train", steps) as bar:
        for _ in range(steps):
            loss = model(**next(batches)).loss
            total = loss if adapter is None else loss + adapter.kl_loss()
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if adapter is not None:
                adapter.step()
            losses.append(loss.item())
            if out is not None and len(losses) % LOG_EVERY == 0:
                _log(out, adapter, len(losses), loss.item(), total.item())
            bar.note(loss=f"{loss.item():.3f}")
            bar.advance()


def _log(out: Path, adapter: cobra.Adapter, step: int, nll: float, total: float) -> None:
    searching = adapter.plan is None
    ranks = {"expected_rank": sum(adapter.expected_ranks().values())}
    if searching:
        ranks["temperature"] = adapter.config.temperature_at(adapter.current_step)
        append_gates(out, step, adapter.extract())
    append_step(out, step, nll=nll, kl=total - nll, loss=total, phase="search" if searching else "cut", **ranks)


@torch.no_grad()
def _evaluate(model: nn.Module, batches: Batches, what: str) -> tuple[float, Tensor]:
    """Accuracy and all logits."""
    model.eval()
    logits, labels = [], []
    with Progress(f"evaluate {what}", len(batches)) as bar:
        for batch in batches:
            labels.append(batch.pop("labels"))
            logits.append(model(**batch).logits)
            bar.advance()
    logits, labels = torch.cat(logits), torch.cat(labels)
    return (logits.argmax(1) == labels).float().mean().item(), logits


def _report(result: dict, settings: DemoSettings, console: Console) -> None:
    curves = {"COBRA": result["losses"], "LoRA (peft)": result["lora losses"]}
    plots.loss_curves(curves, settings.out / "plots" / "loss.png", cut=result["cut"])
    record = {"kind": "demo report", "version": 1, "settings": {k: str(v) for k, v in asdict(settings).items()}, **result}
    storage.write_json(settings.out / "report.json", record)

    table = Table("", "COBRA", "LoRA r=8 (peft)", title=f"{settings.test_examples:,} test reviews, seed {settings.seed}")
    table.add_row(
        "accuracy, no adapter (head on frozen features)", f"{result['frozen accuracy']:.1%}", f"{result['frozen accuracy']:.1%}"
    )
    table.add_row("accuracy, adapter", f"{result['accuracy']:.1%}", f"{result['lora accuracy']:.1%}")
    table.add_row("accuracy, merged", f"{result['merged accuracy']:.1%}", "")
    table.add_row("accuracy, exported and loaded by peft", f"{result['peft accuracy']:.1%}", "")
    table.add_row("budget (ranks)", f"{result['ranks']}", f"{result['lora ranks']}")
    table.add_row("adapter parameters", f"{result['parameters']:,}", f"{result['lora parameters']:,}")
    table.add_row("largest logit difference, merged", f"{result['merged difference']:.1e}", "")
    table.add_row("largest logit difference, peft", f"{result['peft difference']:.1e}", "")
    spent = result["seconds"]
    for stage, value in spent.items():
        mine, theirs = ("", f"{value:.1f}") if "LoRA" in stage else (f"{value:.1f}", "")
        table.add_row(f"seconds: {stage}", mine, theirs)
    console.print(table)
    console.print(
        f"{sum(spent.values()):.0f} s in all. Gradient and contribution correlate at {result['correlation']:.2f}; "
        f"the path integral misses {result['path residual']:.1%}.\n"
        f"{settings.out}/: scores.safetensors, plan.json, adapter/, merged/, plots/, report/index.html, report.json"
    )
