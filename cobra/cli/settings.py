"""What a run is told to do: one frozen object from a YAML file, from flags, or from both, with every value checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cobra.budget import UNITS, Budget
from cobra.config import CHOICES, CobraConfig
from cobra.path import ESTIMATORS, QUADRATURES

TASKS = ("classification", "regression", "causal-lm")
HEADS = ("auto", "model", "mean")
BASELINES = ("auto", "zero", "mean", "pad")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class CalibrateSettings:
    """Model, data, and how layers are scored.

    model: a transformers model folder, a .gguf file, or the name of a packaged model (`cobra.cli.models.PACKAGED`)
    data: a file, a folder of train, dev and test files, or "reviews" (`cobra.cli.data`)
    text_columns: one or two; by default text, and text2 where there is one
    head: of a classifier; "model" is the architecture's own, "mean" the mean of the tokens and a linear layer, "auto" chooses
    baseline: of the path; "auto" is "mean" for causal-lm, whose models normalise their embeddings, else "zero"
    precision: of the model's weights; adapters and heads are fp32 always
    """

    model: str
    data: str
    task: str = "classification"
    text_columns: tuple[str, ...] | None = None
    label_column: str = "label"
    max_length: int = 128
    head: str = "auto"
    batch_size: int = 16
    calibration_examples: int = 64
    calibration_steps: int = 50
    estimator: str = "paper"
    quadrature: str = "midpoint"
    baseline: str = "auto"
    granularity: str = "site"
    target_modules: str | tuple[str, ...] = "all-linear"
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self):
        for name in ("text_columns", "target_modules"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.text_columns, str):
            object.__setattr__(self, "text_columns", (self.text_columns,))
        for name, choices in self._choices().items():
            if getattr(self, name) not in choices:
                close = difflib.get_close_matches(str(getattr(self, name)), choices, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, choices))}{hint}")
        for name in ("model", "data", "label_column"):
            _require(isinstance(getattr(self, name), str) and getattr(self, name), name, getattr(self, name), "a text")
        columns = self.text_columns
        fits = columns is None or (0 < len(columns) <= 2 and all(isinstance(c, str) for c in columns))
        _require(fits, "text_columns", columns, "one or two column names")
        for name in ("batch_size", "calibration_examples", "calibration_steps"):
            _whole(name, getattr(self, name), 1)
        _whole("max_length", self.max_length, 2)
        _whole("seed", self.seed, 0, 2**32 - 1)  # numpy's seeds, which transformers sets too, end there

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return {
            "task": TASKS,
            "head": HEADS,
            "estimator": ESTIMATORS,
            "quadrature": QUADRATURES,
            "baseline": BASELINES,
            "granularity": CHOICES["granularity"],
            "precision": PRECISIONS,
        }

    @classmethod
    def from_mapping(cls, values: Mapping) -> Self:
        """Numbers written as texts (YAML reads 1e-4 as one) are read as numbers.

        Raises ValueError for unknown keys, with the nearest known one, missing ones, and values that do not fit.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(f"unknown key {key!r}{_nearest(key, known)}")
        for name, f in known.items():
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and values.get(name) is None:
                raise ValueError(f"{name} is missing: give it on the command line or as a key of the config file")
        return cls(**{key: _number(value) if known[key].type.startswith("float") else value for key, value in values.items()})

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class TrainSettings(CalibrateSettings):
    """A whole run.

    out: its folder
    eval_data: a file to evaluate on; by default the folder's dev split, else `eval_share` of the rows, held out by the seed
    epochs, steps: the length of training; steps win
    batch_size, accumulate: examples of one forward, and forwards of one optimizer step
    budget: in `unit`, or a mapping with the fields of `cobra.Budget`; by default 8 ranks a layer on average
    search_share: of the steps, before the ranks are cut
    adapter: further fields of `cobra.CobraConfig` (beta, gamma, fusion, temperature, dropout, …)
    max_grad_norm: gradients are clipped to it; 0 for no clipping
    save_steps, log_steps: optimizer steps between checkpoints and between lines of history.jsonl
    merged: whether the merged model is written too
    """

    out: str = field(kw_only=True)
    eval_data: str | None = None
    eval_share: float = 0.1
    epochs: float = 2.0
    steps: int | None = None
    accumulate: int = 1
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    warmup_share: float = 0.0
    max_grad_norm: float = 1.0
    budget: int | dict | None = None
    unit: str = "ranks"
    r_max: int = 16
    search_share: float = 0.6
    adapter: dict = field(default_factory=dict)
    gradient_checkpointing: bool = False
    save_steps: int = 100
    log_steps: int = 10
    merged: bool = False

    def __post_init__(self):
        super().__post_init__()
        _require(isinstance(self.out, str) and self.out, "out", self.out, "a folder")
        for name in ("accumulate", "save_steps", "log_steps", "r_max"):
            _whole(name, getattr(self, name), 1)
        if self.steps is not None:
            _whole("steps", self.steps, 1)
        _require(isinstance(self.epochs, int | float) and self.epochs > 0, "epochs", self.epochs, "a number above 0")
        _require(_is_rate(self.learning_rate), "learning_rate", self.learning_rate, "a finite number above 0")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            _require(isinstance(value, int | float) and value >= 0, name, value, "a number of at least 0")
        for name, low_fits, high_fits in (
            ("eval_share", False, False),
            ("warmup_share", True, False),
            ("search_share", False, True),
        ):
            value = getattr(self, name)
            fits = isinstance(value, int | float) and (0 < value < 1 or (low_fits and value == 0) or (high_fits and value == 1))
            ends = f"{'from' if low_fits else 'above'} 0 {'up to' if high_fits else 'and below'} 1"
            _require(fits, name, value, f"a share, {ends}")
        for name in ("gradient_checkpointing", "merged"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        self.budget_of(1)
        self.config(1, 1)

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return {**super()._choices(), "unit": UNITS}

    def budget_of(self, groups: int) -> Budget:
        if isinstance(self.budget, dict):
            return Budget.from_dict({"unit": self.unit, **self.budget})
        if self.budget is not None:
            _whole("budget", self.budget, 1)
        elif self.unit != "ranks":
            raise ValueError(f"budget is missing: say how many {self.unit}")
        return Budget(8 * groups if self.budget is None else self.budget, self.unit)

    def config(self, groups: int, search_steps: int) -> CobraConfig:
        """Of the adapter, once the model and the number of steps are known."""
        own = {"granularity": self.granularity, "target_modules": self.target_modules, "seed": self.seed, "r_max": self.r_max}
        _require(isinstance(self.adapter, dict), "adapter", self.adapter, "a mapping of fields of CobraConfig")
        known = [f.name for f in dataclasses.fields(CobraConfig)]
        for key in self.adapter:
            if key in own or key in ("rank_budget", "total_steps"):
                raise ValueError(f"adapter: {key!r} follows from the run's own keys: set {_OWN.get(key, key)} there")
            if key not in known:
                raise ValueError(f"adapter: unknown key {key!r}{_nearest(key, known)}")
        further = {key: value if key in _TEXTS else _number(value) for key, value in self.adapter.items()}
        return CobraConfig(rank_budget=self.budget_of(groups), total_steps=search_steps, **own, **further)


_OWN = {"rank_budget": "budget and unit", "total_steps": "steps and search_share"}
_TEXTS = ("modules_to_save",)
LOOSE = ("out", "save_steps", "log_steps", "merged")  # what may differ when a run goes on: its bits do not depend on it


def changed(old: Mapping, new: Mapping) -> str | None:
    """The first setting that makes a resumed run another run, with both values."""
    for key in sorted({*old, *new} - set(LOOSE)):
        if old.get(key) != new.get(key):
            return f"{key} was {old.get(key)!r}, now it is {new.get(key)!r}"
    return None


def read_yaml(path: Path) -> dict:
    """A config file. Raises FileNotFoundError, and ValueError for files that are no mapping."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a config file (YAML)")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys with values, found {type(values).__name__}")
    return values


def _nearest(key: object, known) -> str:
    close = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f"; there are {', '.join(sorted(known))}"


def _number(value: object) -> object:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _whole(name: str, value: object, least: int, most: float = math.inf) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    _require(fits, name, value, f"a whole number of at least {least}" + (f" and at most {most}" if most < math.inf else ""))


def _require(holds: object, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: expected {expected}")


Explain = Callable[[str], None]
