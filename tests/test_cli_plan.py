"""`cobra plan`: what is refused of its options before scores are read."""

import pytest
from test_cli_merge import refused
from typer.testing import CliRunner

from cobra.cli.app import app


@pytest.mark.parametrize("scaling", ["nan", "inf", "-inf", "0", "-2"])
@pytest.mark.parametrize("show", ["peft", "axolotl", "table"])
def test_a_scaling_that_is_none(scaling, show):
    """alpha / r would be no number, or the adapter nothing or its opposite."""
    result = CliRunner().invoke(app, ["plan", "none", "--budget", "8", "--format", show, "--scaling", scaling])
    refused(result, f"--scaling {scaling}: expected a finite number above 0")
