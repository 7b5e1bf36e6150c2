"""`cobra calibrate`: measures the layers of a model on a table, for `cobra plan`, `cobra train --scores` and other trainers."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cobra.cli.outputs import check_file
from cobra.cli.shell import explained, note, warnings_told
from cobra.cli.training.options import given_settings, with_options
from cobra.cli.training.settings import AVERAGE_RANK, CalibrateSettings

DIRECTIONS = 16  # as many as CobraConfig has gates a layer by default


@with_options(CalibrateSettings, "model", "data")
def calibrate(
    given: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Scores of every layer: how much it contributes, and how much it wants to change.

    For a bare encoder a head is fitted first, as `cobra train` does.
    """
    with explained(), warnings_told():
        settings = CalibrateSettings(**given_settings(given, CalibrateSettings))
        found = run_calibration(settings)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("layer", overflow="fold"),
        "contribution",
        "gradient",
        "prior",
        title=f"{found['model']}, {found['examples']:,} rows",
    )
    for layer in found["layers"]:
        table.add_row(layer["name"], f"{layer['contribution']:.3g}", f"{layer['gradient']:.3g}", f"{layer['prior']:.2%}")
    Console().print(table)
    residual = found["completeness"]["path"]
    missed = "F(x) - F(x0) is 0" if residual is None else f"the attributions miss F(x) - F(x0) by {residual:.1%}"
    typer.echo(f"Along the path {missed}.\n{found['scores']}; ranks from it: {found['plan']}")


def run_calibration(settings: CalibrateSettings) -> dict:
    """Writes the scores and returns them as plain values. Raises OSError and ValueError for what does not fit."""
    import cobra
    from cobra.cli.training.prepare import fit_head, prepare

    check_file(Path(settings.out))
    subject = prepare(settings)
    for text in filter(None, (*subject.notes, fit_head(subject))):
        note(text)
    scores = cobra.calibrate(
        subject.model,
        subject.batches(subject.train[: settings.examples], settings.calibration_batch_size),
        steps=settings.steps,
        estimator=settings.estimator,
        baseline=settings.baseline,
        granularity=settings.granularity,
        max_examples=settings.examples,
        directions=DIRECTIONS,
    )
    scores.save(settings.out)
    columns = (scores.sites, scores.conductance.tolist(), scores.gradient.tolist(), scores.prior.tolist())
    names = ("name", "contribution", "gradient", "prior")
    return {
        "scores": settings.out,
        "model": subject.words,
        "task": subject.task,
        "examples": scores.settings["examples"],
        "completeness": {k: v if math.isfinite(v) else None for k, v in asdict(scores.completeness).items()},
        "unused": scores.unused,
        "layers": [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)],
        "plan": shlex.join(["cobra", "plan", settings.out, "--budget", str(AVERAGE_RANK * len(scores.sites))]),
    }
