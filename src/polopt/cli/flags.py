"""Flags made from the fields of the configuration: argparse splits the command line, pydantic checks the values.

A flag sets one field and takes one value; a flag of a list may be given several times.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

from polopt.config import SECTIONS, RunConfig
from polopt.errors import ConfigError

SINGULAR = {
    "regularizers": "regularizer", "trackers": "tracker", "plugins": "plugin", "task_options": "task_option"
}  # fmt: skip
ALIASES = {"--iterations": ("--steps",), "--task": ("--env",)}
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", bool: "{true,false}", Path: "PATH"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

Given = dict[tuple[str, ...], str]
"""Fields that flags set, by path, with the flag's name."""


@dataclass(frozen=True)
class Flag:
    """The flag of one field."""

    name: str
    path: tuple[str, ...]
    """Of the field, in the configuration."""
    field: FieldInfo

    @property
    def many(self) -> bool:
        """Whether it may be given several times."""
        return any(
            get_origin(kind) in (list, dict)
            for kind in (self.field.annotation, *get_args(self.field.annotation))
        )

    @property
    def metavar(self) -> str:
        """What stands for the value in the help."""
        if self.path == ("task_options",):
            return "KEY=VALUE"
        kinds = [self.field.annotation, *get_args(self.field.annotation)]
        for kind in kinds:
            if get_origin(kind) is Literal:
                return "{" + ",".join(map(str, get_args(kind))) + "}"
        return next((_METAVARS[kind] for kind in kinds if kind in _METAVARS), "TEXT")

    @property
    def help(self) -> str:
        """The field's sentence, its default and range."""
        limits = [
            f"{sign} {getattr(bound, name)}"
            for bound in self.field.metadata
            for name, sign in _BOUNDS.items()
            if hasattr(bound, name)
        ]
        default = self.field.get_default(call_default_factory=True)
        if default not in (None, [], {}):
            limits.insert(0, f"default {str(default).lower() if isinstance(default, bool) else default}")
        text = " ".join((self.field.description or "").split())
        return (f"{text} ({', '.join(limits)})" if limits else text).replace("%", "%%")


def run_flags() -> dict[str, list[Flag]]:
    """The flags of a run by section; "run" are the fields outside of all sections.

    A section's field whose name is taken, by a field outside or of a section before, has the section's name before it.
    """
    own = {name: field for name, field in RunConfig.model_fields.items() if name not in SECTIONS}
    taken = set(own)
    found = {"run": [Flag(_flag(SINGULAR.get(name, name)), (name,), field) for name, field in own.items()]}
    for section, model in SECTIONS.items():
        found[section] = [
            Flag(_flag(f"{section}_{name}" if name in taken else name), (section, name), field)
            for name, field in model.model_fields.items()
        ]
        taken |= set(model.model_fields)
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of ending the program, and names the nearest flag for an unknown one.

    Args:
        command: the command's name.
        description: what it does.
        positional: what its arguments without a flag are called, for messages.
        **options: of `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, description: str, positional: str, **options: Any) -> None:
        options = {"allow_abbrev": False, "formatter_class": _HelpFormatter} | options
        super().__init__(f"polopt {command}", description=description, **options)
        self._positional = positional

    def add_flags(self, title: str, flags: Sequence[Flag]) -> None:
        """Add a group of flags."""
        group = self.add_argument_group(title)
        for flag in flags:
            group.add_argument(
                flag.name,
                *ALIASES.get(flag.name, ()),
                dest=".".join(flag.path),
                metavar=flag.metavar,
                action="append" if flag.many else "store",
                default=argparse.SUPPRESS,
                help=flag.help,
            )

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """What was given, by destination.

        Raises:
            ConfigError: an unknown flag, a flag without its value, or an argument too many.
        """
        namespace, rest = self.parse_known_args(self._with_negative_values(argv))
        for argument in rest:
            if argument.startswith("-"):
                raise ConfigError(self._unknown_flag(argument.partition("=")[0]))
        if rest:
            raise ConfigError(f"{rest[0]!r}: unexpected; `{self.prog}` takes {self._positional} and flags")
        return vars(namespace)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: always.
        """
        found = re.fullmatch(r"argument ([^:]+): (.*)", message)
        if found and "expected one argument" in found[2]:
            raise ConfigError(
                f"{found[1].split('/')[0]}: needs a value; `{self.prog} --help` lists the flags"
            )
        raise ConfigError(message)

    def _unknown_flag(self, flag: str) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        name = _flag(flag.lstrip("-"))
        near = [option for option in known if option.startswith(name)]
        near = near or get_close_matches(name, known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{flag}: unknown flag; {hint}`{self.prog} --help` lists the flags"

    def _with_negative_values(self, argv: Sequence[str]) -> list[str]:
        """The arguments with negative numbers tied to their flags: argparse would take -1e-5 for a flag."""
        joined: list[str] = []
        for argument in argv:
            if _NEGATIVE.match(argument) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
                joined[-1] += f"={argument}"
            else:
                joined.append(argument)
        return joined


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=110)


def collect(parsed: dict[str, Any], flags: Sequence[Flag]) -> tuple[dict[str, Any], Given]:
    """What flags set, as nested values for `configure`, and which flags did.

    Raises:
        ConfigError: a task option that is not KEY=VALUE.
    """
    values: dict[str, Any] = {}
    given: Given = {}
    for flag in flags:
        dest = ".".join(flag.path)
        if dest not in parsed:
            continue
        given[flag.path] = flag.name
        value = _pairs(flag.name, parsed[dest]) if flag.path == ("task_options",) else parsed[dest]
        *section, field = flag.path
        place = values.setdefault(section[0], {}) if section else values
        place[field] = value
    return values, given


def merge(file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The values of a file, overridden by those of flags; tables are merged, lists replaced."""
    merged = dict(file)
    for name, value in flags.items():
        if isinstance(value, dict) and name in merged:
            table = merged[name]
            merged[name] = (
                merge(table, value) if isinstance(table, dict) else table
            )  # refused later, as it is
        else:
            merged[name] = value
    return merged


def _pairs(flag: str, items: list[str]) -> dict[str, str]:
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{flag} = {item!r}: write {flag} KEY=VALUE")
        pairs[key] = value
    return pairs
