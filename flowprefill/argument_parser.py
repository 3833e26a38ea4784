"""The argument parser behind every command: errors in one line, with the name probably meant.

cli.py builds its commands from Parser and makes flags of settings with add_settings().
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from flowprefill.config import parse_json

_UNKNOWN_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")


class UsageError(Exception):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, so that main() shows all errors alike.

    Attributes:
        foreign: flags that other engines have -> what does it here; "" -> what to say of a word
            too many.
    """

    foreign: Mapping[str, str] = MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        choice = _UNKNOWN_CHOICE.search(message)
        if choice:
            message += did_you_mean(choice[1], re.findall(r"[\w.:-]+", choice[2]))
        raise UsageError(f"{message} (see {self.prog} --help)")

    # The signature is narrower than argparse's, which has overloads for namespaces of any type.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and refuse what is left over here, where the flags of this command are known."""
        parsed, extras = super().parse_known_args(args, namespace)
        if extras:
            flags = [flag for action in self._actions for flag in action.option_strings]
            unknown = extras[0].partition("=")[0]
            if unknown in self.foreign:
                hint = f"; {self.foreign[unknown]}"
            elif unknown.startswith("-"):
                hint = did_you_mean(unknown, flags)
            else:
                hint = f"; {self.foreign['']}" if "" in self.foreign else ""
            self.error(f"unrecognized arguments: {' '.join(extras)}{hint}")
        return parsed, extras


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return ``; did you mean NAME?`` for the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a JSON object")
    return value


def add_settings(parser: argparse.ArgumentParser, settings: type[Any], prefix: str) -> None:
    """Add one flag per field of a settings dataclass; only flags that were given are set.

    Args:
        parser: a command or an argument group of it.
        settings: dataclass whose fields carry their help in ``metadata['doc']``.
        prefix: of the flags' names in the parsed namespace, so that two classes do not mix.
    """
    group = parser.add_argument_group(f"{prefix.rstrip('.')} settings")
    for field in dataclasses.fields(settings):
        has_default = field.default is not dataclasses.MISSING
        default = field.default if has_default else {}
        shown = "" if default in ("", (), {}) else f" (default {default})"
        options: dict[str, Any] = {
            "dest": prefix + field.name,
            "default": argparse.SUPPRESS,
            "help": (field.metadata["doc"] + shown).replace("%", "%%"),
        }
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options |= {"nargs": "+", "metavar": "NAME"}
        elif isinstance(default, dict):
            options |= {"type": _json_object, "metavar": "JSON"}
        else:
            options |= {"type": type(default), "metavar": field.name.rsplit("_", 1)[-1].upper()}
        group.add_argument("--" + field.name.replace("_", "-"), **options)
