"""The one configuration object of an adapter run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from cobra.budget import Budget
from cobra_kernels.backend import BACKENDS

TargetModules = str | tuple[str, ...] | Callable[[str, nn.Module], bool]

CHOICES = {
    "granularity": ("site", "block"),
    "fusion": ("product", "sum", "contribution", "gradient"),
    "prior_scale": ("literal", "standardized", "log"),
    "prior_level": ("group", "rank"),
    "init": ("auto", "uniform", "gradient"),
    "gate": ("concrete", "hard_concrete", "straight_through", "mean", "open"),
    "kl": ("bernoulli", "concrete"),
    "kl_reduction": ("sum", "mean"),
    "anneal": ("exponential", "linear"),
    "basis": ("auto", "gates", "singular"),
    "fold": ("one", "mean"),
    "backend": BACKENDS,
}

PRESETS = {
    "paper": {
        "gate": "concrete",
        "fusion": "product",
        "gamma": 5.0,
        "prior_scale": "literal",
        "prior_level": "group",
        "open_probability": 0.5,
        "init": "uniform",
        "basis": "gates",
        "beta": 0.01,
        "gate_lr_scale": 1.0,
        "lora_B_lr_scale": 1.0,
    },
    "singular": {"gate": "open", "basis": "singular", "init": "uniform"},
}


@dataclass(frozen=True)
class CobraConfig:
    """How an adapter is attached, trained and cut. The published form (COBRA, Eqs. 1-4) is `preset("paper", ...)`, with a
    scale, a start of lora_A and a KL that docs/method.md names; the defaults differ from it where measurements say so
    (docs/evidence.md).

    rank_budget: R, the ranks kept in total, one gate of a group counting 1; or a `Budget` in parameters, bytes or FLOPs, with
        ranks tied, in multiples or within limits
    r_max: gates per group during the search; a group never has more than its smallest layer dimension
    total_steps: optimizer steps until the temperature reaches its end; needed by gate="concrete"
    alpha: the update is scaled by alpha / (average rank of the budget, at least 1); None means a scale of 2.
        The scale never follows the live rank.
    target_modules: "all-linear" (every linear layer but the output head), a regular expression over full names, a tuple
        of names or name endings, or a function (name, module) -> bool
    modules_to_save: modules trained whole beside the adapter; "auto" means a classification or regression head
    granularity: a group of gates is one layer ("site") or one transformer block ("block")
    fusion: how contribution and gradient make the prior
    gamma, prior_scale: prior logit = gamma (pi - mean pi); "standardized" divides the difference by its spread; "log" takes
        log pi in the place of pi
    prior_level: gates of a "group" share one prior, or every "rank" has its own: the gradient's k-th singular value in the
        place of its norm (needs scores with directions)
    open_probability: of every gate where the prior is at its mean
    init: rows of lora_A "uniform" (kaiming), or along the leading directions of the calibration's "gradient"; "auto" is along
        as many directions as the scores keep
    init_scale: length of rows along such directions, where 1 is that of uniform rows. None, which `attach` replaces, is a third
        where gates are ranked: inputs vary about three times as much along them, so that lora_B moves the output as fast as in
        LoRA; and 1 with basis="singular", whose cut gives rows that length (docs/evidence.md has what was measured)
    beta, kl, kl_reduction: the KL term; "bernoulli" is the closed form, "concrete" a one-sample estimate
    temperature, anneal: first and last temperature of the relaxation, and the way between
    gate: "concrete" (noise once per optimizer step), "hard_concrete" (the same, stretched to (-0.1, 1.1) and cut to [0, 1], as
        mean gates are too; Louizos et al. 2018, whose temperature is (2/3, 2/3)), "straight_through" (rounded to 0 or 1 in the
        forward), "mean" (sigmoid of the logit, no noise), "open" (plain LoRA). The cut ranks them by P(z > 1/2)
    basis: what the cut ranks. "gates": the gates, by their posterior. "singular": the singular directions of every layer's
        update as it is with mean gates, by their energy (`cobra.singular`); a cut then loses the least of it that ranks allow.
        "auto", which `attach` replaces, is "singular" for budgets of an average rank below 1, where whole layers go, and for
        a cut of open gates, which tell no ranks apart
    fold: the factor a kept gate's rank carries after the cut: 1, or its mean gate, which is in singular directions anyway
    gate_lr_scale, lora_B_lr_scale: learning rates of the gate logits and of lora_B over that of lora_A
    dropout: on the adapter branch's input
    seed: of lora_A's initialisation and of every gate
    share_inputs: from the second step on, layers that are called in a row with one input, as q, k and v are, read it once; the
        last bits of sums differ from those of each layer alone
    backend: of every adapted layer. "auto" takes a path that has run on the hardware at hand; "triton" needs a CUDA device when
        the model runs, and there raises where it cannot run (`cobra env` says what is active)
    """

    rank_budget: int | Budget
    r_max: int = 16
    total_steps: int | None = None
    alpha: float | None = None
    target_modules: TargetModules = "all-linear"
    modules_to_save: str | tuple[str, ...] = "auto"
    granularity: str = "site"
    fusion: str = "product"
    gamma: float = 1.0
    prior_scale: str = "log"
    prior_level: str = "group"
    open_probability: float = 0.9
    init: str = "auto"
    init_scale: float | None = None
    beta: float = 0.01
    kl: str = "bernoulli"
    kl_reduction: str = "sum"
    temperature: tuple[float, float] = (1.0, 0.1)
    anneal: str = "exponential"
    gate: str = "concrete"
    basis: str = "auto"
    fold: str = "one"
    gate_lr_scale: float = 1.0
    lora_B_lr_scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0
    share_inputs: bool = False
    backend: str = "auto"

    def __post_init__(self):
        for name in ("target_modules", "modules_to_save"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        if isinstance(self.temperature, list):
            object.__setattr__(self, "temperature", tuple(self.temperature))
        if callable(self.modules_to_save):
            raise ValueError("modules_to_save takes no function: expected names of modules")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, choices))}")
        if not isinstance(self.rank_budget, Budget):
            _require(
                _is_int(self.rank_budget) and self.rank_budget >= 0,
                f"rank_budget={self.rank_budget!r}",
                "an integer >= 0, or a Budget",
            )
        _require(_is_int(self.r_max) and 1 <= self.r_max <= 1024, f"r_max={self.r_max!r}", "an integer from 1 to 1024")
        _require(_is_int(self.seed) and 0 <= self.seed < 2**64, f"seed={self.seed!r}", "an integer from 0 to 2**64 - 1")
        for name in ("gamma", "open_probability", "beta", "gate_lr_scale", "lora_B_lr_scale", "dropout"):
            _require(_is_finite(getattr(self, name)), f"{name}={getattr(self, name)!r}", "a finite number")
        _require(0 <= self.dropout < 1, f"dropout={self.dropout!r}", "at least 0 and below 1")
        if self.backend == "triton" and self.dropout:
            raise ValueError(
                f"backend='triton' has one input for layer and branch, and dropout={self.dropout} makes two; "
                "set dropout=0, or backend='auto'"
            )
        for name in ("alpha", "init_scale"):
            value = getattr(self, name)
            positive = _is_finite(value) and value > 0
            _require(value is None or positive, f"{name}={value!r}", "a number greater than 0, or None")
        _require(self.beta >= 0, f"beta={self.beta!r}", "at least 0")
        _require(self.gate_lr_scale >= 0, f"gate_lr_scale={self.gate_lr_scale!r}", "at least 0")
        _require(self.lora_B_lr_scale > 0, f"lora_B_lr_scale={self.lora_B_lr_scale!r}", "greater than 0")
        _require(0 < self.open_probability < 1, f"open_probability={self.open_probability!r}", "between 0 and 1")
        pair = isinstance(self.temperature, tuple) and len(self.temperature) == 2 and all(map(_is_finite, self.temperature))
        _require(pair, f"temperature={self.temperature!r}", "(first, last), as (1.0, 0.1)")
        first, last = self.temperature
        _require(first >= last > 0, f"temperature={self.temperature!r}", "(first, last) with first >= last > 0")
        _require(
            self.total_steps is None or (_is_int(self.total_steps) and self.total_steps > 0),
            f"total_steps={self.total_steps!r}",
            "an integer greater than 0",
        )
        if (self.gate, self.fold) == ("hard_concrete", "mean") and self.basis != "singular":
            raise ValueError("fold='mean' with gate='hard_concrete': a kept gate's mean can be 0; use fold='one'")
        if self.kl == "concrete" and not self.samples:
            raise ValueError(
                f"kl='concrete' is estimated from a draw of the gates, and gate={self.gate!r} has none: use 'bernoulli'"
            )
        if self.samples and self.total_steps is None:
            raise ValueError(
                f"gate={self.gate!r} anneals its temperature: pass total_steps, the number of optimizer steps of the search"
            )

    @classmethod
    def preset(cls, name: str, rank_budget: int | Budget, **changes) -> CobraConfig:
        """A named set of choices, with changes.

        "paper": the published form, to be cut when the training ends. "singular": plain LoRA, cut to the singular directions of
        most energy; it needs no scores and no total_steps, but an r_max well above the budget's average rank (docs/evidence.md
        has 2 to 8 times, cut at 40 % of the steps).

        Raises ValueError for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} is not one of {', '.join(map(repr, PRESETS))}")
        return cls(**{"rank_budget": rank_budget, **PRESETS[name], **changes})

    @property
    def reads_scores(self) -> bool:
        """Whether anything of a calibration enters: the gates' prior, or where lora_A starts."""
        return self.gate != "open" or self.basis != "singular" or self.init != "uniform"

    @property
    def samples(self) -> bool:
        """Whether gates are drawn with noise."""
        return self.gate in ("concrete", "hard_concrete", "straight_through")

    def temperature_at(self, step: int) -> float:
        """The temperature of an optimizer step, from the first to the last over `total_steps`."""
        first, last = self.temperature
        progress = min(1.0, step / self.total_steps) if self.total_steps else 0.0
        if self.anneal == "linear":
            return first + (last - first) * progress
        return max(last, first * (last / first) ** progress)

    def scaling(self, average_rank: float) -> float:
        """The fixed scale of the update, for the average rank of the budget."""
        return 2.0 if self.alpha is None else self.alpha / max(1.0, average_rank)

    def resolved(self, average_rank: float, *, cut: bool) -> CobraConfig:
        """With the basis that "auto" stands for, for the average rank of the budget, and the `init_scale` of None; cut: whether
        it is below the ranks of the search."""
        singular = self.basis == "singular" or (self.basis == "auto" and (average_rank < 1 or (cut and self.gate == "open")))
        scale = self.init_scale or (1.0 if singular else 1 / 3)
        return dataclasses.replace(self, basis="singular" if singular else "gates", init_scale=scale)

    def to_dict(self) -> dict:
        """Plain values for JSON; a callable `target_modules` is named, not stored."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.rank_budget, Budget):
            values["rank_budget"] = self.rank_budget.to_dict()
        if callable(self.target_modules):
            values["target_modules"] = f"<{getattr(self.target_modules, '__qualname__', 'callable')}>"
        return values


def _names(field: str, value: object) -> TargetModules:
    """Names in any collection (peft's configs have sets) as a tuple; a string or a function stays."""
    if isinstance(value, str) or callable(value):
        return value
    names = (sorted if isinstance(value, (set, frozenset)) else tuple)(value) if isinstance(value, Iterable) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field}={value!r}: expected names, or a string (a compiled expression's .pattern)")
    return tuple(names)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, given: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{given}: expected {expected}")
