"""The `cobra` command."""

from __future__ import annotations

import logging
import sys
import warnings

# what peft and transformers load where it is installed, and which says at once what it has no kernels for
TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


def main() -> None:
    """Entry point; says what to install where the command line's own libraries are missing."""
    try:
        from cobra.cli.app import app
    except ModuleNotFoundError as error:
        if error.name in {"typer", "rich", "yaml"}:
            sys.exit(f"the cobra command needs {error.name}: pip install 'cobra-peft[cli]'")
        raise
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of its own calls of its own names
    app()
