"""What commands have in common: errors and warnings as lines of text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def explained() -> Iterator[None]:
    """Errors that say what to do end the command with their text and code 2, and so does a library that is not there."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except ImportError as error:
        typer.echo(
            f"error: this needs {error.name or str(error).strip().splitlines()[0]}: pip install 'cobra-peft[peft,plots,cli]'",
            err=True,
        )
        raise typer.Exit(2) from error


@contextmanager
def warnings_told() -> Iterator[None]:
    """A line each on the error stream as it comes, without the place in the library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
        yield


def note(text: str) -> None:
    """A line on the error stream for what is worth knowing and nothing to worry about."""
    typer.echo(f"note: {text}", err=True)
