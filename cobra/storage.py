"""Files: safetensors and JSON, written whole or not at all, read with every expectation checked."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_INTACT = "nothing was written, what was there before is as it was"
_LEFT = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)")
_ESCAPED = re.compile(rb"[ \t\n\\]")  # in mountinfo, as three octal digits


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
    except (ValueError, RecursionError) as error:
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
    except FormatError:
        raise
    except (SafetensorError, ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: expected a COBRA {kind} (safetensors), found a truncated or foreign file: {error}"
        ) from error


def check_finite(path: Path | str, tensors: dict[str, Tensor]) -> None:
    """Before a file is written. Raises ValueError naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or Inf: the training diverged; {_INTACT}")


@contextmanager
def new_folder(path: Path | str, order: Sequence[str] = ()) -> Iterator[Path]:
    """A folder that appears, or replaces the old one, only when the block ends well.

    A folder that is there and empty, a mount point, or the current directory or one above it, stays, and the files are moved
    into it one by one, which is not one step: a reader may see some of them. Those of the same names are put aside before and
    deleted after, others stay. An error puts all back. A kill in the middle loses nothing: what was put aside is in
    .NAME.*.old within the folder.

    order: in which files are moved into a folder that stays, other names before them; the last should be the one without which
        the folder is taken for nothing: it comes last and is put aside first, so that new and old are never taken for a whole

    Raises OSError naming the folder, e.g. for a full disk; a kill leaves the old folder, and the unfinished one, .NAME.*.tmp,
    beside it or, of a folder that stays, within.
    """
    path = Path(path).resolve()  # of a link to a folder, the folder is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    stays = _stays(path)
    # within a mount point: files cannot be moved into it from elsewhere
    fresh = (path if stays else path.parent) / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        fresh.mkdir()
        yield fresh
        if stays:
            _move_in(fresh, path, order)
        elif not (path.exists() and _exchange(fresh, path)):
            _replace(fresh, path)
    except (OSError, SafetensorError) as error:
        raise _unwritten(path, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is what a kill left of a write."""
    return _LEFT.fullmatch(name) is not None


def _stays(path: Path) -> bool:
    """Whether a folder is in use as it is: by whoever made it, by the system, or by this process."""
    return path.is_dir() and (not any(path.iterdir()) or _is_mount(path) or _holds_this_process(path))


def _is_mount(path: Path) -> bool:
    """os.path.ismount, and on Linux also of folders that are mounted from the same file system, which it cannot tell."""
    mounts, name = Path("/proc/self/mountinfo"), _ESCAPED.sub(lambda found: b"\\%03o" % ord(found[0]), os.fsencode(path))
    lines = mounts.read_bytes().splitlines() if mounts.is_file() else []
    return os.path.ismount(path) or any(line.split()[4] == name for line in lines)


def _holds_this_process(path: Path) -> bool:
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was deleted
        return False
    return path == here or path in here.parents


def _move_in(fresh: Path, path: Path, order: Sequence[str]) -> None:
    """What `new_folder` says of a folder that stays."""
    ranks = {name: rank for rank, name in enumerate(order)}
    names = sorted((p.name for p in fresh.iterdir()), key=lambda name: ranks.get(name, -1))
    old = fresh.with_suffix(".old")
    old.mkdir()
    try:
        _move(reversed(names), path, old)
        _move(names, fresh, path)
    except BaseException:
        _move((name for name in reversed(names) if not os.path.lexists(fresh / name)), path, fresh)
        _move(names, old, path)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    """Those that are there."""
    for name in names:
        if os.path.lexists(source / name):
            os.replace(source / name, target / name)


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
