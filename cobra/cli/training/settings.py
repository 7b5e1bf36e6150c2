"""What `cobra train` and `cobra calibrate` can be told: each setting once, as a field, an option and a key of a YAML file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from cobra.budget import UNITS, Budget
from cobra.cli.training.configfile import checked, nearest
from cobra.config import CHOICES, PRESETS, CobraConfig
from cobra.path import ESTIMATORS

TASKS = ("classification", "regression", "causal-lm")
# fields of CobraConfig that are settings here
OWN = ("rank_budget", "r_max", "total_steps", "granularity", "seed")
AVERAGE_RANK = 8
SEARCH_SHARE = 0.6
SEARCH_SHARES = {"paper": 1.0, "singular": 0.4}  # of presets: the published form is cut at the end, the other as measured


def setting(default: Any, words: str, **rules) -> Any:
    """A field and its help.

    choices: its values; least, most: inclusive; above, below: exclusive
    free: may be another when a run is resumed
    flag: of the command line, where it is another than the name
    """
    return field(default=default, metadata={"help": words, **rules})


@dataclass(frozen=True)
class SubjectSettings:
    """A model and the rows it is trained or measured on. Raises ValueError for a value out of range, naming the setting."""

    model: str | None = setting(None, "A transformers folder, minilm or smollm2.")
    data: str | None = setting(None, "A CSV, TSV, JSONL or Parquet file, or reviews.")
    task: str | None = setting(None, "By default what the model's class is for.", choices=TASKS)
    text: str = setting("text", "Column of the texts.")
    pair: str | None = setting(None, "Column of a second text, for tasks on pairs.")
    label: str = setting("label", "Column of the labels.")
    prompt: str | None = setting(None, "Column of prompts, which a language model reads and is not trained on.")
    response: str | None = setting(None, "Column of the responses to them, which it is trained on.")
    chat: bool = setting(False, "Prompts and responses in the tokenizer's chat template.")
    longest: int = setting(128, "Tokens of a text; the rest is cut.", least=2)
    granularity: str = setting("site", "Of gates and scores: every layer or every block.", choices=CHOICES["granularity"])
    estimator: str = setting("paper", "Of the calibration.", choices=ESTIMATORS)
    baseline: str = setting("zero", "Embeddings where the path starts.", choices=("zero", "mean", "pad"))
    calibration_batch_size: int = setting(8, "Examples of one calibration batch.", least=1)
    device: str = setting("auto", "auto takes a GPU where there is one.", choices=("auto", "cpu"))
    seed: int = setting(0, "Of heads, lora_A, gates, the split and the order of the data.", least=0)

    def __post_init__(self):
        for name in ("model", "data"):
            if getattr(self, name) is None:
                raise ValueError(f"no {name}: give --{name}, or {name}: in a --config file")
        for each in fields(self):
            if getattr(self, each.name) is not None:
                _check(each.name, getattr(self, each.name), each.metadata)
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response go together: name one column for each")
        if self.chat and self.prompt is None:
            raise ValueError("chat needs prompt and response, the columns of the two turns")
        if self.prompt is not None and self.task not in (None, "causal-lm"):
            raise ValueError(f"prompt and response are for task causal-lm, not {self.task}")


@dataclass(frozen=True)
class CalibrateSettings(SubjectSettings):
    """Of `cobra calibrate`."""

    examples: int = setting(64, "Rows that are measured.", least=1)
    steps: int = setting(50, "Points of the path.", least=1)
    out: str = setting("scores.safetensors", "File of the scores.")


@dataclass(frozen=True)
class TrainSettings(SubjectSettings):
    """Of `cobra train`."""

    eval_data: str | None = setting(None, "Another file to evaluate on; by default a share of the data is held out.")
    eval_share: float = setting(0.1, "Of the data, to evaluate on.", above=0, below=1)
    train_examples: int | None = setting(None, "The most to train on.", least=1)
    eval_examples: int | None = setting(None, "The most to evaluate on.", least=1)
    method: str = setting(
        "cobra",
        "lora: equal ranks, as many as the budget and r-max allow; no gates, no calibration.",
        choices=("cobra", "lora"),
    )
    budget: int | None = setting(None, f"What may be kept, in the unit; by default {AVERAGE_RANK} ranks a layer.", least=0)
    unit: str = setting("ranks", "Of the budget: bytes of the matrices, flops of a token's forward.", choices=UNITS)
    r_max: int | None = setting(
        None,
        "Gates of a layer in the search, its largest rank; by default 16, of singular 8 times the average rank. With lora the "
        "largest that the equal rank, which is the budget's, may be.",
        least=1,
    )
    multiple: int = setting(1, "Every rank is a multiple of this.", least=1)
    tied: tuple[str, ...] = setting((), "Equal ranks: qkv, gate_up, experts, or a regular expression.")
    scores: str | None = setting(None, "Scores of `cobra calibrate`, instead of calibrating.")
    calibration_examples: int = setting(64, "Rows that are measured before the search.", least=1)
    calibration_steps: int = setting(50, "Points of the calibration's path.", least=1)
    preset: str | None = setting(
        None, "The published form, or the cut in the singular basis without calibration.", choices=tuple(PRESETS)
    )
    cobra: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "A field of CobraConfig, such as beta=0.1.", "flag": "--set"}
    )
    steps: int | None = setting(None, "Optimizer steps; by default as many as the epochs have.", least=1)
    epochs: float = setting(3.0, "Passes over the data, where no steps are given.", above=0)
    batch_size: int = setting(16, "Examples of one forward pass.", least=1)
    accumulation: int = setting(1, "Forward passes of an optimizer step.", least=1)
    lr: float = setting(5e-4, "Learning rate.", above=0)
    schedule: str = setting("linear", "Of the learning rate.", choices=("linear", "cosine", "constant"))
    warmup_steps: int = setting(0, "Steps over which the learning rate rises.", least=0)
    search_share: float | None = setting(
        None, f"Of the steps, before the cut; by default {SEARCH_SHARE}, of paper 1, of singular 0.4.", above=0, most=1
    )
    weight_decay: float = setting(0.0, "Of the matrices.", least=0)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm; 0 clips nothing.", least=0)
    max_bad_steps: int = setting(5, "So many steps in a row whose gradients are not finite end the training.", least=1)
    precision: str = setting("fp32", "bf16 is autocast.", choices=("fp32", "bf16"))
    eval_batch_size: int = setting(32, "Examples of one forward pass of the evaluation.", least=1, free=True)
    out: str = setting("runs/train", "Folder of the run: a new one, or with --resume one that is there.", free=True)
    layout: str = setting("compact", "Of the adapter; padded has one rank.", choices=("compact", "padded"), free=True)
    merge: bool = setting(False, "Writes the merged model too.", free=True)
    report: bool = setting(True, "Writes the page of the run.", free=True)
    report_to: str | None = setting(None, "Curves while it trains, in OUT/tensorboard.", choices=("tensorboard",), free=True)
    save_every: int = setting(100, "Steps from checkpoint to checkpoint.", least=1, free=True)
    log_every: int = setting(10, "Steps from line to line of history.jsonl.", least=1, free=True)

    def __post_init__(self):
        super().__post_init__()
        if self.eval_data is not None and self.data == "reviews":
            raise ValueError("reviews has test reviews of its own: leave eval_data out")
        if self.method == "lora" and (self.scores, self.preset, self.cobra.get("gate", "open")) != (None, None, "open"):
            raise ValueError("method lora has equal ranks and open gates: leave scores, preset and gate out")
        self.config(0, total_steps=1)

    @property
    def share_of_search(self) -> float:
        """Of the steps: what was said, else the preset's own."""
        return SEARCH_SHARES.get(self.preset, SEARCH_SHARE) if self.search_share is None else self.search_share

    def config(self, budget: int | Budget, **changes) -> CobraConfig:
        """The adapter's. Raises ValueError for fields that it does not have, and values that it does not take."""
        values = {"granularity": self.granularity, "seed": self.seed, **_fields(self.cobra), **changes}
        if self.r_max is not None:
            values = {"r_max": self.r_max, **values}
        if self.method == "lora":
            values["gate"] = "open"
        return CobraConfig(budget, **values) if self.preset is None else CobraConfig.preset(self.preset, budget, **values)


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """As CobraConfig has them."""
    known = [each.name for each in fields(CobraConfig) if each.name not in OWN]
    for name in given:
        if name in OWN:
            raise ValueError(f"cobra: {name}: this one has a setting of its own, see cobra train --help")
        if name not in known:
            raise ValueError(f"cobra: CobraConfig has no field {name!r}{nearest(name, known)}")
    return checked(given, CobraConfig, "cobra")


def _check(name: str, value: Any, rules: dict) -> None:
    if "choices" in rules and value not in rules["choices"]:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(rules['choices'])}")
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"{name}={value!r}: expected a finite number")
    limits = {
        "least": lambda limit: value >= limit,
        "most": lambda limit: value <= limit,
        "above": lambda limit: value > limit,
        "below": lambda limit: value < limit,
    }
    words = {"least": "at least", "most": "at most"}
    for rule, holds in limits.items():
        if rule in rules and not holds(rules[rule]):
            raise ValueError(f"{name}={value!r}: expected {words.get(rule, rule)} {rules[rule]}")
