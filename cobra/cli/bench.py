"""What COBRA costs on this machine for one model: training steps beside the frozen model's and peft's, calibration, merging.

Batches are random, weights are in fp32, dropout is off; a step is forward and backward, without the optimizer. Alternatives
take turns, so that what else the machine does falls on all of them alike, and what they compute is compared before it is timed.
"""

from __future__ import annotations

import copy
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import torch
import transformers
from torch import Tensor, nn

import cobra
from cobra.cli.subject import Source, find_model
from cobra.cli.subject_data import Pooled, image_batches
from cobra.sites import find_sites
from cobra.timing import Comparison, compare

FROZEN, UNTOUCHED = "frozen model, gradient to the embeddings", "untouched model"
SCALE = 2.0  # alpha / r in cobra and peft alike
TOLERANCE = 1e-4  # of fp32 outputs that sum in different orders
CALIBRATION_EXAMPLES, CALIBRATION_ROUNDS = 2, 3
Step = Callable[[], object]


@dataclass(frozen=True)
class BenchSettings:
    """model: as `find_model` takes it; rank: of LoRA, and with gates on average; points: of the calibration's path"""

    model: str = "minilm"
    rounds: int = 9
    batch_size: int = 8
    tokens: int = 64
    rank: int = 8
    points: int = 50
    seed: int = 0

    def __post_init__(self):
        for name, least in (("rounds", 1), ("batch_size", 1), ("tokens", 2), ("rank", 1), ("points", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class BenchReport:
    """machine: facts; comparisons: training step, merged inference, calibration and merging, each with its yardstick"""

    model: str
    machine: dict[str, str]
    settings: BenchSettings
    comparisons: tuple[Comparison, ...]
    calibration_per_example: float

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        rows = [row for comparison in self.comparisons for row in comparison.rows()]
        fields = {"model": self.model, "machine": self.machine, "settings": asdict(self.settings)}
        return {**fields, "calibration_seconds_per_example": self.calibration_per_example, "rows": rows}

    def table(self) -> str:
        """A line an alternative: median time, and the ratio to the first with its range over the rounds."""
        lines = [self.model, ", ".join(self.machine.values())]
        for comparison in self.comparisons:
            lines += ["", f"{comparison.work}, {comparison.rows()[0]['rounds']} rounds"]
            for row in comparison.rows():
                spread = f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
                lines.append(f"  {row['name']:<42} {row['seconds'] * 1e3:>10,.1f} ms  {row['ratio']:>6.2f}x  {spread}")
        lines += ["", f"calibration: {self.calibration_per_example:.2f} s an example at {self.settings.points} points"]
        return "\n".join(lines)


def run_bench(settings: BenchSettings) -> BenchReport:
    """Measures one model.

    Raises FileNotFoundError and ValueError for models that do not load, a rank above what a layer has, and alternatives that
    compute different things.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = find_model(settings.model)
    model, batch = _load(source, settings), _batch(source, settings)
    _check_rank(model, settings.rank)
    comparisons = [
        _training(model, batch, settings),
        _calibration(model, batch, settings),
        *_merging(model, batch, settings),
    ]
    calibrated = comparisons[1].timings[1].median / min(CALIBRATION_EXAMPLES, settings.batch_size)
    return BenchReport(source.words, _machine(), settings, tuple(comparisons), calibrated)


def _machine() -> dict[str, str]:
    return {
        "device": f"CPU, {torch.get_num_threads()} threads",
        "torch": f"torch {torch.__version__}",
        "platform": platform.platform(),
        "cobra": f"cobra-peft {cobra.__version__}",
    }


def _load(source: Source, settings: BenchSettings) -> nn.Module:
    model = source.load(settings.seed)
    if source.task == "encoder":
        model = Pooled(model, outputs=2).eval()
        nn.init.normal_(model.classifier.weight, std=0.05)
    return model.requires_grad_(False)


def _check_rank(model: nn.Module, rank: int) -> None:
    narrow = min(find_sites(model), key=lambda site: min(site.in_features, site.out_features))
    most = min(narrow.in_features, narrow.out_features)
    if rank > most:
        raise ValueError(f"rank={rank}: {narrow.name} has {most} features, and no rank above; expected at most {most}")


def _batch(source: Source, settings: BenchSettings) -> dict[str, Tensor]:
    """Random tokens without padding, or images, and labels."""
    rows, config = settings.batch_size, source.config
    if source.task == "images":
        return image_batches(config, rows, rows, settings.seed)[0]
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = min(settings.tokens, source.most_tokens)
    ids = torch.randint(config.vocab_size, (rows, tokens), generator=generator)
    classes = 2 if source.task == "encoder" else config.num_labels
    labels = {
        "causal-lm": lambda: ids,
        "regression": lambda: torch.randn(rows, generator=generator),
    }.get(source.task, lambda: torch.randint(classes, (rows,), generator=generator))()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# training


def _training(model: nn.Module, batch: dict[str, Tensor], settings: BenchSettings) -> Comparison:
    rank, sites = settings.rank, [site.name for site in find_sites(model)]
    alternatives = {
        FROZEN: _frozen(model),
        f"cobra LoRA, r={rank}": _cobra(model, rank, "open", settings),
        f"cobra gates, r_max={rank}": _cobra(model, rank, "concrete", settings),
        f"cobra gates, r_max={2 * rank}": _cobra(model, 2 * rank, "concrete", settings),
    }
    if find_spec("peft") is not None:
        alternatives[f"peft LoRA, r={rank}"] = _peft(model, alternatives[f"cobra LoRA, r={rank}"], sites, rank)
    check_alike({name: _logits(other, batch) for name, other in alternatives.items() if "LoRA" in name})
    check_alike({name: _logits(other, batch) for name, other in alternatives.items() if "LoRA" not in name})
    steps = {name: _step(other, batch) for name, other in alternatives.items()}
    work = f"forward + backward, {settings.batch_size} examples, {len(sites)} layers adapted"
    return compare(work, FROZEN, steps, settings.rounds)


def check_alike(logits: dict[str, Tensor]) -> None:
    """Raises ValueError where an output differs from the first's by more than rounding."""
    (first, expected), *others = logits.items()
    for name, found in others:
        gap = ((found - expected).abs().max() / expected.abs().max()).item()
        if not gap <= TOLERANCE:
            raise ValueError(f"{name} and {first} compute different things: outputs differ by {gap:.1e} of the largest")


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules on the same weights, which are frozen."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _frozen(base: nn.Module) -> nn.Module:
    """The embeddings' output asks for a gradient, so that the backward runs through all layers."""
    model = _sharing(base)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def _cobra(base: nn.Module, r_max: int, gate: str, settings: BenchSettings) -> nn.Module:
    """LoRA gets a lora_B that counts; with gates it stays 0, so that noise changes nothing before the timing."""
    model = _sharing(base)
    budget = settings.rank * len(find_sites(model))
    adapter = cobra.attach(model, cobra.CobraConfig(budget, r_max=r_max, gate=gate, total_steps=1000, modules_to_save=()))
    if gate == "open":
        _stir(adapter, settings.seed)
    return model


def _stir(adapter: cobra.Adapter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in adapter.state_dict().items():
            if name.endswith(".lora_B"):
                tensor.add_(0.01 * torch.randn(tensor.shape, generator=generator))


def _peft(base: nn.Module, ours: nn.Module, sites: list[str], rank: int) -> nn.Module:
    """With the matrices of `ours`, whose scale is 2 too."""
    import peft

    layers = {name: ours.get_submodule(name) for name in sites}
    transposed = any(layer.transposed for layer in layers.values())
    config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=sites, fan_in_fan_out=transposed)
    model = peft.get_peft_model(_sharing(base), config)
    with torch.no_grad():
        for name, layer in layers.items():
            theirs = model.base_model.model.get_submodule(name)
            theirs.lora_A["default"].weight.copy_(layer.lora_A)
            theirs.lora_B["default"].weight.copy_(layer.lora_B)
    return model


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        model(**batch).loss.backward()
        for p in trained:
            p.grad = None

    return run


@torch.no_grad()
def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


# calibration and merging


def _calibration(model: nn.Module, batch: dict[str, Tensor], settings: BenchSettings) -> Comparison:
    examples = min(CALIBRATION_EXAMPLES, settings.batch_size)
    few = {name: value[:examples] for name, value in batch.items()}
    alternatives = {
        FROZEN: _step(_frozen(model), few),
        f"cobra.calibrate, {settings.points} points": lambda: _calibrate(model, few, settings.points),
    }
    _calibrate(model, few, 2)
    work = f"calibration of {examples} examples beside one step on them"
    return compare(work, FROZEN, alternatives, min(settings.rounds, CALIBRATION_ROUNDS), warmup=0)


def _calibrate(model: nn.Module, batch: dict[str, Tensor], points: int) -> cobra.LayerScores:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the path's residual, which says nothing here
        return cobra.calibrate(model, [batch], steps=points, progress=False)


def _merging(model: nn.Module, batch: dict[str, Tensor], settings: BenchSettings) -> list[Comparison]:
    merged = copy.deepcopy(model)
    sites = find_sites(merged)
    adapter = cobra.attach(
        merged, cobra.CobraConfig(settings.rank * len(sites), r_max=settings.rank, gate="open", modules_to_save=())
    )
    _stir(adapter, settings.seed)
    expected = _logits(merged, batch)

    weights = [site.module.weight for site in sites]
    adapter.merge()
    check_alike({"unmerged model": expected, "merged model": _logits(merged, batch)})
    adapter.unmerge()
    copying = f"copy of the weights of {len(sites)} layers"
    alternatives = {copying: lambda: [w.clone() for w in weights], "merge": adapter.merge, "unmerge": adapter.unmerge}
    merging = compare("merging", copying, alternatives, settings.rounds, warmup=0)
    adapter.merge()
    alternatives = {UNTOUCHED: lambda: _logits(model, batch), "merged model": lambda: _logits(merged, batch)}
    return [merging, compare(f"inference, {settings.batch_size} examples", UNTOUCHED, alternatives, settings.rounds)]
