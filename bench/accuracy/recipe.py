"""Everything that decides one run, and the key under which its row is stored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

PHASES = ("search", "factor", "ablation", "final")
# of dictionary text and worked answers, with SmolLM2, where other tasks have the defaults below
TEXTS = {
    "model": "smollm2",
    "examples": 1000,
    "steps": 60,
    "batch_size": 4,
    "max_length": 128,
    "calibration_examples": 16,
    "path_points": 6,
    "validation_examples": 48,
    "test_examples": 128,
}
LATER = ("validation_examples", "test_examples")  # fields that keys of older rows lack: at None they are left out


@dataclass(frozen=True)
class Recipe:
    """One training run. Two recipes with equal values have one key, and one row.

    phase: "search" (learning rates), "factor" and "ablation" (one thing changed at a time) are judged on the validation split;
        only "final" runs see the test split
    method: a name of `bench.accuracy.methods`
    average_rank: the budget is that of a LoRA of this rank on every linear layer, in parameters
    lr: of matrices and head; linear warmup over `warmup` of the steps, then linear decay
    examples: drawn from the task's pool by the seed; `calibration_examples` are the first of them
    precision: of the forward (autocast); evaluation likewise, calibration always in fp32
    dropout: of the base model, in hidden states and attention
    noise: share of the training labels replaced by another class at random
    validation_examples, test_examples: of the splits that are evaluated, the same ones for every seed; None: all
    settings: of the method, by name; for those of COBRA fields of CobraConfig; and
        scaling: of the update, 2 where none is given
        layers: of peft's methods, comma-separated endings of the names of those that have an adapter, at the same budget
        minimum: ranks of a layer; r_max_multiple: gates of a layer, in average ranks; cut: share of the steps before it;
        row_scale: of lora_A's rows at the start, in their usual length;
        scores: False for no calibration; drawn: "example" for gates with noise of their own for every example; rounds: in which
        ranks grow, in the place of a cut (`bench.accuracy.variants`)
    """

    phase: str
    task: str
    method: str
    average_rank: float
    lr: float
    seed: int
    model: str = "minilm"
    examples: int = 2000
    steps: int = 200
    batch_size: int = 16
    max_length: int = 64
    warmup: float = 0.06
    noise: float = 0.0
    precision: str = "bf16"
    dropout: float = 0.0
    calibration_examples: int = 64
    path_points: int = 10
    estimator: str = "paper"
    settings: tuple[tuple[str, object], ...] = ()
    validation_examples: int | None = None
    test_examples: int | None = None

    def __post_init__(self):
        if self.phase not in PHASES:
            raise ValueError(f"phase={self.phase!r} is not one of {', '.join(PHASES)}")
        if self.average_rank == int(self.average_rank):
            object.__setattr__(self, "average_rank", int(self.average_rank))  # 2.0 is 2, in the key too
        object.__setattr__(self, "settings", tuple(sorted(dict(self.settings).items())))

    @property
    def options(self) -> dict:
        return dict(self.settings)

    def to_dict(self) -> dict:
        """Plain values for JSON; settings by name."""
        fields = {**dataclasses.asdict(self), "settings": dict(self.settings)}
        return {name: value for name, value in fields.items() if value is not None or name not in LATER}

    @classmethod
    def from_dict(cls, config: dict) -> Recipe:
        """What `to_dict` gave, also in an older row."""
        return cls(**{**config, "settings": tuple(config["settings"].items())})

    @property
    def key(self) -> str:
        """16 hex digits of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def with_settings(self, **settings: object) -> Recipe:
        """The same run with these settings of the method changed."""
        return dataclasses.replace(self, settings=tuple({**self.options, **settings}.items()))
