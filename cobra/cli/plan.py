"""`cobra plan`: ranks from scores alone, for people and for other trainers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cobra.cli.outputs import check_file
from cobra.cli.shell import explained, warnings_told


class PlanFormat(StrEnum):
    """What `cobra plan` prints."""

    table = "table"
    json = "json"
    csv = "csv"
    peft = "peft"
    axolotl = "axolotl"


def plan(
    scores: Annotated[Path, typer.Argument(help="What LayerScores.save wrote.")],
    budget: Annotated[int, typer.Option(min=0, help="How much may be kept, in the unit.")],
    unit: Annotated[
        str, typer.Option(help="ranks, parameters, bytes (of fp32 matrices) or flops (forward, per token).")
    ] = "ranks",
    r_max: Annotated[int, typer.Option(min=1, help="Largest rank of a layer.")] = 64,
    minimum: Annotated[int, typer.Option(min=0, help="Smallest rank of a layer.")] = 0,
    maximum: Annotated[
        list[str] | None, typer.Option(help="Largest rank of a layer: NAME=RANK, where NAME may be the end of a layer's name.")
    ] = None,
    multiple: Annotated[int, typer.Option(min=1, help="Every rank is a multiple of this.")] = 1,
    tied: Annotated[list[str] | None, typer.Option(help="Equal ranks: qkv, gate_up, experts, or a regular expression.")] = None,
    fusion: Annotated[str, typer.Option(help="product, sum, contribution or gradient.")] = "product",
    scaling: Annotated[float, typer.Option(help="alpha / r of every layer, for peft and axolotl.")] = 2.0,
    show: Annotated[PlanFormat, typer.Option("--format", help="What to print.")] = PlanFormat.table,
    out: Annotated[Path | None, typer.Option(help="Writes the plan (JSON), for Adapter.apply.")] = None,
) -> None:
    """Ranks from scores alone, in proportion to the prior: for training with any tool."""
    with explained():
        from cobra import Budget, LayerScores, plan_ranks

        if not (math.isfinite(scaling) and scaling > 0):
            raise ValueError(f"--scaling {scaling:g}: expected a finite number above 0; 2 is the usual one")
        if out is not None:
            check_file(out)
        limits = Budget(budget, unit, minimum, _limits(maximum or ()), multiple, tuple(tied or ()))
        with warnings_told():
            found = plan_ranks(LayerScores.load(scores), limits, r_max, fusion)
        if out is not None:
            found.save(out)
        typer.echo(_printed(found, show, scaling), nl=False)


def _limits(maximum: Sequence[str]) -> dict[str, int] | None:
    """NAME=RANK, any number of times."""
    pairs = [text.rpartition("=") for text in maximum]
    wrong = [text for text, (name, _, rank) in zip(maximum, pairs, strict=True) if not (name and rank.isdigit())]
    if wrong:
        raise ValueError(f"--maximum {wrong[0]}: expected NAME=RANK, such as pooler.dense=8; --r-max limits all layers")
    return {name: int(rank) for name, _, rank in pairs} or None


def _printed(plan, show: PlanFormat, scaling: float) -> str:
    if show is PlanFormat.table:
        return plan.table() + "\n"
    if show is PlanFormat.csv:
        return plan.csv()
    if show is PlanFormat.axolotl:
        import yaml

        return yaml.safe_dump(plan.to_axolotl(scaling), sort_keys=False)
    if show is PlanFormat.peft:
        from cobra.export.config import lora_fields

        return json.dumps(lora_fields(plan, scaling), indent=1) + "\n"
    return json.dumps(plan.to_dict(), indent=1) + "\n"
