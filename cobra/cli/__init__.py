"""The `cobra` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point; says what to install where the command line's own libraries are missing."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries have bars of their own
    try:
        from cobra.cli.app import app
    except ModuleNotFoundError as error:
        if error.name in {"typer", "rich", "yaml"}:
            sys.exit(f"the cobra command needs {error.name}: pip install 'cobra-peft[cli]'")
        raise
    app()
