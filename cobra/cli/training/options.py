"""Settings as options of the command line: a signature made from a dataclass, and the command line made from its values."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_type_hints

import typer
import yaml

from cobra.cli.training.configfile import checked


def with_options(kind: type, *names_of_arguments: str) -> Callable[[Callable], Callable]:
    """Decorates a command `f(given, **others)`: it gets an option for every field of `kind`, or an argument for those named,
    and what was given of them as the mapping `given`."""

    def decorate(command: Callable) -> Callable:
        types = get_type_hints(kind)
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        arguments = [_parameter(f, types[f.name], True) for f in fields(kind) if f.name in names_of_arguments]
        options = [_parameter(f, types[f.name], False) for f in fields(kind) if f.name not in names_of_arguments]

        def wrapped(**values: Any) -> None:
            others = {parameter.name: values.pop(parameter.name) for parameter in own}
            command({name: value for name, value in values.items() if value not in (None, [])}, **others)

        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        wrapped.__signature__ = inspect.Signature([*arguments, *own, *options])
        return wrapped

    return decorate


def given_settings(given: dict[str, Any], kind: type) -> dict[str, Any]:
    """Options as settings. Raises ValueError for a --set that is no NAME=VALUE."""
    values, types = dict(given), get_type_hints(kind)
    for each in fields(kind):
        if types[each.name] == dict[str, Any] and each.name in values:
            values[each.name] = dict(_pair(each.metadata["flag"], text) for text in values[each.name])
    return checked(values, kind, "command line")


def command_line(name: str, settings: Any) -> list[str]:
    """The words of a command that says these settings, those of their defaults left out."""
    words = ["cobra", name]
    for each in fields(settings):
        value = getattr(settings, each.name)
        if value == _default(each):
            continue
        flag = _flag(each)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            words += [word for key, v in value.items() for word in (flag, f"{key}={json.dumps(v)}")]
        elif isinstance(value, tuple):
            words += [word for item in value for word in (flag, item)]
        else:
            words += [flag, str(value)]
    return words


def _parameter(each: Field, expected: Any, argument: bool) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if argument else inspect.Parameter.KEYWORD_ONLY
    if argument:
        return inspect.Parameter(each.name, kind, annotation=Annotated[str, typer.Argument(help=each.metadata["help"])])
    plain = {str | None: str, int | None: int, float | None: float}.get(expected, expected)
    if plain in (tuple[str, ...], dict[str, Any]):
        plain = list[str]
    flags = [_flag(each)] + ([f"--no-{_flag(each)[2:]}"] if plain is bool else [])
    option = typer.Option("/".join(flags), help=_help(each), show_default=False)
    return inspect.Parameter(each.name, kind, default=None, annotation=Annotated[plain | None, option])


def _help(each: Field) -> str:
    words, choices, default = each.metadata["help"], each.metadata.get("choices"), _default(each)
    words += f" ({', '.join(choices)})" if choices else ""
    shown = "" if default in (None, (), {}) or default is False else f" \\[{default}]"
    return words + shown


def _default(each: Field) -> Any:
    return each.default_factory() if each.default is MISSING else each.default


def _flag(each: Field) -> str:
    return each.metadata.get("flag") or f"--{each.name.replace('_', '-')}"


def _pair(flag: str, text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not (name and found):
        raise ValueError(f"{flag} {text}: expected NAME=VALUE, such as beta=0.1")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{flag} {text}: the value is no YAML") from error
