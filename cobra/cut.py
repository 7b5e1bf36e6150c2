"""What must hold before a plan cuts an adapter: that it is a plan for it, and that the search has come to its end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from cobra.config import CobraConfig
from cobra.group import Group
from cobra.plan import RankPlan


def check_fits(plan: RankPlan, groups: Sequence[Group], fingerprint: str) -> None:
    """Raises ValueError for a plan of another base model, of other groups, or of other numbers of gates.

    fingerprint: of the base model
    """
    if plan.fingerprint != fingerprint:
        raise ValueError(f"the plan is of another model: fingerprint {plan.fingerprint}, this adapter's is {fingerprint}")
    ours, theirs = {group.name: group.rank for group in groups}, {site.name: len(site.posterior) for site in plan.sites}
    if list(ours) != list(theirs):
        raise ValueError(
            f"the plan is of another adapter: {len(theirs)} groups of gates, this one has {len(ours)}, or other names; "
            "use one granularity and one target_modules for both"
        )
    for name, rank in ours.items():
        if rank != theirs[name]:
            raise ValueError(
                f"the plan is of another adapter: it has {theirs[name]} gates for {name}, this one {rank}; "
                "use one r_max for both, in plan_ranks(..., r_max=) and CobraConfig"
            )


def warn_of_an_early_cut(groups: Sequence[Group], config: CobraConfig, step: int) -> None:
    """Where updates were trained and gates not yet drawn as the config says; called by what the user calls.

    step: optimizer steps so far
    """
    steps = config.total_steps
    if not config.samples or not any(layer.lora_B.any() for group in groups for layer in group.all_layers):
        return
    if step == 0 and steps > 1:
        warnings.warn(
            "the adapter was trained and step() never called: all steps had one draw of gates, at the first temperature; "
            "call adapter.step() after every optimizer step, or add CobraCallback to the Trainer",
            stacklevel=3,
        )
    elif 0 < 2 * step < steps:
        warnings.warn(
            f"apply(plan) at step {step} of total_steps={steps}: the gates' temperature is still "
            f"{config.temperature_at(step):.2g}; set total_steps to the number of steps before the cut",
            stacklevel=3,
        )
