"""Settings from YAML files: names and types checked, so that a slip is an error and not a default."""

from __future__ import annotations

import types
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from cobra import storage

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    tuple[str, ...]: "a list of texts",
    tuple[float, float]: "two numbers",
    dict[str, Any]: "a mapping",
}


def read_config(path: Path | str, kind: type) -> dict[str, Any]:
    """The settings in a file, for the dataclass `kind`.

    Raises FileNotFoundError, and ValueError for a file that is no mapping, unknown keys (naming the nearest) and wrong types.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected settings in YAML")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a mapping of settings, found {str(found)[:40]!r}")
    return checked(found, kind, str(path))


def write_config(path: Path | str, settings: Any) -> None:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
    storage.write_bytes(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())


def checked(values: dict, kind: type, where: str) -> dict[str, Any]:
    """The values as the fields of `kind` have them. Raises ValueError naming the key and `where` it stands."""
    types_of = get_type_hints(kind)
    known = [each.name for each in fields(kind)]
    found = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}: unknown key {name!r}{nearest(str(name), known)}")
        found[name] = _converted(value, types_of[name], f"{where}: {name}")
    return found


def nearest(name: str, known: list[str]) -> str:
    """What the name may have been meant to be, as the end of a sentence; or nothing."""
    found = get_close_matches(name.replace("-", "_").lower(), known, 1)
    return f"; did you mean {found[0]!r}?" if found else f"; known are {', '.join(known)}"


def _converted(value: Any, expected: Any, at: str) -> Any:
    options = get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)
    if value is None and type(None) in options:
        return None
    wanted = [option for option in options if option in WORDS]
    for kind in wanted:
        if (found := _as(kind, value)) is not None:
            return found
    raise ValueError(f"{at}: expected {' or '.join(WORDS[kind] for kind in wanted)}, found {value!r}")


def _as(kind: Any, value: Any) -> Any:
    """The value as a setting of this kind; None where it is none."""
    items = value if isinstance(value, list | tuple) else None
    if kind == tuple[str, ...] and items is not None and all(isinstance(item, str) for item in items):
        return tuple(items)
    if kind == tuple[float, float] and items is not None and len(items) == 2:
        pair = tuple(_as(float, item) for item in items)
        return None if None in pair else pair
    if kind is float and type(_number(value)) in (int, float):
        return float(_number(value))
    if kind == dict[str, Any] and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _number(item) for key, item in value.items()}
    return value if kind in (int, str, bool) and type(value) is kind else None


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-3 for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
