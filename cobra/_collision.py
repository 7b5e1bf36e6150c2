"""The other distribution that installs a package named `cobra` (COBRApy, for metabolic models)."""

import warnings
from importlib import metadata


def warn_of_collision() -> None:
    """Warns where the distribution `cobra` is installed too: both write into the folder cobra/, and one breaks the other."""
    try:
        version = metadata.version("cobra")
    except metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"the distribution 'cobra' {version} (COBRApy) is installed beside 'cobra-peft', and both install the package 'cobra': "
        "their files are mixed and COBRApy does not work here. Give each its own environment: "
        "pip uninstall cobra cobra-peft, then install the one you need.",
        RuntimeWarning,
        stacklevel=3,
    )
