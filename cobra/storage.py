"""Files: safetensors and JSON, written whole or not at all, read with every expectation checked."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_INTACT = "nothing was written, what was there before is as it was"


class FormatError(ValueError):
    """A file that is not what it should be; the message names the file, what was expected and what was found."""


def write_bytes(path: Path | str, data: bytes) -> None:
    """Writes a file through a neighbour and a rename: a reader sees the old file or the new one.

    Raises ValueError for the name of a folder, OSError naming the file, e.g. for a full disk. A kill leaves the old file, and
    the neighbour, .NAME.*.tmp.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: dict) -> None:
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path | str, tensors: dict[str, Tensor], kind: str, meta: dict) -> None:
    """A safetensors file with `meta` as JSON in its header, under the key "cobra"."""
    # one key alone: safetensors writes several in any order, and the same scores would be other bytes
    header = {"cobra": json.dumps({"kind": kind, "version": 1, **meta})}
    write_bytes(path, save(_apart(tensors), header))


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, and copied where one shares memory with another, which safetensors refuses."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        found[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor
        taken.add(found[name].untyped_storage().data_ptr())
    return found


def read_json(path: Path | str, kind: str) -> dict:
    """A JSON file of the given kind. Raises FileNotFoundError, FormatError."""
    path = Path(path)
    try:
        value = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: expected a COBRA {kind} (JSON), found a truncated or foreign file: {error}") from error
    _check_kind(path, value, kind)
    return value


def read_tensors(path: Path | str, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and meta of a file from `write_tensors`. Raises FileNotFoundError, FormatError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a COBRA {kind}")
    try:
        with safe_open(path, framework="pt") as f:
            meta = json.loads((f.metadata() or {}).get("cobra", "null"))
            _check_kind(path, meta, kind)
            return {key: f.get_tensor(key) for key in f.keys()}, meta  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise FormatError(
            f"{path}: expected a COBRA {kind} (safetensors), found a truncated or foreign file: {error}"
        ) from error


def check_finite(path: Path | str, tensors: dict[str, Tensor]) -> None:
    """Before a file is written. Raises ValueError naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or Inf: the training diverged; {_INTACT}")


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """A folder that appears, or replaces the old one, only when the block ends well.

    Raises OSError naming the folder, e.g. for a full disk; a kill leaves the old folder, and the unfinished one, .NAME.*.tmp.
    """
    path = Path(path).resolve()  # of a link to a folder, the folder is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    fresh.mkdir()
    try:
        yield fresh
        if not (path.exists() and _exchange(fresh, path)):
            _replace(fresh, path)
    except (OSError, SafetensorError) as error:
        raise _unwritten(path, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _exchange(fresh: Path, path: Path) -> bool:
    """Swaps the names of two folders in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    return rename is not None and rename(here, os.fsencode(fresh), here, os.fsencode(path), swap) == 0


def _replace(fresh: Path, path: Path) -> None:
    """In two steps; a kill between them leaves the old folder as .NAME.*.old."""
    old = fresh.with_suffix(".old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(fresh, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _unwritten(path: Path, error: Exception) -> OSError:
    """What did not go through, and that nothing is lost."""
    if not isinstance(error, OSError) or error.errno is None:
        return OSError(f"{path}: {error}; {_INTACT}")
    reason = (error.strerror or os.strerror(error.errno)).removesuffix(f"; {_INTACT}")
    return OSError(error.errno, f"{reason}; {_INTACT}", str(path))


def expect(path: Path | str, found: dict, expected: dict[str, Callable[[object], bool]]) -> None:
    """Checks the fields of a file's meta. Raises FormatError naming the first that is missing or wrong."""
    for key, holds in expected.items():
        if key not in found:
            raise FormatError(f"{path}: field {key!r} is missing")
        if not holds(found[key]):
            raise FormatError(f"{path}: field {key!r} has an unexpected value: {str(found[key])[:80]}")


def _check_kind(path: Path, value: object, kind: str) -> None:
    found = value.get("kind") if isinstance(value, dict) else None
    if found != kind:
        raise FormatError(f"{path}: expected a COBRA {kind}, found {found or 'a file of another program'}")
    if value.get("version") != 1:
        raise FormatError(f"{path}: version {value.get('version')!r} of a COBRA {kind}; this release reads version 1")
