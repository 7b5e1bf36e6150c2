"""A rank plan in the words of other trainers: peft's LoraConfig, axolotl's YAML keys."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cobra.export.peft import rank_pattern

if TYPE_CHECKING:
    from peft import LoraConfig

    from cobra.plan import RankPlan


def peft_config(plan: RankPlan, scaling: float = 2.0, **settings) -> LoraConfig:
    """alpha is scaling × rank for every layer; layers of rank 0 are left out; names are full, so none takes another's rank.

    Raises ValueError for a plan without any rank, and settings that the plan decides.
    """
    from peft import LoraConfig

    fields = lora_fields(plan, scaling)
    decided = sorted(fields.keys() & settings.keys())
    if decided:
        raise ValueError(f"{decided[0]} follows from the plan; change the plan instead")
    return LoraConfig(**fields, **settings)


def axolotl_keys(plan: RankPlan, scaling: float = 2.0) -> dict:
    """As `peft_config`, under axolotl's names."""
    fields = lora_fields(plan, scaling)
    return {
        "adapter": "lora",
        "lora_r": fields["r"],
        "lora_alpha": fields["lora_alpha"],
        "lora_target_modules": fields["target_modules"],
        "lora_rank_pattern": fields["rank_pattern"],
        "lora_alpha_pattern": fields["alpha_pattern"],
    }


def lora_fields(plan: RankPlan, scaling: float = 2.0) -> dict:
    """The fields of a LoraConfig that a plan decides, as plain values."""
    ranks = {name: rank for name, rank in plan.ranks.items() if rank}
    if not ranks:
        raise ValueError("the plan keeps no rank: there is nothing to train")
    largest = max(ranks.values())
    pattern = rank_pattern(ranks, largest)
    # a name in a list stands for all that end in it, layers of rank 0 too; an expression is for full names
    caught = any(other.endswith(f".{name}") for other, rank in plan.ranks.items() if not rank for name in ranks)
    return {
        "r": largest,
        "lora_alpha": _whole(scaling * largest),
        "target_modules": "|".join(map(re.escape, ranks)) if caught else list(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": {name: _whole(scaling * rank) for name, rank in pattern.items()},
    }


def _whole(alpha: float) -> float:
    """An integer where it is one: configurations type alpha so."""
    return int(alpha) if float(alpha).is_integer() else alpha
