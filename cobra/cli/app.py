"""Commands of `cobra`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import cobra
from cobra.cli.calibrate import calibrate
from cobra.cli.outputs import check_folder
from cobra.cli.plan import plan
from cobra.cli.shell import explained, warnings_told
from cobra.cli.training.command import train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Decides where an adapter's rank belongs, trains it, and merges it away.",
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cobra-peft {cobra.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Says the version and ends.", is_eager=True, callback=_say_version)
    ] = False,
) -> None: ...


app.command()(calibrate)
app.command()(plan)
app.command()(train)


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
def check(
    folder: Annotated[Path, typer.Argument(help="A LoRA adapter: adapter_config.json and adapter_model.safetensors.")],
    engines: Annotated[
        str, typer.Option("--for", help="peft, transformers, vllm, sglang, gguf, with commas; all by default.")
    ] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Whether engines load an adapter, of COBRA or any other, with the right scale; exit code 1 where one does not."""
    with explained():
        from cobra.export.check import ENGINES, check_adapter

        asked = _names(engines)
        found = check_adapter(folder, ENGINES if asked in ((), ("all",)) else asked)
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.table())
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="A transformers model folder, minilm or smollm2.")],
    adapter: Annotated[list[Path], typer.Argument(help="One adapter folder or more.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model; must not exist.")],
    weight: Annotated[list[float] | None, typer.Option(help="Of each adapter, in their order; 1 by default.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest share of an update that rounding may lose, else an error.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Class to load the base as; by default the adapter's on record, else config.json's.")
    ] = None,
) -> None:
    """Adapters folded into a base model's weights, all of them at once, and saved as a plain model."""
    with explained(), warnings_told():
        from cobra.cli.merge import merge_folders

        typer.echo(merge_folders(base, adapter, weight or [1.0] * len(adapter), out, tolerance, architecture).table())


class Layout(StrEnum):
    """How the ranks of an adapter are written."""

    compact = "compact"
    padded = "padded"


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="An adapter folder, of COBRA or peft, or a training checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of the new adapter; must not exist.")],
    layout: Annotated[
        Layout, typer.Option(help="compact: each layer at its own rank; padded: all at the largest, which every engine reads.")
    ] = Layout.compact,
    engines: Annotated[
        str, typer.Option("--for", help="Engines that must load it: peft, transformers, vllm, sglang, gguf; with commas.")
    ] = "",
    base: Annotated[
        Path | None,
        typer.Option(
            help="Its model: a folder, minilm or smollm2. A checkpoint needs it; a compact adapter gets layers of rank 0 back."
        ),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Class to load the base as; by default the adapter's on record, else config.json's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """An adapter in the other layout, or the adapter of a training checkpoint; then what engines make of it."""
    with explained(), warnings_told():
        from cobra.cli.export import export_adapter

        found = export_adapter(source, out, layout, _names(engines), base, architecture)
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else f"{found.table()}\n{out}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder: scores, plan, history, whatever of them is there.")],
    out: Annotated[Path | None, typer.Option(help="A new folder; RUN/report by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: files written, what the run lacks.")] = False,
) -> None:
    """One self-contained HTML page of a run, with the drawings and the data behind each beside it."""
    with explained():
        from cobra.report.page import write_report

        if run.is_dir():
            check_folder((run / "report" if out is None else out).resolve().parent)
        found = write_report(run, out)
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.table())


@app.command()
def diagnose(
    model: Annotated[
        str, typer.Argument(help="A transformers folder, minilm or smollm2; with --random-init also a model type such as bert.")
    ],
    data: Annotated[str, typer.Argument(help="A CSV, TSV, JSONL or Parquet file, reviews, or random-images.")],
    out: Annotated[Path, typer.Option(help="Folder for the JSON, the CSV and the figures.")] = Path("runs/diagnosis"),
    random_init: Annotated[bool, typer.Option("--random-init", help="Random weights of this configuration.")] = False,
    granularity: Annotated[str, typer.Option(help="site (every linear layer) or block (every transformer block).")] = "site",
    examples: Annotated[int, typer.Option(min=2, help="In each calibration.")] = 64,
    steps: Annotated[int, typer.Option(min=2, help="Points of the path.")] = 50,
    draws: Annotated[int, typer.Option(min=1, help="Calibrations on disjoint examples.")] = 3,
    baseline: Annotated[
        str, typer.Option(help="Where the path starts: zero, mean or pad embeddings, or token:T for token T's.")
    ] = "zero",
    estimator: Annotated[str, typer.Option(help="paper, conductance or direct.")] = "paper",
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label: Annotated[str, typer.Option(help="Column of the labels; a causal language model needs none.")] = "label",
    batch_size: Annotated[int, typer.Option(min=1, help="Of the calibration.")] = 8,
    longest: Annotated[int, typer.Option(min=2, help="Tokens of a text; the rest is cut.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws, random weights and the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Where a model's gradient and contribution disagree, and how far examples and path points decide it."""
    try:
        from cobra.cli.diagnose import DiagnosisSettings, run_diagnosis
    except ModuleNotFoundError as error:
        typer.echo(f"error: the diagnosis needs {error.name}: pip install 'cobra-peft[hf,plots,cli]'", err=True)
        raise typer.Exit(2) from error
    with explained():
        settings = DiagnosisSettings(
            model=model,
            data=data,
            random_init=random_init,
            text=text,
            label=label,
            granularity=granularity,
            examples=examples,
            steps=steps,
            draws=draws,
            baseline=baseline,
            estimator=estimator,
            batch_size=batch_size,
            longest=longest,
            seed=seed,
        )
        found = run_diagnosis(settings, out)
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else f"{found.table()}\n{out}")


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A transformers folder, minilm or smollm2.")] = "minilm",
    rounds: Annotated[int, typer.Option(min=1, help="Of every alternative, in turn.")] = 9,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Of an example.")] = 64,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA; with gates, of r_max and of half of it.")] = 8,
    points: Annotated[int, typer.Option(min=2, help="Of the calibration's path.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What COBRA costs on this machine: training beside the frozen model and peft, calibration, merging, merged inference."""
    with explained(), warnings_told():
        from cobra.cli.bench import BenchSettings, run_bench

        settings = BenchSettings(model=model, rounds=rounds, batch_size=batch_size, tokens=tokens, rank=rank, points=points)
        found = run_bench(settings)
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.table())


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
