"""Findings, and the rules that several engines share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cobra.export.folder import Checkpoint

# inits that only choose where training starts; every other one also changes the base model's weights
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
BASE_CHANGING_INITS = ("pissa", r"pissa_niter_\d+", "olora", "corda", "loftq", "lora_ga")
VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
}
PADDED = 'export again with layout="padded"'
MERGE = "merge it with peft (merge_and_unload) and serve the merged model"


@dataclass(frozen=True)
class Finding:
    """level: "error" (does not load, or computes something else), "warning" (loads only with the fix, or perhaps not all of
    it), "note"; fix: what to do about it, "" where there is nothing to do"""

    level: str
    message: str
    fix: str = ""


def rank_zero(c: Checkpoint) -> Iterator[Finding]:
    empty = [name for name in c.modules if c.rank(name) <= 0]
    if empty:
        yield Finding("error", f"{few(empty)}: a rank of 0 or less", "leave them out of target_modules and of the file")


def missing_settings(c: Checkpoint, fields: tuple[str, ...]) -> Iterator[Finding]:
    """Fields that peft has defaults for."""
    missing = [field for field in fields if field not in c.config]
    if missing:
        yield Finding("error", f"adapter_config.json has no {' and no '.join(missing)}", "write what peft takes by default")


def variants(c: Checkpoint, fields: dict[str, str]) -> Iterator[Finding]:
    for field, what in fields.items():
        if c.config.get(field):
            yield Finding("error", f"{field} is set: {what} is not implemented", MERGE)


def fused_experts(c: Checkpoint) -> Iterator[Finding]:
    names = [name for name in c.modules if c.is_fused_experts(name)]
    if names:
        yield Finding("error", f"{few(names)}: all experts in one parameter (target_parameters) do not load", MERGE)


def changed_base(c: Checkpoint) -> Iterator[Finding]:
    init = c.config.get("init_lora_weights")
    if changes_base(init):
        yield Finding(
            "error",
            f"init_lora_weights={init!r} belongs to a base model whose weights were changed at the start of training",
            "save it with peft's path_initial_model_for_weight_conversion (LoftQ has none); or serve the changed base and "
            "set it to true",
        )


def changes_base(init: object) -> bool:
    """Whether an adapter with this init_lora_weights is no update of the base model as it was."""
    return isinstance(init, str) and init.lower() not in PLAIN_INITS


def convolutions(c: Checkpoint) -> Iterator[Finding]:
    names = [name for name, shapes in c.modules.items() if len(shapes.lora_A) > 2]
    if names:
        yield Finding("error", f"{few(names)}: LoRA of convolutions does not load", MERGE)


def global_scale(c: Checkpoint) -> float | None:
    return c.alpha / c.r if c.r > 0 else None


def wrong_scale(c: Checkpoint, rule: str, theirs: Callable[[str], float | None]) -> Iterator[Finding]:
    scales = [(name, c.scale(name), theirs(name)) for name in c.modules if c.rank(name) > 0]
    wrong = [(name, right, found) for name, right, found in scales if found is not None and not math.isclose(right, found)]
    if wrong:
        name, right, found = wrong[0]
        yield Finding("error", f"{name}: scale {found:.4g} instead of {right:.4g}{more(wrong)}: {rule}", PADDED)


def partition(names: Iterable[str], holds: Callable[[str], object]) -> tuple[list[str], list[str]]:
    names = list(names)
    return [name for name in names if holds(name)], [name for name in names if not holds(name)]


def few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def more(items: list) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
