"""The `train` command: settings, the run, and what is said at its end."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from cobra.cli.shell import explained, note, warnings_told
from cobra.cli.training.options import with_options
from cobra.cli.training.settings import TrainSettings

FAULT = 1


@with_options(TrainSettings)
def train(
    given: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="Settings in YAML, named as the options; options come first.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Goes on with the run in --out, from its last checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Trains an adapter on a table of texts: calibrates, searches the ranks, cuts them, evaluates, saves, reports.

    Exit codes: 0 done; 1 a fault in training (gradients that stay non-finite, a full disk); 2 input that does not fit;
    130 and 143 ended by Ctrl-C or SIGTERM, after the step was finished and saved. A second Ctrl-C ends at once.
    """
    with explained(), warnings_told():
        from cobra.cli.training.folder import RunFolder, step_of
        from cobra.cli.training.loop import Fault
        from cobra.cli.training.run import run_training
        from cobra.cli.training.settle import settle
        from cobra.cli.training.signals import Interrupted, Interruption

        settings = settle(given, config, resume)
        go_on = shlex.join(["cobra", "train", "--resume", "--out", settings.out] + (["--json"] if as_json else []))
        try:
            with Interruption() as interruption:
                result = run_training(settings, resume, interruption)
        except (Interrupted, Fault) as end:
            newest = RunFolder(settings.out).newest()
            saved = "no checkpoint yet" if newest is None else f"the last checkpoint is of step {step_of(newest):,}"
            if isinstance(end, Fault):
                typer.echo(f"error: {end}\n{saved}" + (f"; to go on: {go_on}" if end.passing else ""), err=True)
                raise typer.Exit(FAULT) from end
            there = (Path(settings.out) / "config.yaml").is_file()
            typer.echo(f"{end}: {saved}; to go on: {go_on}" if there else f"{end}: nothing was written yet", err=True)
            raise typer.Exit(end.code) from end
    from rich.console import Console

    from cobra.cli.training.summary import how_to_load, summary

    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        Console().print(summary(result))
        typer.echo(result.get("report", result["run"]))
    if loading := how_to_load(result):
        note(loading)
