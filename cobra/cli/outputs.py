"""Places that commands write to, checked before the work for them: nobody waits for what cannot be written."""

from __future__ import annotations

import os
from pathlib import Path


def check_file(path: Path) -> None:
    """Raises ValueError for the name of a folder, and what `check_folder` does for the folder that it is in."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file with --out")
    check_folder(path.parent)


def check_new_folder(path: Path) -> None:
    """Raises ValueError for what exists, and what `check_folder` does for the folder that it is in."""
    if path.exists():
        raise ValueError(f"{path} exists; name a new folder")
    check_folder(path.parent)


def check_folder(path: Path) -> None:
    """Raises OSError where it could not be made, or nothing could be written into it. Makes nothing."""
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is no folder; name another place with --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} is not writable; name another place with --out")
