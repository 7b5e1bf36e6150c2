"""Commands of `cobra`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Decides where an adapter's rank belongs, trains it, and merges it away.",
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder the run leaves behind.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=10, help="Training steps, the same for COBRA and LoRA.")] = 400,
    train_examples: Annotated[int, typer.Option(min=64, help="Reviews to train on.")] = 4000,
    test_examples: Annotated[int, typer.Option(min=64, help="Reviews of other movies to test on.")] = 1500,
    calibration_examples: Annotated[int, typer.Option(min=8, help="Reviews the scores are measured on.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the head, the data order, lora_A and the gates.")] = 0,
) -> None:
    """The main job on real data: MiniLM on movie reviews, COBRA beside plain LoRA, from scores to a checkpoint peft loads."""
    try:
        from cobra.cli.demo import DemoSettings, run_demo
    except ModuleNotFoundError as error:
        typer.echo(
            f"the demo needs {error.name}: `make demo` sets everything up, or pip install 'cobra-peft[peft,plots,cli]'",
            err=True,
        )
        raise typer.Exit(2) from error
    run_demo(
        DemoSettings(
            out=out,
            steps=steps,
            train_examples=train_examples,
            test_examples=test_examples,
            calibration_examples=calibration_examples,
            seed=seed,
        )
    )


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """What is installed, what is active, and why not."""
    from cobra.cli.environment import describe

    facts = describe()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {value}")
