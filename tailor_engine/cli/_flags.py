"""Command-line flags made from a config's fields, and a parser whose errors are one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from typing import Any, NoReturn

from tailor_engine.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, with the nearest right flag or command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", Formatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(f"{message}; see `{self.prog} --help`")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is left over with the nearest flag."""
        found, extra = self.parse_known_args(args, namespace)
        if extra:
            parser = getattr(found, "parser", self)
            flags = [flag for action in parser._actions for flag in action.option_strings]
            near = difflib.get_close_matches(extra[0].split("=")[0], flags, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; see `{parser.prog} --help`"
            raise UserError(f"unknown argument {extra[0]!r}{hint}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            near = difflib.get_close_matches(str(value), names, 1, 0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            what = "command" if action.dest == "command_name" else action.dest
            raise UserError(f"unknown {what} {value!r}{hint} There are {', '.join(names)}.")


class Formatter(argparse.HelpFormatter):
    """Help with aligned columns on a wide terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


def add_config(parser: argparse.ArgumentParser, config_type: type, prefix: str = "") -> None:
    """Give a parser one flag for each field of a config; only given ones land in the namespace.

    A field whose flag the command itself uses gets the prefix: `--distill-teacher`.
    """
    hints = typing.get_type_hints(config_type)
    group = parser.add_argument_group("settings")
    for field in dataclasses.fields(config_type):
        flag, hint = "--" + field.name.replace("_", "-"), hints[field.name]
        if flag in parser._option_string_actions:
            flag = f"--{prefix}{flag[1:]}"
        settings: dict[str, Any] = {"dest": f"config.{field.name}", "default": argparse.SUPPRESS}
        if hint is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = str if hint is str else _value
            settings["metavar"] = _metavar(field, hint)
        group.add_argument(flag, help=_help(field), **settings)


def config_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the config fields that the command line gave."""
    given = vars(arguments).items()
    return {key.partition(".")[2]: value for key, value in given if key.startswith("config.")}


def _value(text: str) -> Any:
    from tailor_engine.io.recipes import parse_value

    return parse_value(text)


def _metavar(field: dataclasses.Field, hint: Any) -> str:
    choices = field.metadata.get("choices")
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    return {int: "N", float: "X", str: "TEXT"}.get(hint, "VALUE")


def _help(field: dataclasses.Field) -> str:
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    low, high = field.metadata.get("low"), field.metadata.get("high")
    parts = []
    if low is not None or high is not None:
        span = f"{'' if low is None else f'{low:g}'}..{'' if high is None else f'{high:g}'}"
        parts.append(span)
    parts.append(f"default {default if default not in ('', None) else 'none'}")
    text = f"{field.metadata.get('help', '')} ({', '.join(parts)})"
    return text.replace("%", "%%").strip()
